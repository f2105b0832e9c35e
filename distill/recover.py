"""Recovery: cheap training that gives back what pruning or quantization lost, and keeps what they won."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job, LayerPlan, Plan, WeightKind
from compress.core.patterns import unused
from distill._settings_parts import Coded, require_layers, require_whole_numbers
from distill.logits import Logits

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


class Recover(Logits, Coded):
    """Dense and masked weights get low-rank pairs that end merged; quantized ones are trained as codes and scales, or
    are left as they are with an adapter beside them."""

    takes: ClassVar = frozenset({"dense", "masked", "quantized"})
    paper: ClassVar = "Hu et al., 2022, arXiv:2106.09685 (pairs); Esser et al., 2020, arXiv:1902.08153 (codes, scales)"

    reads_caches: ClassVar = False
    can_shard: ClassVar = False
    can_compile: ClassVar = False

    rank: int = Field(16, ge=1, le=4096, description="of pairs")
    lora_alpha: float | None = Field(None, gt=0, description="pairs count lora_alpha / rank times; default: once")
    keep: Literal["merged", "adapter"] = Field(
        "merged", description="adapter: quantized weights stay, pairs are written beside them for PEFT and vLLM"
    )
    tokens: int = Field(1_000_000, ge=0, description="tokens to train on; with keep: adapter 0 leaves it at its start")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="of pairs, at its highest")
    final: float = Field(0.0, ge=0, le=1, description="the learning rate at the end, as a share of the highest")

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

    def pair_rank(self, checkpoint: Checkpoint) -> int | None:
        return None if checkpoint.kind == "quantized" and self.keep == "merged" else self.rank

    def steps(self, tokens: Tokens) -> int:
        return super().steps(tokens) if self.tokens else 0

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        from distill._memory import parameters_of

        layers = self.layers_of(checkpoint)
        self._require_work(checkpoint, self.taken(checkpoint))
        learned = self.learned_numbers(checkpoint)
        bytes_out = sum(info.bytes for info in checkpoint.tensors.values())
        adapter_bytes = learned * checkpoint.dtype.itemsize if self.keep == "adapter" else 0
        plan = super().planned(checkpoint, calibration, teacher)
        left = bytes_out if checkpoint.kind == "quantized" else 4 * parameters_of(checkpoint)
        return replace(
            plan,
            layers=tuple(layers),
            bytes_out=bytes_out + adapter_bytes,
            disk_bytes=left + 2 * 12 * learned,
            notices=(
                *plan.notices,
                *unused("layers", self.layers, [layer.name for layer in layers]),
                *self._notices,
            ),
        )

    @property
    def _notices(self) -> tuple[str, ...]:
        return ("what is scored are the packed weights without their adapter",) if self.keep == "adapter" else ()

    def _require_work(self, checkpoint: Checkpoint, taken: list[LayerPlan]) -> None:
        require_layers(taken)
        if self.keep == "merged" and self.tokens == 0:
            raise UsageError("no token is trained on", where="distill.tokens", hint="0 is of keep: adapter")
        if checkpoint.kind == "quantized" and self.keep == "merged":
            require_whole_numbers(taken, hint="keep: adapter leaves them as they are")
        transforms = getattr(checkpoint, "transforms", ())
        if self.keep == "adapter" and transforms:
            message = f"an adapter makes up for rounding, and behind prepare: {transforms[0]} more differs than that"
            raise UsageError(message, where="distill.keep", hint="leave `prepare` out, or keep: merged")

    def run(self, job: Job) -> None:
        from distill._recover import recover

        recover(self, job)
