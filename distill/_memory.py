"""What training holds, in bytes, from shapes alone; and which settings would need less."""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

from compress.core.memory import IMPORTS_BYTES
from compress.core.processes import launched

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from distill._settings import Training

WEIGHT_BYTES = {"adamw": 16, "adamw8bit": 10}  # fp32 weight and gradient, and two moments of 4 bytes or 1
UPDATE_NUMBERS = 4  # of the largest matrix, while 8-bit moments are fp32 for an update
TEACHER_BYTES = 4  # of each of its weights
GATHERED_BYTES = 20  # of each weight of a block: weights, gradients, both on their way, and the next block's weights
GATHERED_REST_BYTES = 12  # of each weight outside the blocks: weights and gradients for a step, and these on their way
CAST_BYTES = 2  # of each weight: its bf16 copy, which the way back finds
ACTIVATIONS = {"fp32": 34, "bf16": 24}  # numbers of 4 bytes per token, block and channel that the way back finds


def parameters_of(checkpoint: Checkpoint) -> int:
    """How many numbers the model has when nothing is packed."""
    packed = {name for module in checkpoint.schemes for name in checkpoint.stored_names(module)}
    dense = sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if name not in packed)
    return dense + sum(math.prod(checkpoint.matrix_shape(module)) for module in checkpoint.schemes)


def reading_minutes(model: Checkpoint, tokens: int) -> float:
    """Of one forward over so many tokens."""
    from compress.core.memory import machine_speed

    return 2 * parameters_of(model) * tokens / machine_speed().matmul / 60


def reading_bytes(model: Checkpoint) -> int:
    """Peak memory of a process in which a model reads, and nothing is trained."""
    return IMPORTS_BYTES + TEACHER_BYTES * parameters_of(model)


def training_bytes(settings: Training, checkpoint: Checkpoint, teacher: Checkpoint | None, length: int) -> int:
    """Peak memory of one process that trains on rows of `length` tokens, with the teacher beside the student."""
    channels = settings.rows_at_once * length * checkpoint.config["hidden_size"]
    blocks = checkpoint.num_blocks
    held = ACTIVATIONS[settings.precision] * channels * (1 if settings.checkpointing else blocks)
    held += channels * blocks * settings.checkpointing  # the inputs of blocks
    taught = teacher_bytes(settings, teacher) if teacher else 0
    return IMPORTS_BYTES + settings.weight_bytes(checkpoint) + 4 * held + taught


def teacher_bytes(settings: Training, teacher: Checkpoint) -> int:
    """Of its weights; what lies outside its blocks is never cut up."""
    numbers = parameters_of(teacher)
    if not settings.sharded:
        return TEACHER_BYTES * numbers
    rest = numbers - sum(block_numbers(teacher))
    return TEACHER_BYTES * (rest + (numbers - rest) // launched())


def block_numbers(checkpoint: Checkpoint) -> list[int]:
    """How many weights each block has, but for norms and biases beside packed ones."""
    found = []
    for index in range(checkpoint.num_blocks):
        layers = sum(math.prod(checkpoint.matrix_shape(name)) for name in checkpoint.sites(index))
        dense = sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.block_tensors(index))
        found.append(layers if checkpoint.kind == "quantized" else dense)
    return found


def whole_model_bytes(settings: Training, checkpoint: Checkpoint) -> int:
    """Of a model that is trained as a whole: weights, gradients, moments, and copies for products."""
    numbers = parameters_of(checkpoint)
    if settings.sharded:
        return _part_bytes(settings, checkpoint, numbers)
    weights = WEIGHT_BYTES[settings.optimizer] * (numbers + settings.extra_numbers(checkpoint))
    weights += CAST_BYTES * numbers if settings.precision == "bf16" else 0
    if settings.optimizer == "adamw8bit":
        weights += 4 * UPDATE_NUMBERS * max(math.prod(info.shape) for info in checkpoint.tensors.values())
    return weights


def _part_bytes(settings: Training, checkpoint: Checkpoint, numbers: int) -> int:
    """Of one process's part of it, and of what is gathered."""
    blocks = block_numbers(checkpoint)
    gathered = GATHERED_BYTES * max(blocks) + GATHERED_REST_BYTES * (numbers - sum(blocks))
    casts = CAST_BYTES * (max(blocks) if settings.checkpointing else numbers) if settings.precision == "bf16" else 0
    return WEIGHT_BYTES[settings.optimizer] * numbers // launched() + gathered + casts


def leaner(
    settings: Training, checkpoint: Checkpoint, teacher: Checkpoint | None, length: int
) -> tuple[tuple[str, int], ...]:
    """Settings that would need less, as written in a recipe, with their bytes: few changes before many, and those that
    cost no quality first."""
    changes: dict[str, Any] = {"rows_at_once": 1, "checkpointing": True, "shard": True, "optimizer": "adamw8bit"}
    if not (settings.model_copy(update={"shard": True}).sharded and settings.optimizer == "adamw"):
        del changes["shard"]
    changes = {name: value for name, value in changes.items() if getattr(settings, name) != value}
    now, found = training_bytes(settings, checkpoint, teacher, length), []
    for count in range(1, len(changes) + 1):
        for names in combinations(changes, count):
            changed = {name: changes[name] for name in names}
            other = settings.model_copy(update=changed)
            if other.sharded and other.optimizer != "adamw":
                continue
            needed = training_bytes(other, checkpoint, teacher, length)
            if needed < now:
                words = (f"{name}: {str(value).lower()}" for name, value in changed.items())
                found.append((" and ".join(words), needed))
    return tuple(found)
