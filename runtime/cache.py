"""The keys and values of all sequences, in pages that the block pool hands out.

Shape suffixes: P pages, B slots of a page, G key-value heads, D channels of a head, C those or bytes of their codes. A
page id stands for the same range of tokens in every layer; layers may differ in heads, channels and codecs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compress.core.errors import ResourceError
from kv_compress._coding import code_dtype
from kv_compress.policy import CODECS, FULL, Coding, KVPolicy
from runtime.models.config import LayerConfig, ModelConfig
from runtime.ops.attention_tiled import UNITS, add_shares
from runtime.ops.batch import AttentionBatch
from runtime.ops.head_pages import split_layers
from runtime.ops.pages import Pages, turned


class KVCache:
    """`k[layer]`, `v[layer]`: [P, B, G, C]; what belongs to codes is in `layers()`. Keys are stored rotated; slots that
    were never written hold zeros. `policy`: how each layer keeps them; None: as they are, in `dtype`. `by_head`: layers
    lie one after another, so that any layer and head can use any piece of a page; UsageError where they differ.
    `attended[layer]` [P, B, G]: the attention that each slot got, in units of runtime.ops.attention_tiled; empty where
    the policy does not want it."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        policy: KVPolicy | None = None,
        *,
        by_head: bool = False,
    ) -> None:
        self.pages = pages
        self.block_size = block_size
        self.policy = policy_for(config, policy)
        try:
            if by_head:
                self._layers = _layers_by_head(config, self.policy, pages, block_size, dtype, device)
            else:
                self._layers = [
                    (
                        _pages(of.keys, layer, pages, block_size, dtype, device),
                        _pages(of.values, layer, pages, block_size, dtype, device),
                    )
                    for layer, of in zip(config.layers, self.policy.layers, strict=True)
                ]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            wanted = pages * page_bytes(config, block_size, dtype, policy)
            raise not_to_be_had(wanted, pages) from error
        self.frames = self.points = None  # all pages hold equally many tokens
        self.attended = [
            torch.zeros((pages, block_size, layer.kv_heads), dtype=torch.int64, device=device)
            for layer in (config.layers if self.policy.count_bytes else ())
        ]
        self.k = [k.codes for k, _ in self._layers]
        self.v = [v.codes for _, v in self._layers]

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in every layer; a source is read before any page is written."""
        if not copies:
            return
        sources = torch.tensor([source for source, _ in copies], device=self.k[0].device)
        targets = torch.tensor([target for _, target in copies], device=self.k[0].device)
        for tensor in self._tensors():
            tensor[targets] = tensor[sources]

    def read_slots(self, layer: int, slot_S: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 keys and values [S, G, D] of slots (page * B + offset), as attention sees them."""
        read = [(pages.read(slot_S).float(), pages.rotate) for pages in self._layers[layer]]
        k_SGD, v_SGD = (turned(x_SGD) if rotated else x_SGD for x_SGD, rotated in read)
        return k_SGD, v_SGD

    def move_slots(self, layer: int, source_NG: Tensor, target_N: Tensor) -> None:
        """Move each head's keys and values, codes as they are, from its slots to the slots `target_N`; all are read
        before one is written."""
        head_G = torch.arange(source_NG.shape[1], device=source_NG.device)
        for pages in self._layers[layer]:
            for tensor in pages.tensors():
                slots = tensor.flatten(0, 1)
                slots[target_N] = slots[source_NG, head_G]
        for tensor in self.attended[layer : layer + 1]:
            slots = tensor.flatten(0, 1)
            slots[target_N] = slots[source_NG, head_G]

    def add_attention(
        self, layer: int, q_THD: Tensor, batch: AttentionBatch, scale: float, window: int | None, softcap: float | None
    ) -> None:
        """Add what the queries of a batch attend to, whose keys are stored, to `attended`."""
        pages = self._layers[layer][0]
        q_THD = turned(q_THD) if pages.rotate else q_THD
        add_shares(self.attended[layer], q_THD, pages, batch, scale=scale, window=window, softcap=softcap)

    def read_attention(self, layer: int, slot_S: Tensor) -> Tensor | None:
        """The attention that slots got [S, G], in numbers of queries."""
        if not self.attended:
            return None
        return self.attended[layer].flatten(0, 1)[slot_S].double() / UNITS

    def layers(self) -> Iterator[tuple[Pages, Pages]]:
        """Keys and values of each layer."""
        return iter(self._layers)

    def of_layer(self, layer: int) -> tuple[Pages, Pages]:
        """Keys and values of one."""
        return self._layers[layer]

    def _tensors(self) -> Iterator[Tensor]:
        for k, v in self._layers:
            yield from k.tensors()
            yield from v.tensors()
        yield from self.attended


def not_to_be_had(wanted_bytes: int, pages: int) -> ResourceError:
    """What there is to say if a cache of so many pages finds no memory."""
    message = f"{wanted_bytes} bytes for {pages} pages of keys and values cannot be had"
    return ResourceError(message, hint="give the cache less memory")


def policy_for(config: ModelConfig, policy: KVPolicy | None) -> KVPolicy:
    """A policy that fits the model, "full" in all layers where there is none. InputError for one of another model."""
    policy = policy or KVPolicy.uniform(FULL, len(config.layers))
    policy.require_fits((layer.kv_heads, layer.head_dim) for layer in config.layers)
    return policy


def token_bytes(config: ModelConfig, dtype: torch.dtype, policy: KVPolicy | None = None) -> list[int]:
    """Bytes of one token in each layer."""
    policy = policy_for(config, policy)
    return [
        of.token_bytes(layer.kv_heads, layer.head_dim, dtype.itemsize) + policy.count_bytes * layer.kv_heads
        for layer, of in zip(config.layers, policy.layers, strict=True)
    ]


def page_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, policy: KVPolicy | None = None) -> int:
    """Bytes of one page over all layers; of a policy that codes whole pages, those of a page in full."""
    policy = None if policy is not None and policy.is_paged else policy
    return block_size * sum(token_bytes(config, dtype, policy))


def _pages(coding: Coding, layer: LayerConfig, pages: int, block_size: int, dtype: torch.dtype, device: str) -> Pages:
    """Pages of zeros."""
    shape = (pages, block_size, layer.kv_heads)
    if coding.codec == FULL:
        return Pages(torch.zeros((*shape, layer.head_dim), dtype=dtype, device=device))
    codec = CODECS[coding.codec]
    codes = torch.zeros((*shape, codec.code_bytes(layer.head_dim)), dtype=code_dtype(codec.name), device=device)
    numbers = torch.zeros((*shape, codec.numbers), dtype=torch.float16, device=device) if codec.numbers else None
    return Pages(codes, codec.name, numbers, _scale(coding, layer, device), coding.rotate)


def _scale(coding: Coding, layer: LayerConfig, device: str) -> Tensor | None:
    scale = torch.tensor(coding.scale, dtype=torch.float32, device=device)
    return scale.expand(layer.kv_heads).contiguous() if coding.scale else None


def _layers_by_head(
    config: ModelConfig, policy: KVPolicy, pages: int, block_size: int, dtype: torch.dtype, device: str
) -> list[tuple[Pages, Pages]]:
    """Keys and values of all layers in one allocation each."""
    first, count = config.layers[0], len(config.layers)
    policy.require_alike((layer.kv_heads, layer.head_dim) for layer in config.layers)
    both = []
    for codings in ([of.keys for of in policy.layers], [of.values for of in policy.layers]):
        whole = _pages(codings[0], first, count * pages, block_size, dtype, device)
        scales = [_scale(coding, first, device) for coding in codings]
        both.append(split_layers(whole, count, scales, [coding.rotate for coding in codings]))
    return list(zip(*both, strict=True))
