"""Mixed precision: bits where the model minds errors, under a budget. Chosen by an exact knapsack over measured
sensitivities (K-FAC, Martens & Grosse, 2015, arXiv:1503.05671), rounded by another method."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job, Plan
from compress.core.quantities import Size
from quantize._overrides import SchemeName, make_scheme
from quantize._settings import WeightQuantization

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.scheme import Scheme
    from compress.core.tensors import QuantTensor


class Mixed(WeightQuantization):
    """Each group of layers with one input gets the scheme, of `choices`, that makes the whole model lose least.

    The loss of a choice is the KL divergence that its rounding error causes, measured by one forward and one backward
    pass over calibration text; the budget is that of `scheme` in all layers, or `bits_per_weight`.
    """

    paper: ClassVar = "Martens & Grosse, 2015, arXiv:1503.05671 (sensitivities); 0-1 knapsack solved exactly"
    needs_calibration: ClassVar = True
    prepares: ClassVar = True

    bits_per_weight: float | None = Field(
        None, gt=1, le=16, description="budget of codes and scales, a mean over all layers; default: that of `scheme`"
    )
    size: Size | None = Field(None, description="budget of all the artifact's tensors instead, e.g. 120MB")
    choices: tuple[SchemeName, ...] = Field(
        ("w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w8a16"), min_length=1, description="schemes to choose among"
    )
    using: Literal["gptq", "rtn", "autoround", "hqq"] = Field("gptq", description="method that rounds the layers")
    vocabulary: bool = Field(False, description="choose for embedding and head, too, or leave them as they are")
    tokens: int = Field(16384, ge=64, description="calibration tokens that sensitivities are measured on")

    def own_problem(self) -> str | None:
        if self.size is not None and self.bits_per_weight is not None:
            return "size and bits_per_weight are two budgets: give one"
        if self.vocabulary and (self.head or self.embedding):
            return "with `vocabulary` the schemes of embedding and head are chosen: leave out `head` and `embedding`"
        if make_scheme(self.scheme, self.group_size, self.symmetric).activation_bits != 16:
            return f"{self.scheme} rounds inputs, and what is chosen here are the bits of weights: leave `scheme` out"
        for name, scheme in zip(self.choices, self.choice_schemes, strict=True):
            if scheme.activation_bits != 16 or scheme.dtype != "int":
                return f"{name} cannot be a choice: whole numbers with inputs as they are can, like w4a16"
        if self.prepare and self.using == "hqq":
            return "hqq does not compose with transforms"
        return None

    @property
    def choice_schemes(self) -> tuple[Scheme, ...]:
        """The schemes to choose among."""
        return tuple(make_scheme(name, self.group_size, self.symmetric) for name in self.choices)

    @property
    def sequential(self) -> bool:
        return self.using == "gptq"

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        from compress.core.untied import UntiedCheckpoint

        if self.vocabulary and checkpoint.tied:
            checkpoint = UntiedCheckpoint(checkpoint)
        return super().view(checkpoint)

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """As for `scheme` in all layers: what is chosen takes no more. Bytes are a bound."""
        from quantize._mixed import planned

        return planned(self, super().plan(checkpoint, calibration), self.view(checkpoint), calibration)

    def run(self, job: Job) -> None:
        self._settled(job).run(job)

    def outside(self, job: Job) -> dict[str, QuantTensor]:
        return self._settled(job).outside(job)

    def _settled(self, job: Job) -> WeightQuantization:
        """The method that rounds, with a scheme for every layer. Found out once: a resumed run remembers."""
        from quantize._mixed import choose, settled

        if job.calibration is None:
            raise UsageError("needs calibration text to measure sensitivities on")
        return settled(self, job.remember("schemes", lambda: choose(self, job)), job.checkpoint)
