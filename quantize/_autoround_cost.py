"""What learning a block's rounding takes beside its start: memory, spilled bytes and minutes, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.core.memory import FORWARD_EFFICIENCY, Cost, groups_of, machine_speed

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint

_FLOATS_PER_WEIGHT = 3  # place, weight and its gradient
_PASSES_PER_STEP = 12  # over all of them in an update
_KEPT_WIDTHS = 12  # hidden states that the backward pass keeps, beside the inputs of all layers
_STEP_SECONDS = 4e-3  # some hundred small operations, forward and backward


def learning_cost(checkpoint: Checkpoint, tokens: Tokens | None, *, steps: int, tokens_per_step: int) -> Cost:
    """Cost of `steps` updates in every block, and of the original model's own stream of activations."""
    from compress.core.walk import SPILL_ABOVE_BYTES, compute_dtype
    from quantize._learned_aim import LOGITS_BYTES

    if tokens is None:
        return Cost(0, 0, 0.0)
    samples, length = tokens.ids.shape
    at_once = length * min(samples, max(1, tokens_per_step // length))
    hidden = checkpoint.config["hidden_size"]
    blocks = [groups_of(checkpoint, index) for index in range(checkpoint.num_blocks)]
    weights = [sum(group.rows * group.width for group in groups) for groups in blocks]
    reached = [sum(group.rows * group.width * group.share for group in groups) for groups in blocks]
    channels = max(sum((group.rows + group.width) * group.share for group in groups) for groups in blocks)
    stream_bytes = samples * length * hidden * checkpoint.dtype.itemsize
    spilled = stream_bytes > SPILL_ABOVE_BYTES
    kept_bytes = 4 * at_once * (channels + _KEPT_WIDTHS * hidden)
    memory = 4 * _FLOATS_PER_WEIGHT * max(weights) + kept_bytes + (0 if spilled else stream_bytes)
    vocabulary = checkpoint.config["vocab_size"]
    if compute_dtype(checkpoint, "auto", "cpu") is not checkpoint.dtype:
        memory += 4 * vocabulary * hidden  # the head, cast for its backward pass
    memory += 2 * min(LOGITS_BYTES, 4 * at_once * vocabulary)
    speed = machine_speed()
    operations = sum(reached) * 2 * (samples * length + 3 * at_once * steps)
    operations += vocabulary * hidden * 2 * 3 * at_once * steps  # the original's words, and the gradient of ours
    passes = sum(weights) * _PASSES_PER_STEP * steps / speed.elements
    seconds = operations / FORWARD_EFFICIENCY / speed.matmul + passes + steps * len(blocks) * _STEP_SECONDS
    return Cost(int(memory), stream_bytes * spilled, seconds / 60)
