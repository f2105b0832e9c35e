"""The preflight's decision: the most precise keys and values, layer by layer, that fit a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from compress.core.errors import UsageError
from compress.core.knapsack import knapsack
from compress.core.quantities import parse_size
from kv_compress._coded_pages import BLOCK, HALF_BYTES, RECENT, SINKS, CodingPoints
from kv_compress._kept import Kept, numbers, points_of, sequence_bytes, sizes_of, token_bytes, usual_points
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


def require_had(budget: float, layers: Sequence[Layer], itemsize: int, context: int, *, paged: bool) -> None:
    """UsageError for a budget that nothing fits, as far as the sizes of the layers tell. `paged`: whether keys per
    channel are a choice, too."""
    least = _least(layers, itemsize)
    points = usual_points(sizes_of(layers), itemsize) if paged else None
    for tokens in () if points is None else _page_tokens(points.page_tokens + 1):
        least = min(least, sequence_bytes(_points(tokens), layers, itemsize, context))
    if least > budget:
        raise _nothing_fits(layers, itemsize, context)


def propose(layers: Sequence[Layer], budget: float, itemsize: int, context: int) -> list[list[Kept]]:
    """What fits: each token coded by itself, and whole pages, keys per channel, each as precise as can be. The one with
    the least sum of errors comes first. UsageError where neither fits."""
    paged = choose_paged(layers, budget, itemsize, context)
    try:
        found = [choose(layers, budget, itemsize)]
    except UsageError:
        if paged is None:
            raise _nothing_fits(layers, itemsize, context) from None
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
    sizes = [_token_bytes(of, layer, itemsize) for of, layer in zip(every, layers, strict=True)]
    found = knapsack(losses, sizes, budget) if _least(layers, itemsize) <= budget else None
    if found is None:
        raise _nothing_fits(layers, itemsize)
    return [options[number] for options, number in zip(every, found, strict=True)]


def choose_paged(layers: Sequence[Layer], budget: float, itemsize: int, context: int) -> list[Kept] | None:
    """Of whole pages, keys per channel, what loses least within the budget, which is a token's share of a sequence of
    `context` tokens. None where nothing fits, where the text was too short to tell, or where no keys are better off.

    A page must hold so and so many tokens for that; the fewer they are, the more precise they can be, and what fits
    into a page is a sum over layers: each number of tokens is one exact choice (HiGHS).
    """
    every = [_paged_options(layer) for layer in layers]
    losses = [[kept.error(layer) for kept in options] for options, layer in zip(every, layers, strict=True)]
    room = BLOCK * numbers(layers) * itemsize
    for tokens in _page_tokens(room) if all(every) else ():
        sizes = [_page_bytes(options, layer, tokens, itemsize) for options, layer in zip(every, layers, strict=True)]
        if sum(map(min, sizes)) > room:
            break
        fits = sequence_bytes(_points(tokens), layers, itemsize, context) <= budget
        found = knapsack(losses, sizes, room) if fits else None
        if found is not None:
            kept = [options[number] for options, number in zip(every, found, strict=True)]
            if _is_had(kept, layers, budget, itemsize, context):
                return kept
    return None


def _nothing_fits(layers: Sequence[Layer], itemsize: int, context: int | None = None) -> UsageError:
    """Names the smallest that is coded token by token and, for sequences of `context` tokens, what is in pages."""
    return UsageError(
        f"no choice of precisions fits: the smallest takes {_sized(_least(layers, itemsize), layers)}",
        where="--budget",
        hint=None if context is None else _in_pages(layers, itemsize, context),
    )


def _in_pages(layers: Sequence[Layer], itemsize: int, context: int) -> str | None:
    """What int4 takes with keys per channel, which is less in longer sequences; None where no pages can be had."""
    points = usual_points(sizes_of(layers), itemsize)
    if points is None:
        return None
    now = _sized(sequence_bytes(points, layers, itemsize, context), layers)
    end = _sized(-(-BLOCK * numbers(layers) * itemsize // points.page_tokens), layers)
    return (
        f"int4 with keys per channel takes {now} in sequences of {context:,} tokens, and down to {end} with a longer "
        "--context"
    )


def _sized(size: int, layers: Sequence[Layer]) -> str:
    return f"{size:,} bytes a token, {8 * size / numbers(layers):.3g} bits a number"


def _least(layers: Sequence[Layer], itemsize: int) -> int:
    """The fewest bytes of a token that is coded by itself."""
    return sum(min(_token_bytes(_options(layer), layer, itemsize)) for layer in layers)


def _token_bytes(options: Sequence[Kept], layer: Layer, itemsize: int) -> list[int]:
    return [token_bytes([kept], [layer], itemsize) for kept in options]


def _page_tokens(end: int) -> tuple[int, ...]:
    """How many tokens a coded page may hold, fewer than `end`."""
    return (BLOCK * 3 // 2, *range(2 * BLOCK, end, BLOCK))


def _points(tokens: int) -> CodingPoints:
    """Where pages of so many tokens are coded."""
    return CodingPoints(BLOCK, tokens, -(-SINKS // BLOCK) * BLOCK, RECENT, "", 2 if tokens % BLOCK else 1)


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
