"""What methods that can train a part of the model have in common: which part, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import LayerPlan, Plan
from compress.core.patterns import Pattern, unused
from distill._settings import Training, layer_plans, parameters_of

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


class Coded(Training):
    """Of quantized models: their codes and scales are trained, and what is stored beside them."""

    layers: tuple[Pattern, ...] = Field(
        ("*",), min_length=1, description="layers of the blocks that are trained, by name pattern: '*.q_proj'"
    )
    code_rate: float = Field(0.003, gt=0, le=1, description="of codes, at its highest, in steps of their grid")
    scale_rate: float = Field(3e-3, ge=0, le=0.1, description="of their scales, in parts of themselves; 0: they stay")
    rest: Literal["none", "norms", "all"] = Field(
        "all", description="what else is trained beside codes: norms and biases, or embedding and head, too"
    )
    rest_rate: float = Field(1e-3, gt=0, le=0.1, description="of that, in parts of the size of a tensor's numbers")


class Parts(Coded):
    """All weights, or low-rank pairs beside them that end merged; of a quantized model its codes and scales."""

    rank: int | None = Field(
        None, ge=1, le=4096, description="of low-rank pairs that are trained instead of the weights; else all weights"
    )

    @property
    def scale(self) -> float:
        """What a pair's product counts."""
        return 1.0

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        plan = super().plan(checkpoint, calibration)
        coded = checkpoint.kind == "quantized"
        if not coded and self.rank is None:
            return plan
        from compress.core.memory import IMPORTS_BYTES

        layers = [layer for layer in layer_plans(checkpoint, self.layers) if not coded or layer.scheme]
        taken = [layer for layer in layers if layer.reason]
        require_layers(taken)
        if coded:
            require_whole_numbers(taken, hint="put this stage before the one that quantizes")
        length = 1 if calibration is None else self.longest(calibration)
        held, learned = part_bytes(self, checkpoint, length, taken, None if coded else self.rank)
        kept = plan.bytes_out if coded else 4 * parameters_of(checkpoint)
        return replace(
            plan,
            layers=tuple(layers),
            peak_memory_bytes=IMPORTS_BYTES + held,
            disk_bytes=kept + 2 * 12 * learned,
            notices=(*plan.notices, *unused("layers", self.layers, [layer.name for layer in layers])),
            leaner=(),
        )


def part_bytes(
    settings: Coded, checkpoint: Checkpoint, length: int, taken: Sequence[LayerPlan], rank: int | None
) -> tuple[int, int]:
    """(memory, how many numbers are learned) where these layers get pairs of `rank`, or (None) their codes are trained
    and what lies beside them."""
    from distill._memory import ACTIVATIONS
    from distill._rest import rest_names

    trained = sum(math.prod(layer.shape) for layer in taken)
    held = settings.rows_at_once * length * checkpoint.config["hidden_size"] * checkpoint.num_blocks
    held *= 4 * ACTIVATIONS[settings.precision]
    held += 4 * parameters_of(checkpoint) + 4 * trained  # the model, and what its forward makes of what is trained
    if rank is None:
        beside = sum(math.prod(checkpoint.info(name).shape) for name in rest_names(checkpoint, settings.rest))
        largest = max(math.prod(layer.shape) for layer in taken)
        return held + 12 * trained + 16 * largest + 12 * beside, trained + beside
    paired = rank * sum(sum(layer.shape) for layer in taken)
    return held + 16 * paired, paired


def require_layers(taken: Sequence[LayerPlan]) -> None:
    """UsageError if nothing is trained."""
    if not taken:
        raise UsageError("no layer is trained", where="distill.layers", hint="'*' are all linear layers")


def require_whole_numbers(taken: Sequence[LayerPlan], hint: str) -> None:
    """UsageError for layers whose codes cannot be trained."""
    for layer in taken:
        if layer.scheme and layer.scheme.dtype != "int":
            message = f"codes of {layer.scheme.name} are not trained, only whole numbers: {layer.name}"
            raise UsageError(message, where="distill.layers", hint=hint)
