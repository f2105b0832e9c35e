"""A model folder -> a Decoder with its weights: config.json and safetensors, nothing else, and no transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from compress.core.numerics import Numerics, runtime_dtype
from kv_compress.policy import KVPolicy
from runtime._weights import Part, Weights
from runtime.kv_policy import policy_of, scales_of
from runtime.layers.attention import Attention
from runtime.layers.embedding import Embedding
from runtime.layers.experts import MixtureOfExperts
from runtime.layers.mlp import MLP, activation_of
from runtime.layers.sparse import Packer, Sparse
from runtime.models.config import LayerConfig
from runtime.models.decoder import Block, Decoder
from runtime.models.reading import read

_SEPARATE = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")


def load(
    model: str | Path | Checkpoint,
    *,
    numerics: Numerics,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    sparse: Sparse = "auto",
    kv_cache: KVPolicy | str | None = None,
) -> Decoder:
    """The model in a folder, or of a checkpoint that is open, ready to run. `dtype` is that of activations and dense
    weights in fast numerics.

    `sparse` auto: where the config says that zeros were chosen, layers are packed if that is faster; off: never.
    `kv_cache`: how keys and values are kept, a policy or a codec for all layers; None: as the model says, which is in
    full if it says nothing.

    InputError names the setting that is not understood, or the tensor that is missing, misshapen or has no place.
    """
    dtype = runtime_dtype(numerics, device, dtype)
    if sparse not in ("auto", "off"):
        raise UsageError(f"sparse is auto or off, not {sparse!r}")
    checkpoint = model if isinstance(model, Checkpoint) else _opened(Path(model))
    config = read(checkpoint.config, str(checkpoint.folder / "config.json"))
    packs = sparse == "auto" and numerics == "fast" and checkpoint.kind == "masked"
    weights = Weights(checkpoint, config, numerics, dtype, device, Packer() if packs else None)
    names = checkpoint.architecture
    embedding_VD = weights.embedding().to(device)
    blocks, layers = [], []
    for index, layer in enumerate(config.layers):
        block, layer = _block(weights, checkpoint.block_name(index), layer)
        blocks.append(block)
        layers.append(layer)
    norm, head = weights.norm(names.final_norm), weights.head(embedding_VD)
    weights.finish(scales_of(checkpoint))
    return Decoder(
        replace(config, layers=tuple(layers)),
        Embedding(embedding_VD, dtype, config.embedding_scale),
        blocks,
        norm,
        head,
        numerics=numerics,
        dtype=dtype,
        device=device,
        kv_policy=policy_of(checkpoint, [(layer.kv_heads, layer.head_dim) for layer in layers], kv_cache),
    ).eval()


def _opened(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder))
    return Checkpoint.open(folder)


def _block(weights: Weights, name: str, layer: LayerConfig) -> tuple[Block, LayerConfig]:
    """A decoder layer, and its sizes as found."""
    attention, layer = _attention(weights, f"{name}.self_attn", layer)
    if layer.experts is None:
        ffn, width = _mlp(weights, f"{name}.mlp", _FUSED if _is_fused(weights) else _SEPARATE)
        layer = replace(layer, ffn=width)
    else:
        ffn, layer = _experts(weights, name, layer)
    before = weights.norm(f"{name}.input_layernorm")
    between = weights.norm(f"{name}.post_attention_layernorm")
    if not weights.config.sandwich_norms:
        return Block(before, attention, between, ffn), layer
    before_ffn = weights.norm(f"{name}.pre_feedforward_layernorm")
    after_ffn = weights.norm(f"{name}.post_feedforward_layernorm")
    return Block(before, attention, before_ffn, ffn, after_attention=between, after_ffn=after_ffn), layer


def _attention(weights: Weights, name: str, layer: LayerConfig) -> tuple[Attention, LayerConfig]:
    """Attention with as many heads as the weights have: a pruned layer has fewer than the config says."""
    config = weights.config
    output = weights.part(f"{name}.o_proj", rows=config.hidden, bias=config.o_bias)
    queries = output.columns
    if _is_fused(weights):
        parts = [weights.part(f"{name}.qkv_proj", columns=config.hidden, bias=config.qkv_bias)]
        keys = (parts[0].rows - queries) // 2
    else:
        query = weights.part(f"{name}.q_proj", rows=queries, columns=config.hidden, bias=config.qkv_bias)
        key = weights.part(f"{name}.k_proj", columns=config.hidden, bias=config.qkv_bias)
        value = weights.part(f"{name}.v_proj", rows=key.rows, columns=config.hidden, bias=config.qkv_bias)
        parts, keys = [query, key, value], key.rows
    layer = _with_heads(weights, parts, layer, queries, keys)
    attention = Attention(
        layer,
        weights.merged(parts, [queries, keys, keys]),
        weights.linear(output),
        q_norm=weights.norm(f"{name}.q_norm", layer.head_dim) if config.qk_norm else None,
        k_norm=weights.norm(f"{name}.k_norm", layer.head_dim) if config.qk_norm else None,
        softcap=config.attention_softcap,
        exact=weights.numerics == "exact",
    )
    return attention, layer


def _with_heads(weights: Weights, parts: list[Part], layer: LayerConfig, queries: int, keys: int) -> LayerConfig:
    width = layer.head_dim
    heads, kv_heads = queries // width, keys // width
    whole = sum(part.rows for part in parts) == (heads + 2 * kv_heads) * width and heads * width == queries
    if not whole or kv_heads < 1 or heads % kv_heads:
        wanted = f"whole heads of {width}, as many queries to each key-value head, beside {queries} of o_proj"
        raise weights.misfit(f"{parts[0].module}.weight", parts[0].weight, wanted)
    return replace(layer, heads=heads, kv_heads=kv_heads)


def _mlp(weights: Weights, name: str, names: tuple[str, ...]) -> tuple[MLP, int]:
    """A feed-forward as wide as its weights, and that width. `names` are gate and up, or both as one; last is down."""
    config = weights.config
    *inner, last = names
    down = weights.part(f"{name}.{last}", rows=config.hidden, bias=config.mlp_bias)
    width = down.columns
    rows = 2 * width // len(inner)
    parts = [weights.part(f"{name}.{kind}", rows=rows, columns=config.hidden, bias=config.mlp_bias) for kind in inner]
    activation = activation_of(config.activation, exact=weights.numerics == "exact")
    return MLP(weights.merged(parts, [width, width]), weights.linear(down), activation), width


def _experts(weights: Weights, block: str, layer: LayerConfig) -> tuple[MixtureOfExperts, LayerConfig]:
    """As many experts as the router has rows; they may differ in width."""
    names = weights.checkpoint.architecture.experts
    if names is None or layer.experts is None:
        raise InputError(f"the family {weights.config.family!r} has no experts", where=block)
    router = weights.part(f"{block}.{names.router}", columns=weights.config.hidden)
    settings = replace(layer.experts, count=router.rows)
    if settings.active > settings.count:
        raise weights.misfit(f"{router.module}.weight", router.weight, f"a row for each of {settings.active} experts")
    kinds = (names.gate, names.up, names.down)
    experts = [_mlp(weights, f"{block}.{names.on_disk}.{index}", kinds) for index in range(settings.count)]
    layer = replace(layer, ffn=max(width for _, width in experts), experts=settings)
    return MixtureOfExperts(settings, weights.linear(router), [expert for expert, _ in experts]), layer


def _is_fused(weights: Weights) -> bool:
    """Whether q, k, v are one tensor on disk, and gate, up another."""
    return any("self_attn.qkv_proj" in group.sites for group in weights.checkpoint.architecture.groups)
