"""The preflight's decision: the most precise keys and values, layer by layer, that fit a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from compress.core.errors import UsageError
from compress.core.knapsack import knapsack
from compress.core.quantities import parse_size
from kv_compress._coded_pages import BLOCK, HALF_BYTES, RECENT, SINKS, CodingPoints
from kv_compress._kept import Kept, numbers, points_of, sequence_bytes, token_bytes
from kv_compress._statistics import Layer, choices
from kv_compress.policy import FULL

MOST_BITS = 64


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


def propose(layers: Sequence[Layer], budget: float, itemsize: int, context: int) -> list[list[Kept]]:
    """What fits: each token coded by itself, and whole pages, keys per channel, each as precise as can be. The one with
    the least sum of errors comes first. UsageError where neither fits."""
    paged = choose_paged(layers, budget, itemsize, context)
    try:
        found = [choose(layers, budget, itemsize)]
    except UsageError:
        if paged is None:
            raise
        found = []
    found += [] if paged is None else [paged]
    return sorted(found, key=lambda kept: total_error(kept, layers))


def total_error(kept: Sequence[Kept], layers: Sequence[Layer]) -> float:
    """The sum over the layers."""
    return sum(each.error(layer) for each, layer in zip(kept, layers, strict=True))


def choose(layers: Sequence[Layer], budget: float, itemsize: int) -> list[Kept]:
    """Of tokens that are coded by themselves, what loses least within the budget (exactly: HiGHS). UsageError where not
    even the smallest fits."""
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


def choose_paged(layers: Sequence[Layer], budget: float, itemsize: int, context: int) -> list[Kept] | None:
    """Of whole pages, keys per channel, what loses least within the budget, which is a token's share of a sequence of
    `context` tokens. None where nothing fits, where the text was too short to tell, or where no keys are better off.

    A page must hold so and so many tokens for that; the fewer they are, the more precise they can be, and what fits
    into a page is a sum over layers: each number of tokens is one exact choice (HiGHS).
    """
    every = [_paged_options(layer) for layer in layers]
    losses = [[kept.error(layer) for kept in options] for options, layer in zip(every, layers, strict=True)]
    room, sinks = BLOCK * numbers(layers) * itemsize, -(-SINKS // BLOCK) * BLOCK
    for tokens in (BLOCK * 3 // 2, *range(2 * BLOCK, room, BLOCK)) if all(every) else ():
        sizes = [_page_bytes(options, layer, tokens, itemsize) for options, layer in zip(every, layers, strict=True)]
        if sum(map(min, sizes)) > room:
            break
        points = CodingPoints(BLOCK, tokens, sinks, RECENT, "", 2 if tokens % BLOCK else 1)
        fits = sequence_bytes(points, layers, itemsize, context) <= budget
        found = knapsack(losses, sizes, room) if fits else None
        if found is not None:
            kept = [options[number] for options, number in zip(every, found, strict=True)]
            if _is_had(kept, layers, budget, itemsize, context):
                return kept
    return None


def _page_bytes(options: Sequence[Kept], layer: Layer, tokens: int, itemsize: int) -> list[int]:
    found = []
    for kept in options:
        policy = kept.policy(layer)
        sides = (policy.keys, policy.values)
        found.append(sum(side.page_bytes(tokens, layer.heads, layer.width, itemsize) for side in sides))
    return found


def _is_had(kept: Sequence[Kept], layers: Sequence[Layer], budget: float, itemsize: int, context: int) -> bool:
    """Whether some keys are per channel, whether the runtime takes it in either dtype, and whether it fits."""
    if not any(each.per_channel for each in kept):
        return False
    with suppress(UsageError):
        points_of(kept, layers, HALF_BYTES)
        return token_bytes(kept, layers, itemsize, context) <= budget
    return False


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


def _paged_options(layer: Layer) -> list[Kept]:
    pairs = ((keys, values) for keys in sorted(layer.paged_key_errors) for values in sorted(layer.paged_value_errors))
    return [Kept(keys, values, paged=True) for keys, values in pairs]
