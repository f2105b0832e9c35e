"""The preflight's decision: the most precise keys and values, layer by layer, that fit a budget of bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.core.errors import UsageError
from compress.core.knapsack import knapsack
from compress.core.quantities import parse_size
from kv_compress._statistics import Choice, Layer, choices
from kv_compress.policy import FULL, Coding, KVPolicy, LayerPolicy

MOST_BITS = 64


@dataclass(frozen=True, slots=True)
class Kept:
    """How one layer keeps its keys and its values."""

    keys: str = FULL
    values: str = FULL
    rotate: bool = False

    def policy(self, layer: Layer) -> LayerPolicy:
        """With the scales that fp8 has on this layer."""
        codings = []
        for codec, keys in ((self.keys, True), (self.values, False)):
            scale = (layer.scale(keys=keys),) if codec == "fp8" else ()
            codings.append(Coding(codec, self.rotate and codec != FULL, scale))
        return LayerPolicy(*codings)

    def error(self, layer: Layer) -> float:
        """What both cost attention's output, as a share of its energy."""
        return layer.key_errors[self._choice(self.keys)] + layer.value_errors[self._choice(self.values)]

    @property
    def words(self) -> str:
        """ "int8", "int8 / int4" (keys / values), "int4, rotated"."""
        both = self.keys if self.keys == self.values else f"{self.keys} / {self.values}"
        return f"{both}, rotated" if self.rotate else both

    @property
    def precision(self) -> str | dict[str, str]:
        """As a recipe writes it."""
        return self.keys if self.keys == self.values else {"keys": self.keys, "values": self.values}

    def _choice(self, codec: str) -> Choice:
        return codec, self.rotate and codec != FULL


def uniform(codec: str, layers: Sequence[Layer]) -> list[Kept]:
    """The same everywhere."""
    return [Kept(codec, codec)] * len(layers)


def policy_of(kept: Sequence[Kept], layers: Sequence[Layer]) -> KVPolicy:
    """The policy that the runtime obeys."""
    return KVPolicy(tuple(each.policy(layer) for each, layer in zip(kept, layers, strict=True)))


def token_bytes(kept: Sequence[Kept], layers: Sequence[Layer], itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers, scales included."""
    sizes = zip(policy_of(kept, layers).layers, layers, strict=True)
    return sum(policy.token_bytes(layer.heads, layer.width, itemsize) for policy, layer in sizes)


def numbers(layers: Sequence[Layer]) -> int:
    """Numbers in one token's keys and values."""
    return sum(2 * layer.heads * layer.width for layer in layers)


def budget_bytes(text: str, layers: Sequence[Layer]) -> float:
    """Bytes of a token: "5.5" is bits for each number, scales included; "4KiB" are bytes for a token."""
    try:
        bits = float(text)
    except ValueError:
        try:
            return parse_size(text)
        except ValueError as error:
            raise UsageError(f"a budget is bits for a number (5.5), or bytes for a token (4KiB): {error}") from None
    if not 0 < bits <= MOST_BITS:
        raise UsageError(f"a budget of {text} bits for a number is none: give 2 to 16, or bytes with their unit")
    return bits * numbers(layers) / 8


def choose(layers: Sequence[Layer], budget: float, itemsize: int) -> list[Kept]:
    """What loses least within the budget (exactly: HiGHS). UsageError where not even the smallest fits."""
    every = [_options(layer) for layer in layers]
    losses = [[kept.error(layer) for kept in options] for options, layer in zip(every, layers, strict=True)]
    sizes = [[token_bytes([kept], [layer], itemsize) for kept in of] for of, layer in zip(every, layers, strict=True)]
    least = sum(min(of) for of in sizes)
    found = knapsack(losses, sizes, budget) if least <= budget else None
    if found is None:
        bits = 8 * least / numbers(layers)
        raise UsageError(
            f"no choice of precisions fits: the smallest takes {least:,} bytes a token, {bits:.3g} bits a number",
            where="--budget",
        )
    return [options[number] for options, number in zip(every, found, strict=True)]


def fragment(kept: Sequence[Kept]) -> dict[str, Any]:
    """The kv_cache stage of a recipe that says the same: what most layers have, and what others have instead."""
    usual = Counter(kept).most_common(1)[0][0]
    others: dict[Kept, list[int]] = {}
    for index, each in enumerate(kept):
        if each != usual:
            others.setdefault(each, []).append(index)
    overrides = [
        {"layers": _ranges(indices), "precision": each.precision, "rotate": each.rotate}
        for each, indices in others.items()
    ]
    stage: dict[str, Any] = {"precision": usual.precision, "rotate": usual.rotate}
    return {"kv_cache": stage | ({"overrides": overrides} if overrides else {})}


def _options(layer: Layer) -> list[Kept]:
    """All pairs that a layer may have: both are rotated or neither is, and what is in full never is."""
    found = set()
    for keys, keys_turned in choices(layer.width):
        for values, values_turned in choices(layer.width):
            rotate = keys_turned or values_turned
            turned = (keys_turned or keys == FULL) and (values_turned or values == FULL)
            if not rotate or turned:
                found.add(Kept(keys, values, rotate))
    return sorted(found, key=lambda kept: (kept.keys, kept.values, kept.rotate))


def _ranges(indices: Sequence[int]) -> str:
    """[0, 3, 4, 5] as "0, 3-5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
