"""How single layers keep their keys and values, as the preflight weighs it: their policy, bytes, error and stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from compress.core.errors import UsageError
from kv_compress._coded_pages import BLOCK, RECENT, SINKS, CodingPoints
from kv_compress._statistics import Choice, Layer, paged_coding
from kv_compress.policy import FULL, PER_CHANNEL, Coding, KVPolicy, LayerPolicy


@dataclass(frozen=True, slots=True)
class Kept:
    """How one layer keeps its keys and its values. `paged`: as all layers of its model, page by page, int8 and int4
    keys per channel, the first and latest tokens in full."""

    keys: str = FULL
    values: str = FULL
    rotate: bool = False
    paged: bool = False

    def policy(self, layer: Layer) -> LayerPolicy:
        """With the scales that fp8 has on this layer."""
        codings = []
        for codec, keys in ((self.keys, True), (self.values, False)):
            scale = (layer.scale(keys=keys),) if codec == "fp8" else ()
            alone = Coding(codec, self.rotate and codec != FULL, scale)
            codings.append(paged_coding(codec, layer, keys=keys) if self.paged else alone)
        return LayerPolicy(*codings)

    def error(self, layer: Layer) -> float:
        """What both cost attention's output, as a share of its energy."""
        if self.paged:
            return layer.paged_key_errors[self.keys] + layer.paged_value_errors[self.values]
        return layer.key_errors[self._choice(self.keys)] + layer.value_errors[self._choice(self.values)]

    @property
    def per_channel(self) -> bool:
        """Whether keys are coded per channel."""
        return self.paged and self.keys in PER_CHANNEL

    @property
    def words(self) -> str:
        """ "int8", "int8 / int4" (keys / values), "int4, rotated", "int4, keys per channel"."""
        both = self.keys if self.keys == self.values else f"{self.keys} / {self.values}"
        both += ", rotated" if self.rotate else ""
        return f"{both}, keys per channel" if self.per_channel else both

    @property
    def precision(self) -> str | dict[str, str]:
        """As a recipe writes it."""
        return self.keys if self.keys == self.values else {"keys": self.keys, "values": self.values}

    def _choice(self, codec: str) -> Choice:
        return codec, self.rotate and codec != FULL


def uniform(codec: str, layers: Sequence[Layer], *, paged: bool = False) -> list[Kept]:
    """The same everywhere."""
    return [Kept(codec, codec, paged=paged)] * len(layers)


def policy_of(kept: Sequence[Kept], layers: Sequence[Layer]) -> KVPolicy:
    """The policy that the runtime obeys."""
    each = tuple(kept.policy(layer) for kept, layer in zip(kept, layers, strict=True))
    return KVPolicy(each, None, SINKS, RECENT) if any(of.paged for of in kept) else KVPolicy(each)


def usual_points(sizes: Sequence[tuple[int, int]], itemsize: int) -> CodingPoints | None:
    """Where pages of int4 are coded, keys per channel, which are the largest there are; None where heads have an odd
    number of channels, or so few that pages hold no more than in full."""
    if any(width % 2 for _, width in sizes):
        return None
    policy = KVPolicy.uniform("int4", len(sizes), keys="channel", sinks=SINKS, recent=RECENT)
    with suppress(UsageError):
        return policy.coding_points(sizes, itemsize, BLOCK)
    return None


def points_of(kept: Sequence[Kept], layers: Sequence[Layer], itemsize: int) -> CodingPoints | None:
    """Where pages are coded, None where they are not. UsageError if they would hold no more tokens than in full."""
    policy = policy_of(kept, layers)
    return policy.coding_points(sizes_of(layers), itemsize, BLOCK) if policy.is_paged else None


def token_bytes(kept: Sequence[Kept], layers: Sequence[Layer], itemsize: int, context: int | None = None) -> int:
    """Bytes of one token's keys and values in all layers, scales included. Where pages are coded: of one in a coded
    page, or with `context` the share of one in what a sequence of so many tokens takes, full pages too."""
    points = points_of(kept, layers, itemsize)
    if points is not None and context is not None:
        return sequence_bytes(points, layers, itemsize, context)
    return policy_of(kept, layers).token_bytes(sizes_of(layers), itemsize, BLOCK)


def sequence_bytes(points: CodingPoints, layers: Sequence[Layer], itemsize: int, context: int) -> int:
    """A token's share, rounded up, of the pages that a sequence of `context` tokens has at the most."""
    pages = -(-points.peak(0, 0, context, context) // BLOCK)
    return -(-pages * BLOCK * numbers(layers) * itemsize // context)


def sizes_of(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Heads and their width."""
    return [(layer.heads, layer.width) for layer in layers]


def numbers(layers: Sequence[Layer]) -> int:
    """Numbers in one token's keys and values."""
    return sum(2 * heads * width for heads, width in sizes_of(layers))


def fragment(kept: Sequence[Kept]) -> dict[str, Any]:
    """The kv_cache stage of a recipe that says the same: what most layers have, and what others have instead."""
    usual = Counter(kept).most_common(1)[0][0]
    others: dict[Kept, list[int]] = {}
    for index, each in enumerate(kept):
        if each != usual:
            others.setdefault(each, []).append(index)
    turned = any(each.rotate for each in kept)
    overrides = [
        {"layers": _ranges(indices), "precision": each.precision} | ({"rotate": each.rotate} if turned else {})
        for each, indices in others.items()
    ]
    window = {"keys": "channel", "sinks": SINKS, "recent": RECENT} if usual.paged else {}
    stage = {"precision": usual.precision} | ({"rotate": usual.rotate} if turned else {}) | window
    return {"kv_cache": stage | ({"overrides": overrides} if overrides else {})}


def _ranges(indices: Sequence[int]) -> str:
    """[0, 3, 4, 5] as "0, 3-5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
