"""AutoRound (Cheng et al., 2023, arXiv:2309.05516): learn each block's rounding and scales from its output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.events import Metric
from compress.core.passes import Job, Plan
from quantize._settings import WeightQuantization

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.walk import Group


class AutoRound(WeightQuantization):
    """Signed gradient descent on codes and scales, from GPTQ's solution, towards the original model's outputs."""

    paper: ClassVar = "Cheng et al., 2023, arXiv:2309.05516"
    needs_calibration: ClassVar = True
    prepares: ClassVar = True

    start: Literal["gptq", "rtn"] = Field("gptq", description="codes that learning starts from: GPTQ's or the nearest")
    steps: int = Field(200, ge=1, le=100_000, description="updates per block")
    tokens_per_step: int = Field(1024, ge=1, description="tokens that an update looks at, in whole samples")
    reach: float = Field(0.5, gt=0, le=16, description="how far a weight can travel in all, in steps of its grid")
    scale_reach: float = Field(0.5, ge=0, lt=1, description="how far a scale can travel in all, in parts of itself")
    damping: float = Field(0.01, gt=0, le=10, description="of the GPTQ start: part of the Hessian's mean diagonal")
    tokens_per_channel: float = Field(
        2.0, ge=0, description="an expert that saw fewer tokens than this times its width is rounded to nearest"
    )

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """The start's plan, and what learning adds to it."""
        from quantize._autoround_cost import learning_cost

        plan = super().plan(checkpoint, calibration)
        cost = learning_cost(self.view(checkpoint), calibration, steps=self.steps, tokens_per_step=self.tokens_per_step)
        return replace(
            plan,
            peak_memory_bytes=plan.peak_memory_bytes + cost.memory_bytes,
            disk_bytes=plan.disk_bytes + cost.spill_bytes,
            minutes=plan.minutes + cost.minutes,
        )

    def run(self, job: Job) -> None:
        from compress.core.statistics import Hessian
        from compress.core.tensors import QuantTensor
        from quantize._autoround import Learning, learn_block, original_outputs

        learning = Learning(self.steps, self.tokens_per_step, self.reach, self.scale_reach)
        collect = frozenset({Hessian} if self.start == "gptq" else ())
        source = replace(job, checkpoint=self.view(job.checkpoint))
        blocks = self.blocks(job, collect, keep=frozenset({"inputs"}))
        for block, targets in zip(blocks, original_outputs(source), strict=True):
            for group in block.groups:
                self._begin(group, job)
                group.release()
            coded = [site for site in block.sites if isinstance(site.replacement, QuantTensor)]
            sites = [site for site in coded if not site.record.fallback]
            if sites:
                left = learn_block(block, sites, targets, learning, source)
                job.events(Metric("autoround", "error_left", left, block.name))

    def _begin(self, group: Group, job: Job) -> None:
        """The codes that learning starts from; experts that saw few tokens keep them."""
        from quantize._gptq import Settings, solve_group
        from quantize._rounding import fall_back, round_site, too_few_tokens

        chosen = self.chosen(group)
        if not chosen:
            return
        if self.start == "gptq":
            start = Settings(
                self.damping,
                activation_order=True,
                tokens_per_channel=self.tokens_per_channel,
                clip=self.clip,
                cubed=False,  # learning is after the block's own error
            )
            solve_group(group, chosen, start, job)
            return
        reason = too_few_tokens(group, self.tokens_per_channel)
        for site, scheme in chosen:
            if reason:
                fall_back(site, scheme, self.clip, job, reason)
            else:
                round_site(site, scheme, job.checkpoint.dtype, self.clip)
