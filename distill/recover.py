"""Recovery: cheap training that gives back what pruning or quantization lost, and keeps what they won."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job, LayerPlan, Plan, WeightKind
from compress.core.patterns import Pattern, covered, unused
from distill.logits import Logits

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


class Recover(Logits):
    """Dense and masked weights get low-rank pairs that end merged; quantized ones are trained as codes and scales, or
    are left as they are with an adapter beside them."""

    takes: ClassVar = frozenset({"dense", "masked", "quantized"})
    paper: ClassVar = "Hu et al., 2022, arXiv:2106.09685 (pairs); Esser et al., 2020, arXiv:1902.08153 (codes, scales)"

    reads_caches: ClassVar = False

    layers: tuple[Pattern, ...] = Field(
        ("*",), min_length=1, description="layers of the blocks that are trained, by name pattern: '*.q_proj'"
    )
    rank: int = Field(16, ge=1, le=4096, description="of pairs")
    lora_alpha: float | None = Field(None, gt=0, description="pairs count lora_alpha / rank times; default: once")
    keep: Literal["merged", "adapter"] = Field(
        "merged", description="adapter: quantized weights stay, pairs are written beside them for PEFT and vLLM"
    )
    tokens: int = Field(1_000_000, ge=0, description="tokens to train on; with keep: adapter 0 leaves it at its start")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="of pairs, at its highest")
    code_rate: float = Field(0.003, gt=0, le=1, description="of codes, at its highest, in steps of their grid")
    scale_rate: float = Field(1e-3, ge=0, le=0.1, description="of their scales, in parts of themselves; 0: they stay")

    @property
    def joins(self) -> bool:
        return False

    @property
    def scale(self) -> float:
        """What a pair's product counts."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.rank

    def refusal(self, kind: WeightKind) -> str | None:
        if self.keep == "adapter" and kind != "quantized":
            return "takes quantized weights with keep: adapter"
        return super().refusal(kind)

    def steps(self, tokens: Tokens) -> int:
        return super().steps(tokens) if self.tokens else 0

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        from distill._memory import parameters_of

        layers = self._layers(checkpoint)
        self._require_work(checkpoint, self._taken(checkpoint))
        trained, paired = self._learned(checkpoint)
        bytes_out = sum(info.bytes for info in checkpoint.tensors.values())
        adapter_bytes = paired * checkpoint.dtype.itemsize if self.keep == "adapter" else 0
        plan = super().planned(checkpoint, calibration, teacher)
        left = bytes_out if checkpoint.kind == "quantized" else 4 * parameters_of(checkpoint)
        return replace(
            plan,
            bytes_out=bytes_out + adapter_bytes,
            disk_bytes=left + 2 * 12 * (trained or paired),
            notices=(
                *plan.notices,
                *unused("layers", self.layers, [layer.name for layer in layers]),
                *self._notices,
            ),
        )

    @property
    def _notices(self) -> tuple[str, ...]:
        return ("what is scored are the packed weights without their adapter",) if self.keep == "adapter" else ()

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        from distill._memory import CAST_BYTES, WEIGHT_BYTES, parameters_of

        taken, numbers = [math.prod(layer.shape) for layer in self._taken(checkpoint)], parameters_of(checkpoint)
        trained, paired = self._learned(checkpoint)
        held = 4 * numbers + 4 * sum(taken)  # the model, and what its forward makes of the weights that are trained
        held += CAST_BYTES * numbers if self.precision == "bf16" else 0
        if not trained:
            return held + WEIGHT_BYTES[self.optimizer] * paired
        return held + (WEIGHT_BYTES[self.optimizer] - 4) * trained + 16 * max(taken)

    def _taken(self, checkpoint: Checkpoint) -> list[LayerPlan]:
        return [layer for layer in self._layers(checkpoint) if layer.reason]

    def _learned(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Numbers that are trained: codes, or else those of pairs."""
        taken = self._taken(checkpoint)
        if checkpoint.kind == "quantized" and self.keep == "merged":
            return sum(math.prod(layer.shape) for layer in taken), 0
        return 0, self.rank * sum(sum(layer.shape) for layer in taken)

    def _layers(self, checkpoint: Checkpoint) -> list[LayerPlan]:
        found, coded = [], checkpoint.kind == "quantized"
        for index in range(checkpoint.num_blocks):
            for name in checkpoint.sites(index):
                size = sum(checkpoint.info(stored).bytes for stored in checkpoint.stored_names(name))
                reason = "trained" if covered(name, self.layers) else ""
                scheme = checkpoint.schemes.get(name)
                if scheme or not coded:
                    found.append(LayerPlan(name, checkpoint.matrix_shape(name), size, size, scheme, reason))
        return found

    def _require_work(self, checkpoint: Checkpoint, taken: list[LayerPlan]) -> None:
        if not taken:
            raise UsageError("no layer is trained", where="distill.layers", hint="'*' are all linear layers")
        if self.keep == "merged" and self.tokens == 0:
            raise UsageError("no token is trained on", where="distill.tokens", hint="0 is of keep: adapter")
        if checkpoint.kind == "quantized" and self.keep == "merged":
            for layer in taken:
                if layer.scheme and layer.scheme.dtype != "int":
                    message = f"codes of {layer.scheme.name} are not trained, only whole numbers: {layer.name}"
                    raise UsageError(message, where="distill.layers", hint="keep: adapter leaves them as they are")
        transforms = getattr(checkpoint, "transforms", ())
        if self.keep == "adapter" and transforms:
            message = f"an adapter makes up for rounding, and behind prepare: {transforms[0]} more differs than that"
            raise UsageError(message, where="distill.keep", hint="leave `prepare` out, or keep: merged")

    def run(self, job: Job) -> None:
        from distill._recover import recover

        recover(self, job)
