"""What every method that trains has in common: data, optimizer, schedule, saves, and the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.passes import LayerPlan, Pass, Plan

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint

BYTES_PER_PARAMETER = 16  # fp32: the weight, its gradient, and both moments of AdamW
ACTIVATIONS = 34  # numbers per token, block and hidden channel that a backward pass wants to find


class Training(Pass):
    """Settings shared by the methods that train the model, on the rows of `calibration`, each time in a new order."""

    kind: ClassVar = "distill"
    takes: ClassVar = frozenset({"dense", "masked"})
    gives: ClassVar = None
    needs_calibration: ClassVar = True

    tokens: int = Field(1_000_000, ge=1, description="tokens to train on: those of calibration, as often as it takes")
    batch: int = Field(16, ge=1, description="rows of the calibration text in a step")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="at its highest")
    final: float = Field(0.1, ge=0, le=1, description="the learning rate at the end, as a share of the highest")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the steps in which it rises")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="how it falls: as a cosine, or not until the last fifth and then in a line (WSD)"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="of AdamW, for matrices")
    clip: float = Field(1.0, gt=0, description="the norm that gradients are cut to")
    rows_at_once: int = Field(4, ge=1, description="rows that go through the model together: memory, not the result")
    seed: int = Field(0, ge=0, description="of the order of rows")
    save_every: int = Field(50, ge=1, description="steps between two saves, from which a run that was killed goes on")

    @property
    def transforms(self) -> tuple[str, ...]:
        return (type(self).__module__.rpartition(".")[2],)

    def steps(self, tokens: Tokens) -> int:
        """How many steps these tokens are."""
        return max(1, round(self.tokens / (self.batch * tokens.ids.shape[1])))

    def longest(self, tokens: Tokens) -> int:
        """Tokens of the longest row of a step."""
        return tokens.ids.shape[1]

    def teacher_bytes(self, checkpoint: Checkpoint) -> int:
        """Memory of what the student learns from."""
        return 0

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """Bytes from headers; memory and minutes from the number of parameters."""
        from compress.core.memory import IMPORTS_BYTES, machine_speed

        infos = checkpoint.tensors.values()
        numbers = sum(info.bytes for info in infos) // checkpoint.dtype.itemsize
        length = 1 if calibration is None else self.longest(calibration)
        held = self.rows_at_once * length * checkpoint.config["hidden_size"] * checkpoint.num_blocks * ACTIVATIONS * 4
        operations = (6 + 2) * numbers * self.tokens  # forwards and backwards, and the teacher's forward
        return Plan(
            layers=tuple(self._layers(checkpoint)),
            bytes_out=sum(info.bytes for info in infos),
            peak_memory_bytes=IMPORTS_BYTES + BYTES_PER_PARAMETER * numbers + held + self.teacher_bytes(checkpoint),
            disk_bytes=(4 + 2 * 12) * numbers,  # the result in fp32, and two saves
            minutes=operations / machine_speed().matmul / 60,
        )

    def _layers(self, checkpoint: Checkpoint) -> list[LayerPlan]:
        found = []
        for index in range(checkpoint.num_blocks):
            for name in checkpoint.sites(index):
                size = checkpoint.info(f"{name}.weight").bytes
                found.append(LayerPlan(name, checkpoint.matrix_shape(name), size, size, reason="trained"))
        return found
