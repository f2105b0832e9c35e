"""How large keys and values become on calibration text, which fp8 scales follow from; and what a stage writes.

Keys are looked at before they are rotated by their position: rotation turns pairs of channels, so that the length of a
pair bounds both of its channels at any position, also at those that the text does not reach.

Shape suffixes: N tokens, G key-value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.core.checkpoint import Checkpoint
from compress.core.kv_scheme import scale_names, with_scheme
from compress.core.model_files import KV_CACHE_KEY
from compress.core.passes import Job
from compress.core.sizes import sizes_of
from compress.core.walk import Block, See
from kv_compress.fp8 import scale_for
from kv_compress.policy import Coding, KVPolicy, LayerPolicy

_STRETCHED = ("yarn", "longrope", "su")  # rotary kinds that make keys longer, by less than twice


def head_sizes(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Key-value heads of each layer, as many as its weights have, and their width."""
    width = sizes_of(checkpoint.config)["head_dim"]
    found = []
    for index in range(checkpoint.num_blocks):
        rows = {name.rpartition(".")[2]: checkpoint.matrix_shape(name) for name in checkpoint.sites(index)}
        fused = "qkv_proj" in rows
        keys = (rows["qkv_proj"][0] - rows["o_proj"][1]) // 2 if fused else rows["k_proj"][0]
        found.append((keys // width, width))
    return found


def query_heads(checkpoint: Checkpoint) -> list[int]:
    """Query heads of each layer, as many as its weights have."""
    width = sizes_of(checkpoint.config)["head_dim"]
    return [
        checkpoint.matrix_shape(name)[1] // width
        for index in range(checkpoint.num_blocks)
        for name in checkpoint.sites(index)
        if name.endswith(".o_proj")
    ]


def scaled(policy: KVPolicy, job: Job, per_head: bool) -> KVPolicy:
    """The policy with fp8 scales that the calibration text asks for."""
    ranges = _Ranges(job.checkpoint)
    layers = []
    for block in job.measure(watch=ranges.watch):
        layer = policy.layers[block.index]
        codings = [
            _with_scale(coding, ranges.largest(kind), per_head)
            for coding, kind in ((layer.keys, "keys"), (layer.values, "values"))
        ]
        layers.append(LayerPolicy(*codings))
    return replace(policy, layers=tuple(layers))


def write(policy: KVPolicy, job: Job) -> None:
    """Put the policy into config.json, and what vLLM reads of it beside the weights."""
    scales: dict[str, Tensor] = {}
    if policy.is_scheme:
        for index, layer in enumerate(policy.layers):
            names = scale_names(job.checkpoint.block_name(index))
            codings = (layer.keys, layer.values)
            scales |= {name: torch.tensor(of.scale) for name, of in zip(names, codings, strict=True)}
    entries = {KV_CACHE_KEY: policy.to_json()}
    job.sink.add(lambda config: {**(with_scheme(config) if scales else config), **entries}, scales)


def _with_scale(coding: Coding, largest_G2: Tensor, per_head: bool) -> Coding:
    if coding.codec != "fp8":
        return coding
    largest_G = largest_G2[:, 1 if coding.rotate else 0]  # a rotated channel is at most as large as its row is long
    numbers = largest_G.tolist() if per_head else [float(largest_G.max())]
    return replace(coding, scale=tuple(scale_for(number) for number in numbers))


class _Ranges:
    """Of one block at a time: for each head the largest number of keys and of values, and the longest row."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self._width = sizes_of(config)["head_dim"]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        self._rotated = int(self._width * share)
        self._stretch = 2.0 if rope.get("rope_type", rope.get("type")) in _STRETCHED else 1.0
        self._found: dict[str, Tensor] = {}

    def watch(self, block: Block) -> Iterator[tuple[nn.Module, See]]:
        """The modules that keys and values come from."""
        self._found = {}
        modules = {site.name.rpartition(".")[2]: site.module for group in block.groups for site in group.sites}
        norm = dict(block.module.named_modules()).get("self_attn.k_norm")
        if "qkv_proj" in modules:
            queries = modules["o_proj"].in_features
            yield modules["qkv_proj"], lambda x, y, _: self._see_both(y[:, queries:], norm)
        else:
            yield modules["k_proj"], lambda x, y, _: self._see_keys(y, norm)
            yield modules["v_proj"], lambda x, y, _: self._see("values", self._heads(y).abs(), self._heads(y))

    def largest(self, kind: str) -> Tensor:
        """Of each head [G, 2]: the largest number, and the longest row."""
        return self._found[kind]

    def _see_both(self, y: Tensor, norm: nn.Module | None) -> None:
        keys, values = y.chunk(2, 1)
        self._see_keys(keys, norm)
        self._see("values", self._heads(values).abs(), self._heads(values))

    def _see_keys(self, y: Tensor, norm: nn.Module | None) -> None:
        k_NGD = self._heads(y) if norm is None else norm(self._heads(y)).float()
        k_NGD = k_NGD * self._stretch
        pairs = k_NGD[..., : self._rotated].unflatten(-1, (2, -1)).norm(dim=-2)
        self._see("keys", torch.cat([k_NGD[..., self._rotated :].abs(), pairs], -1), k_NGD)

    def _see(self, kind: str, channels: Tensor, x_NGD: Tensor) -> None:
        largest_G2 = torch.stack([channels.amax((0, 2)), x_NGD.norm(dim=-1).amax(0)], -1).cpu()
        before = self._found.get(kind)
        self._found[kind] = largest_G2 if before is None else torch.maximum(before, largest_G2)

    def _heads(self, y: Tensor) -> Tensor:
        return y.detach().float().reshape(len(y), -1, self._width)
