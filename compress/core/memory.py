"""What a calibrated walk will hold and take, from headers and shapes alone: peak RAM, spilled bytes, minutes.

Memory is what the process holds itself (RssAnon): files that are mapped are the system's to drop. Minutes come from
counting operations and from a probe of a fraction of a second that measures this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint

IMPORTS_BYTES = 330 << 20  # Python with torch, transformers and this package, after the first forward
GRID_CANDIDATES = 24  # spans that fit_grid tries
GRID_PASSES = 7  # passes over the weights for each of them
FORWARD_EFFICIENCY = 0.65  # of the probed product, with attention, norms and narrow layers in it
START_SECONDS = 1.5  # tokenizer, skeleton, first touch of everything
IMPORT_SECONDS = 2.5  # transformers; where there are tokens, their tokenizer brought it before the clock started
BLOCK_SECONDS = 0.25  # an empty block, its shard, fsync, the journal
COLUMN_SECONDS = 15e-6  # what one column of a sweep costs beside its arithmetic
ROUNDING_BYTES = 32 * (4 << 20)  # of one piece of a layer while it is rounded to nearest: search, quotients, codes
SENSED_CHOICES = 6  # schemes whose rounding is judged for each layer
GAPS_BYTES = 48 << 20  # freed between what is held, and not given back
CODES_BYTES = 1  # of each weight: what a block was replaced by, and what of it is being written
SOLVER_BYTES = 5 * (32 << 20)  # of one chunk of rows: weights, errors, codes and the search for scales
SPILL_ABOVE_BYTES = 16 << 20  # activations of all samples that are kept in a file from this size on


@dataclass(frozen=True, slots=True)
class Cost:
    """Peak anonymous memory and spilled activations in bytes; wall time in minutes."""

    memory_bytes: int
    spill_bytes: int
    minutes: float


@dataclass(frozen=True, slots=True)
class Speed:
    """This machine: fp32 matrix product in operations a second, passes over cached floats in elements a second."""

    matmul: float
    elements: float


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one input: `rows` output channels in all, `width` input channels, reached by `share` of the tokens."""

    rows: int
    width: int
    share: float


def estimate(checkpoint: Checkpoint, tokens: Tokens | None, *, true_sequential: bool = False) -> Cost:
    """Cost of quantizing every block of `checkpoint`, calibrated on `tokens` (None: no forward passes)."""
    from compress.core._gather import WAVE_BYTES
    from compress.core._skeleton import KEPT_CASTS_BYTES

    blocks = [groups_of(checkpoint, index) for index in range(checkpoint.num_blocks)]
    largest = max(blocks, key=lambda groups: sum(group.rows * group.width for group in groups))
    weights = sum(group.rows * group.width for group in largest)
    held = IMPORTS_BYTES + GAPS_BYTES + weights * (checkpoint.dtype.itemsize + CODES_BYTES)
    count = 0 if tokens is None else tokens.ids.numel()
    stream_bytes = count * checkpoint.config["hidden_size"] * checkpoint.dtype.itemsize
    spilled = stream_bytes > SPILL_ABOVE_BYTES
    if tokens is None:
        held += ROUNDING_BYTES
    else:
        squares = [4 * group.width**2 for group in largest]
        widest = max(largest, key=lambda group: group.width)
        at_once = [g for g in largest if g.share < 1 and g.width == widest.width] if true_sequential else largest
        statistics = max(max(squares), min(WAVE_BYTES, sum(4 * group.width**2 for group in at_once)))
        passing = 4 * _at_once(tokens) * (2 * max(group.width for group in largest) + max(g.rows for g in largest))
        chunk = min(SOLVER_BYTES, 10 * max(group.rows * group.width for group in largest))
        held += (
            KEPT_CASTS_BYTES
            + (0 if spilled else 2 * stream_bytes)
            + statistics
            + max(passing, chunk, max(squares) // 2)
        )
    played = [4 * count * width for width in _played_widths(checkpoint)] if true_sequential else []
    held += sum(size for size in played if size <= SPILL_ABOVE_BYTES)
    spill_bytes = 2 * stream_bytes * spilled + sum(size for size in played if size > SPILL_ABOVE_BYTES)
    speed = machine_speed()
    start = START_SECONDS + (IMPORT_SECONDS if tokens is None else 0)
    seconds = start + sum(_seconds(groups, count, speed, true_sequential) for groups in blocks)
    return Cost(held, spill_bytes, seconds / 60)


def reading_cost(checkpoint: Checkpoint, tokens: Tokens | None, *, blocks: int, heads: int, beside_bytes: int) -> Cost:
    """Cost of `blocks` forwards of one block each over `tokens`, of the head behind `heads` of them, and of writing
    every block. `beside_bytes` are held beside the hidden states."""
    from compress.core._forward import LOGITS_BYTES
    from compress.core._skeleton import KEPT_CASTS_BYTES

    every = [groups_of(checkpoint, index) for index in range(checkpoint.num_blocks)]
    largest = max(every, key=lambda groups: sum(group.rows * group.width for group in groups))
    weights = sum(group.rows * group.width for group in largest)
    count = 0 if tokens is None else tokens.ids.numel()
    hidden, vocabulary = checkpoint.config["hidden_size"], checkpoint.config["vocab_size"]
    stream_bytes = count * hidden * checkpoint.dtype.itemsize
    spilled = stream_bytes > SPILL_ABOVE_BYTES
    passing = 4 * _at_once(tokens) * (2 * max(group.width for group in largest) + max(g.rows for g in largest))
    if heads:
        one_sample = 0 if tokens is None else 4 * tokens.ids.shape[1] * vocabulary
        passing = max(passing, 2 * max(LOGITS_BYTES, one_sample) + 4 * hidden * vocabulary)
    held = IMPORTS_BYTES + GAPS_BYTES + KEPT_CASTS_BYTES + weights * (checkpoint.dtype.itemsize + CODES_BYTES) + passing
    passed = sum(group.rows * group.width * group.share for groups in every for group in groups) / len(every)
    products = 2 * count * (blocks * passed + heads * hidden * vocabulary) / FORWARD_EFFICIENCY
    seconds = START_SECONDS + BLOCK_SECONDS * (blocks + len(every)) + products / machine_speed().matmul
    return Cost(held + beside_bytes + (0 if spilled else 2 * stream_bytes), 2 * stream_bytes * spilled, seconds / 60)


def sensing_cost(
    checkpoint: Checkpoint,
    tokens: Tokens | None,
    *,
    choices: int = SENSED_CHOICES,
    passes: int = GRID_CANDIDATES * GRID_PASSES,
    forwards: int = 1,
) -> Cost:
    """Cost of forward passes and one backward pass with a block in memory, and of judging some choices for each layer
    (roundings, sparsities), which take so many `passes` over its weights."""
    blocks = [groups_of(checkpoint, index) for index in range(checkpoint.num_blocks)]
    count = 0 if tokens is None else tokens.ids.numel()
    width = checkpoint.config["hidden_size"]
    largest = max(blocks, key=lambda groups: sum(group.rows * group.width for group in groups))
    weights = sum(group.rows * group.width for group in largest)
    moments = sum(4 * group.width ** (2 if group.share == 1 else 1) for group in largest)
    passing = 8 * _at_once(tokens) * sum(group.width + group.rows for group in largest)
    kept = count * width * checkpoint.dtype.itemsize * (len(blocks) + 1) + 4 * count * width
    spilled = kept if kept > SPILL_ABOVE_BYTES else 0
    held = IMPORTS_BYTES + 4 * weights + moments + passing + ROUNDING_BYTES + (0 if spilled else kept)
    speed = machine_speed()
    every = sum(group.rows * group.width * group.share for groups in blocks for group in groups)
    judging = sum(
        2 * choices * group.rows * group.width**2 for groups in blocks for group in groups if group.share == 1
    )
    products = ((6 + 2 * forwards) * count * every / FORWARD_EFFICIENCY + judging) / speed.matmul
    return Cost(held, spilled, (products + choices * passes * every / speed.elements) / 60)


def _at_once(tokens: Tokens | None) -> int:
    """Tokens that go through a block together."""
    from compress.core._activations import default_micro_batch

    length = 1 if tokens is None else tokens.ids.shape[1]
    return default_micro_batch(length) * length


def rounding_bytes(codes_bytes: int) -> int:
    """Memory of rounding matrices to nearest that are held, as codes, until they are written together."""
    return IMPORTS_BYTES + ROUNDING_BYTES + 2 * codes_bytes


def _played_widths(checkpoint: Checkpoint) -> list[int]:
    """Widths of what group order keeps of a forward: attention's inner and outer output (one in the place of the other
    if they are alike), the feed-forward's input."""
    widths = {name: checkpoint.info(f"{sites[0]}.weight").shape for name, sites in checkpoint.groups(0)}
    return [*set(widths["o"]), *([widths["down"][1]] if "down" in widths else [])]


def groups_of(checkpoint: Checkpoint, index: int) -> list[LayerGroup]:
    """The groups of block `index` as sizes, with the share of tokens that reaches each."""
    experts = checkpoint.config.get("num_experts") or checkpoint.config.get("num_local_experts") or 1
    share = checkpoint.config.get("num_experts_per_tok", 1) / experts
    found = []
    for name, sites in checkpoint.groups(index):
        shapes = [checkpoint.tensors[f"{site}.weight"].shape for site in sites]
        routed = share if name.startswith("experts.") else 1.0
        found.append(LayerGroup(sum(shape[0] for shape in shapes), shapes[0][1], routed))
    return found


def _seconds(groups: list[LayerGroup], tokens: int, speed: Speed, true_sequential: bool) -> float:
    """One block: forwards, Hessians, factorisations, sweeps, and the search for scales."""
    weights = sum(group.rows * group.width for group in groups)
    seconds = BLOCK_SECONDS + GRID_CANDIDATES * GRID_PASSES * weights / speed.elements
    if tokens == 0:
        return seconds
    forward = sum(
        2 * tokens * group.share * group.rows * group.width * _passes(group, true_sequential) for group in groups
    )
    hessians = sum(1.2 * tokens * group.share * group.width**2 for group in groups)
    factors = sum(group.width**3 / 3 for group in groups)
    sweeps = sum(group.rows * group.width**2 for group in groups)
    columns = sum(group.width * max(1, group.rows * group.width // (16 << 20)) for group in groups)
    products = forward / FORWARD_EFFICIENCY + hessians + factors + sweeps
    return seconds + products / speed.matmul + columns * COLUMN_SECONDS


def _passes(group: LayerGroup, true_sequential: bool) -> float:
    """How often a group's layers are computed, with the original's output on judged micro-batches."""
    from compress.core._activations import JUDGED_EVERY

    if not true_sequential:
        return 2
    return (1 if group.share == 1 else 3) + 1 / JUDGED_EVERY  # experts are not played back


@cache
def machine_speed() -> Speed:
    """Measured once in a process, in a fraction of a second."""
    import torch

    a_MK, b_KN = torch.ones(512, 1024), torch.ones(1024, 1024)
    cached = torch.ones(1 << 17)
    product = _fastest(lambda: a_MK @ b_KN)
    elements = _fastest(lambda: cached.round_())
    return Speed(2 * 512 * 1024 * 1024 / product, len(cached) / elements)


def _fastest(work: Callable[[], object], repeats: int = 8) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
