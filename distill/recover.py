"""Recovery: cheap training that gives back what pruning or quantization lost, and keeps what they won."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job, LayerPlan, Plan, WeightKind
from compress.core.patterns import Pattern, covered, unused
from distill._settings_taught import ORIGINAL
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
    final: float = Field(0.0, ge=0, le=1, description="the learning rate at the end, as a share of the highest")
    code_rate: float = Field(0.0015, gt=0, le=1, description="of codes, at its highest, in steps of their grid")
    scale_rate: float = Field(2e-3, ge=0, le=0.1, description="of their scales, in parts of themselves; 0: they stay")
    rest: Literal["none", "norms", "all"] = Field(
        "all", description="what else is trained beside codes: norms and biases, or embedding and head, too"
    )
    rest_rate: float = Field(1.5e-3, gt=0, le=0.1, description="of that, in parts of the size of a tensor's numbers")

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

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        from compress.core.memory import IMPORTS_BYTES, machine_speed
        from distill._memory import ACTIVATIONS

        self.require_teacher(checkpoint, calibration)
        coded = checkpoint.kind == "quantized"
        layers = [layer for layer in self._layers(checkpoint) if not coded or layer.scheme]
        taken = [layer for layer in layers if layer.reason]
        self._require_work(checkpoint, taken)
        trained = sum(math.prod(layer.shape) for layer in taken)
        numbers = parameters_of(checkpoint)
        paired = self.rank * sum(sum(layer.shape) for layer in taken)
        learned = paired if self.keep == "adapter" or not coded else trained
        beside = self._rest_numbers(checkpoint) if coded and self.keep == "merged" else 0
        length = 1 if calibration is None else calibration.ids.shape[1]
        held = self.rows_at_once * length * checkpoint.config["hidden_size"] * checkpoint.num_blocks
        held *= 4 * ACTIVATIONS[self.precision]
        held += 4 * numbers + 4 * trained  # the model, and what its forward makes of the weights that are trained
        held += 16 * paired if learned == paired else 12 * trained + 16 * max(math.prod(each.shape) for each in taken)
        held += 12 * beside  # gradient and moments
        bytes_out = sum(info.bytes for info in checkpoint.tensors.values())
        adapter_bytes = paired * checkpoint.dtype.itemsize if self.keep == "adapter" else 0
        return Plan(
            layers=tuple(layers),
            bytes_out=bytes_out + adapter_bytes,
            peak_memory_bytes=IMPORTS_BYTES + held + (self.teacher_bytes(checkpoint) if self.tokens else 0),
            disk_bytes=(bytes_out + 4 * beside if coded else 4 * numbers) + 2 * 12 * (learned + beside),
            minutes=(6 + 2) * numbers * self.tokens / machine_speed().matmul / 60,
            notices=(*unused("layers", self.layers, [layer.name for layer in layers]), *self._notices),
        )

    @property
    def _notices(self) -> tuple[str, ...]:
        return ("what is scored are the packed weights without their adapter",) if self.keep == "adapter" else ()

    def teacher_bytes(self, checkpoint: Checkpoint) -> int:
        return super().teacher_bytes(checkpoint) if self.teacher != ORIGINAL else 4 * parameters_of(checkpoint)

    def _rest_numbers(self, checkpoint: Checkpoint) -> int:
        from distill._rest import rest_names

        return sum(math.prod(checkpoint.info(name).shape) for name in rest_names(checkpoint, self.rest))

    def _layers(self, checkpoint: Checkpoint) -> list[LayerPlan]:
        found = []
        for index in range(checkpoint.num_blocks):
            for name in checkpoint.sites(index):
                size = sum(checkpoint.info(stored).bytes for stored in checkpoint.stored_names(name))
                reason = "trained" if covered(name, self.layers) else ""
                scheme = checkpoint.schemes.get(name)
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


def parameters_of(checkpoint: Checkpoint) -> int:
    """How many numbers the model has when nothing is packed."""
    packed = {name for module in checkpoint.schemes for name in checkpoint.stored_names(module)}
    dense = sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if name not in packed)
    return dense + sum(math.prod(checkpoint.matrix_shape(module)) for module in checkpoint.schemes)
