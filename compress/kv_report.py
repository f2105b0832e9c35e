"""What keys and values of a model take: by layer, by codec and by the share that is kept, and what fits into a memory.

Plain arithmetic over the shapes of the weights: the very bytes that the runtime allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.model_files import KV_CACHE_KEY
from compress.core.numerics import dtype_name
from kv_compress._budget import Points
from kv_compress._coded_pages import RECENT, SINKS
from kv_compress._evicted import at_once, held, longest
from kv_compress._ranges import head_sizes, query_heads
from kv_compress.eviction import eviction_of
from kv_compress.policy import CODECS, FULL, Coding, KVPolicy
from runtime.kv_policy import blaming, policy_of
from runtime.models.reading import read

if TYPE_CHECKING:
    import torch

SHARES = (1.0, 0.5, 0.25, 0.125)
PER_CHANNEL = "int4, keys per channel"
OWN = "as the artifact says"


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """One layer: its heads, their width, and the bytes of a token under the model's own policy and in full."""

    index: int
    heads: int
    kv_heads: int
    width: int
    keys: str
    values: str
    bytes: int
    full_bytes: int


@dataclass(frozen=True, slots=True)
class Fits:
    """One way to keep keys and values: bytes of a token and of a page, and what the memory holds of them if this share
    of the tokens is kept. Pages are whole. `longest`: None where eviction lets a sequence go on without end."""

    name: str
    share: float
    token_bytes: int
    page_bytes: int
    tokens: int
    sequences: int
    longest: int | None


@dataclass(frozen=True)
class KVReport:
    """`full_dtype`: what numbers are held in where they are kept in full; `ungrouped_bytes`: of a token in full if
    every query head had a key and a value of its own."""

    full_dtype: str
    layers: tuple[LayerBytes, ...]
    full_bytes: int
    ungrouped_bytes: int
    ways: tuple[Fits, ...]


def kv_report(
    folder: str | Path | Checkpoint,
    *,
    memory_bytes: int,
    context: int,
    dtype: torch.dtype,
    block_size: int = 16,
    shares: Sequence[float] = SHARES,
) -> KVReport:
    """Of a model folder. `dtype`: of a number that is kept in full (compress.core.numerics says which one the runtime
    takes); `context`: tokens of a sequence. InputError for a policy of its own that the runtime refuses."""
    if min(context, block_size, memory_bytes) < 1:
        raise UsageError("memory, context and pages must be at least 1")
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint.open(folder)
    sizes, queries, itemsize = head_sizes(checkpoint), query_heads(checkpoint), dtype.itemsize
    own = policy_of(checkpoint, sizes)
    points = None if own is None else _points(checkpoint, own, sizes, itemsize, block_size)
    full = KVPolicy.uniform(FULL, len(sizes))
    policies = {FULL: full} | {name: KVPolicy.uniform(name, len(sizes)) for name in CODECS}
    policies[PER_CHANNEL] = KVPolicy.uniform("int4", len(sizes), keys="channel", sinks=SINKS, recent=RECENT)
    if own is not None:
        policies[f"{OWN}: {_words(own)}"] = own
    kept = own or full
    layers = tuple(
        LayerBytes(index, query, heads, width, _said(of.keys), _said(of.values),
                   of.token_bytes(heads, width, itemsize) + kept.count_bytes * heads,
                   plain.token_bytes(heads, width, itemsize))
        for index, (query, (heads, width), of, plain) in enumerate(
            zip(queries, sizes, kept.layers, full.layers, strict=True)
        )
    )  # fmt: skip
    ways = []
    for name, policy in policies.items():
        if policy.is_paged:
            ways += _paged(name, policy, sizes, memory_bytes, context, itemsize, block_size)
            continue
        size = policy.token_bytes(sizes, itemsize, block_size)
        pages = memory_bytes // (size * block_size)
        if policy is own and points is not None:
            ways.append(_evicting(name, points, size, pages, context, block_size))
            continue
        for share in shares:
            needed = -(-max(1, int(context * share)) // block_size)
            longest = int(pages * block_size / share)
            ways.append(Fits(name, share, size, size * block_size, pages * block_size, pages // needed, longest))
    ungrouped = sum(2 * query * width * itemsize for query, (_, width) in zip(queries, sizes, strict=True))
    return KVReport(dtype_name(dtype), layers, sum(layer.full_bytes for layer in layers), ungrouped, tuple(ways))


def _points(
    checkpoint: Checkpoint, own: KVPolicy, sizes: list[tuple[int, int]], itemsize: int, block_size: int
) -> Points | None:
    """Where the model's own policy evicts, None where it does not. InputError for one that no pool can obey."""
    folder = checkpoint.folder
    if own.is_paged:
        with blaming(folder, "layers", own=True):
            own.coding_points(sizes, itemsize, block_size)
    eviction = eviction_of(own, f"{folder / 'config.json'}: {KV_CACHE_KEY}")
    if eviction is None:
        return None
    if eviction.is_unequal:
        with blaming(folder, "eviction.method", own=True):
            own.require_alike(sizes)
    with blaming(folder, "eviction.recent", own=True):
        layers = read(checkpoint.config, str(folder / "config.json")).layers
        eviction.require_windows(layer.window for layer in layers)
    with blaming(folder, "eviction.budget", own=True):
        points = eviction.points(own.token_bytes(sizes, itemsize, block_size), len(sizes), sizes[0][0])
    return replace(points, spread=block_size - 1) if eviction.is_unequal else points


def _evicting(name: str, points: Points, size: int, pages: int, context: int, block_size: int) -> Fits:
    """Sequences are prompts of `context` tokens, of which the policy's points leave what they leave."""
    share = min(1.0, held(points, context) / context)
    fit, end = at_once(points, context, pages, block_size), longest(points, pages, block_size)
    return Fits(name, share, size, size * block_size, pages * block_size, fit, end)


def _words(policy: KVPolicy) -> str:
    """ "int8", "int8 or int4" where layers differ, "int4, keys per channel", "int8, snapkv 25%"."""
    per_channel = any(layer.keys.per == "channel" for layer in policy.layers)
    eviction = eviction_of(policy)
    evicting = "" if eviction is None else f", {eviction.words}"
    return " or ".join(policy.codecs) + (", keys per channel" if per_channel else "") + evicting


def _said(coding: Coding) -> str:
    return coding.codec if coding.per == "token" else f"{coding.codec} per channel"


def _paged(
    name: str,
    policy: KVPolicy,
    sizes: list[tuple[int, int]],
    memory_bytes: int,
    context: int,
    itemsize: int,
    block_size: int,
) -> list[Fits]:
    """Where pages are coded: a page has the bytes that it has in full, and a sequence takes some full ones and some
    coded ones. None where a coded page would hold no more than a full one."""
    try:
        points = policy.coding_points(sizes, itemsize, block_size)
    except UsageError:
        return []
    page_bytes = block_size * KVPolicy.uniform(FULL, len(sizes)).token_bytes(sizes, itemsize, block_size)
    pages = memory_bytes // page_bytes
    longest = points.longest(pages)
    needed = -(-points.peak(0, 0, context, context) // block_size)
    size = policy.token_bytes(sizes, itemsize, block_size)
    return [Fits(name, 1.0, size, page_bytes, longest, pages // needed, longest)]
