"""What methods that can train a part of the model have in common: which part, and what that takes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import LayerPlan, Plan
from compress.core.patterns import Pattern, unused
from distill._memory import CAST_BYTES, WEIGHT_BYTES, parameters_of, whole_model_bytes
from distill._settings import Training, layer_plans

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


class Coded(Training):
    """Of quantized models: their codes and scales are trained, and what is stored beside them."""

    layers: tuple[Pattern, ...] = Field(
        ("*",), min_length=1, description="layers of the blocks that are trained, by name pattern: '*.q_proj'"
    )
    code_rate: float = Field(0.0015, gt=0, le=1, description="of codes, at its highest, in steps of their grid")
    scale_rate: float = Field(2e-3, ge=0, le=0.1, description="of their scales, in parts of themselves; 0: they stay")
    rest: Literal["none", "norms", "all"] = Field(
        "all", description="what else is trained beside codes: norms and biases, or embedding and head, too"
    )
    rest_rate: float = Field(1.5e-3, gt=0, le=0.1, description="of that, in parts of the size of a tensor's numbers")

    @abstractmethod
    def pair_rank(self, checkpoint: Checkpoint) -> int | None:
        """The rank of pairs that are trained; None: codes are, and what lies beside them."""

    def layers_of(self, checkpoint: Checkpoint) -> list[LayerPlan]:
        """The layers of the blocks, of a quantized model those with codes; what is trained has a reason."""
        coded = checkpoint.kind == "quantized"
        return [layer for layer in layer_plans(checkpoint, self.layers) if layer.scheme or not coded]

    def taken(self, checkpoint: Checkpoint) -> list[LayerPlan]:
        """Those of them that are trained."""
        return [layer for layer in self.layers_of(checkpoint) if layer.reason]

    def learned_numbers(self, checkpoint: Checkpoint) -> int:
        """How many numbers are trained."""
        taken, rank = self.taken(checkpoint), self.pair_rank(checkpoint)
        if rank is not None:
            return rank * sum(sum(layer.shape) for layer in taken)
        return sum(math.prod(layer.shape) for layer in taken) + self._rest_numbers(checkpoint)

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        taken = [math.prod(layer.shape) for layer in self.taken(checkpoint)]
        numbers, held = parameters_of(checkpoint), WEIGHT_BYTES[self.optimizer]
        frozen = 4 * numbers + 4 * sum(taken)  # the model, and what its forward makes of the weights that are trained
        frozen += CAST_BYTES * numbers if self.precision == "bf16" else 0
        if self.pair_rank(checkpoint) is not None:
            return frozen + held * self.learned_numbers(checkpoint)
        return frozen + (held - 4) * self.learned_numbers(checkpoint) + 16 * max(taken)

    def _rest_numbers(self, checkpoint: Checkpoint) -> int:
        from distill._rest import rest_names

        return sum(math.prod(checkpoint.info(name).shape) for name in rest_names(checkpoint, self.rest))


class Parts(Coded):
    """All weights, or low-rank pairs beside them that end merged; of a quantized model its codes and scales."""

    rank: int | None = Field(
        None, ge=1, le=4096, description="of low-rank pairs that are trained instead of the weights; else all weights"
    )

    @property
    def scale(self) -> float:
        """What a pair's product counts."""
        return 1.0

    def pair_rank(self, checkpoint: Checkpoint) -> int | None:
        return None if checkpoint.kind == "quantized" else self.rank

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return super().weight_bytes(checkpoint) if self._is_part(checkpoint) else whole_model_bytes(self, checkpoint)

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        if not self._is_part(checkpoint):
            return super().planned(checkpoint, calibration, teacher)
        coded = checkpoint.kind == "quantized"
        layers, taken = self.layers_of(checkpoint), self.taken(checkpoint)
        require_layers(taken)
        if coded:
            require_whole_numbers(taken, hint="put this stage before the one that quantizes")
        plan = super().planned(checkpoint, calibration, teacher)
        kept = plan.bytes_out if coded else 4 * parameters_of(checkpoint)
        return replace(
            plan,
            layers=tuple(layers),
            disk_bytes=kept + 2 * 12 * self.learned_numbers(checkpoint),
            notices=(*plan.notices, *unused("layers", self.layers, [layer.name for layer in layers])),
        )

    def _is_part(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.kind == "quantized" or self.rank is not None


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
