"""Steps of few tokens through a whole model in one call of step.c, for CPUs: what graphs are to a GPU.

A token of a small model takes hundreds of short operations, and with few rows what lies between two of them in Python
takes as long as they do. The layers stay as they are and keep their memory: larger batches go through them.

Shape suffixes: T tokens of the flat batch, P pages of a table, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_size_t, pointer

import torch
from torch import Tensor, nn

from runtime.cache import KVCache
from runtime.frames import FrameCache
from runtime.layers.base import LinearLayer
from runtime.layers.merged import Merged
from runtime.layers.mlp import MLP
from runtime.layers.norm import RMSNorm
from runtime.models.config import LayerConfig
from runtime.models.decoder import Block, Decoder
from runtime.native.kv_store import KVPages, described, reads
from runtime.native.library import library
from runtime.native.linear import Weight
from runtime.ops.backend import uses_native
from runtime.ops.batch import AttentionBatch
from runtime.ops.pages import Pages

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class _Linear(ctypes.Structure):
    _fields_ = [("weight", POINTER(Weight)), ("bias", c_size_t)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_size_t) for name in ("before_attention", "after_attention", "before_ffn", "after_ffn")),
        *((name, c_size_t) for name in ("q_norm", "k_norm")),
        ("k", KVPages),
        ("v", KVPages),
        ("k_coded", KVPages),
        ("v_coded", KVPages),
        *((name, c_int64) for name in ("heads", "groups", "width", "inner", "window", "rope")),
        ("scale", c_float),
    ]


class _Rope(ctypes.Structure):
    _fields_ = [("frequency", c_size_t), ("rotated", c_int64), ("factor", c_float)]


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("ropes", POINTER(_Rope)),
        ("norm", c_size_t),
        ("head", _Linear),
        *((name, c_int64) for name in ("layer_count", "rope_count", "hidden", "sinks")),
        *((name, c_float) for name in ("eps", "added", "softcap")),
        ("activation", c_int32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_size_t) for name in ("x", "logits", "position", "slot", "end", "table", "wanted")),
        *((name, c_size_t) for name in ("coded", "head_row", "head_line", "head_end")),
        *((name, c_int64) for name in ("rows", "table_stride", "wanted_rows")),
        ("threads", c_int32),
    ]


class _Unfit(Exception):
    """Something in the model that step.c does not do."""


class SmallSteps:
    """Steps of fewer than `many_rows` tokens through a model and its cache, which must stay where they are."""

    bytes = 0  # of its own, for the memory ledger

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self._model = model
        self._biases: list[Tensor] = []
        self._scaled = any(pages.scale_G is not None for both in cache.layers() for pages in both)
        layers = [
            self._layer(block, layer, pages, rope)
            for block, layer, pages, rope in zip(
                model.blocks, model.config.layers, cache.layers(), model.rotary_of_layer, strict=True
            )
        ]
        ropes = [
            _Rope(_at(rotary.frequency_F), 2 * len(rotary.frequency_F), rotary.attention_factor)
            for rotary in model.rotaries
        ]
        linears = [module for module in model.modules() if isinstance(module, LinearLayer)]
        self.many_rows = min(linear.many_rows for linear in linears)
        config = model.config
        self._decoder = _Decoder(
            layers=(_Layer * len(layers))(*layers),
            ropes=(_Rope * len(ropes))(*ropes),
            norm=_at(model.norm.weight_D),
            head=self._linear(model.head),
            layer_count=len(layers),
            rope_count=len(ropes),
            hidden=config.hidden,
            sinks=0 if cache.frames is None else cache.frames.sinks,
            eps=config.norm_eps,
            added=float(config.norm_plus_one),
            softcap=config.attention_softcap or 0.0,
            activation=_ACTIVATIONS[config.activation],
        )

    @classmethod
    def of(cls, model: Decoder, cache: KVCache | FrameCache) -> SmallSteps | None:
        """None where something in the model or on this machine has to go through the layers."""
        plain = model.numerics == "fast" and model.dtype is torch.float32 and uses_native(model.norm.weight_D)
        if not plain or library().loaded is None:
            return None
        try:
            return cls(model, cache)
        except _Unfit:
            return None

    def covers(self, batch: AttentionBatch) -> bool:
        """Whether a batch has few enough tokens. Those with tables for each layer and head are not done beside others,
        and not in fp8, whose scales are the layer's and head's."""
        few = batch.starts[-1] < self.many_rows and uses_native(batch.position_T)
        return few and (batch.by_head is None or (batch.by_head.whole is None and not self._scaled))

    def run(self, ids_T: Tensor, batch: AttentionBatch, rows_N: Tensor) -> Tensor:
        """fp32 logits [N, V] of rows (rising) of a batch that is covered; keys and values of all are stored."""
        model = self._model
        x_TK = model.embedding(ids_T).contiguous()
        logits_NV = torch.empty(len(rows_N), model.config.vocab)
        end_T, table_TP, coded_T = batch.kv_len_S, batch.table_SP, batch.coded_S
        if batch.max_query > 1:  # every token of a prompt is a row that sees those before it
            count_S = batch.starts_S1.diff().long()
            behind_T = batch.starts_S1[1:].repeat_interleave(count_S) - torch.arange(1, len(ids_T) + 1)
            end_T = (end_T.repeat_interleave(count_S) - behind_T).int()
            table_TP = table_TP.repeat_interleave(count_S, dim=0)
            coded_T = None if coded_T is None else coded_T.repeat_interleave(count_S)
        by_head: list[Tensor] = []
        if batch.by_head is not None:
            *by_head, table_TP = batch.by_head.lines()
        tensors = (x_TK, logits_NV, batch.position_T, batch.slot_T, end_T, table_TP, rows_N)
        coded = 0 if coded_T is None else coded_T.data_ptr()
        heads = [x.data_ptr() for x in by_head] or [0, 0, 0]
        sizes = len(ids_T), table_TP.shape[1], len(rows_N), torch.get_num_threads()
        step = _Step(*(x.data_ptr() for x in tensors), coded, *heads, *sizes)
        if library().loaded.decoder_step(ctypes.byref(self._decoder), ctypes.byref(step)):
            raise MemoryError(f"no memory for a step of {len(ids_T)} rows")
        return model.capped(logits_NV)

    def _layer(self, block: nn.Module, layer: LayerConfig, pages: tuple[Pages, Pages], rope: int) -> _Layer:
        if not isinstance(block, Block) or not isinstance(block.ffn, MLP):
            raise _Unfit
        attention = block.attention
        return _Layer(
            qkv=self._linear(_joined(attention.qkv)),
            output=self._linear(attention.output),
            gate_up=self._linear(_joined(block.ffn.gate_up)),
            down=self._linear(block.ffn.down),
            before_attention=_norm(block.before_attention),
            after_attention=_norm(block.after_attention),
            before_ffn=_norm(block.before_ffn),
            after_ffn=_norm(block.after_ffn),
            q_norm=_norm(attention.q_norm),
            k_norm=_norm(attention.k_norm),
            k=_pages(pages[0]),
            v=_pages(pages[1]),
            k_coded=described(pages[0].coded),
            v_coded=described(pages[1].coded),
            heads=layer.heads,
            groups=layer.kv_heads,
            width=layer.head_dim,
            inner=layer.ffn,
            window=layer.window or 0,
            rope=rope,
            scale=layer.scale,
        )

    def _linear(self, module: nn.Module) -> _Linear:
        weight = module.for_kernels() if isinstance(module, LinearLayer) else None
        if weight is None:
            raise _Unfit
        if module.bias is None:
            return _Linear(pointer(weight))
        self._biases.append(module.bias.float().contiguous())
        return _Linear(pointer(weight), _at(self._biases[-1]))


def _joined(merged: Merged) -> nn.Module:
    if len(merged.linears) > 1:
        raise _Unfit
    return merged.linears[0]


def _norm(norm: RMSNorm | None) -> int:
    return 0 if norm is None else _at(norm.weight_D)


def _pages(pages: Pages) -> KVPages:
    if pages.rotate or not reads(pages):
        raise _Unfit
    return described(pages)


def _at(tensor: Tensor) -> int:
    """Where an fp32 tensor lies."""
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        raise _Unfit
    return tensor.data_ptr()
