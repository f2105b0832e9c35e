"""What training holds, in bytes, from shapes alone; and which settings would need less."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from compress.core.memory import IMPORTS_BYTES

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from distill._settings import Training

WEIGHT_BYTES = {"adamw": 16, "adamw8bit": 10}  # fp32 weight and gradient, and two moments of 4 bytes or 1
UPDATE_NUMBERS = 4  # of the largest matrix, while 8-bit moments are fp32 for an update
CAST_BYTES = 2  # of each weight: its bf16 copy, which the way back finds
ACTIVATIONS = {"fp32": 34, "bf16": 24}  # numbers of 4 bytes per token, block and channel that the way back finds


def training_bytes(settings: Training, checkpoint: Checkpoint, numbers: int, length: int) -> int:
    """Peak memory of one process that trains `numbers` parameters on rows of `length` tokens."""
    channels = settings.rows_at_once * length * checkpoint.config["hidden_size"]
    blocks = checkpoint.num_blocks
    held = ACTIVATIONS[settings.precision] * channels * (1 if settings.checkpointing else blocks)
    held += channels * blocks * settings.checkpointing  # the inputs of blocks
    if settings.optimizer == "adamw8bit":
        held += UPDATE_NUMBERS * max(info.bytes for info in checkpoint.tensors.values()) // checkpoint.dtype.itemsize
    extra = settings.extra_numbers(checkpoint)
    weights = WEIGHT_BYTES[settings.optimizer] * (numbers + extra)
    weights += CAST_BYTES * numbers if settings.precision == "bf16" else 0
    return IMPORTS_BYTES + weights + 4 * held + settings.teacher_bytes(checkpoint)


def leaner(settings: Training, checkpoint: Checkpoint, numbers: int, length: int) -> tuple[tuple[str, int], ...]:
    """Settings that would need less, as written in a recipe, with their bytes: few changes before many, and those that
    cost no quality first."""
    changes: dict[str, Any] = {"rows_at_once": 1, "checkpointing": True, "optimizer": "adamw8bit"}
    changes = {name: value for name, value in changes.items() if getattr(settings, name) != value}
    now, found = training_bytes(settings, checkpoint, numbers, length), []
    for count in range(1, len(changes) + 1):
        for names in combinations(changes, count):
            changed = {name: changes[name] for name in names}
            other = settings.model_copy(update=changed)
            needed = training_bytes(other, checkpoint, numbers, length)
            if needed < now:
                words = (f"{name}: {str(value).lower()}" for name, value in changed.items())
                found.append((" and ".join(words), needed))
    return tuple(found)
