"""Hidden: channels of the residual stream go, everywhere the same ones."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from compress.core.sizes import sizes_of
from prune._structure import StructuredPruning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.core.checkpoint import Checkpoint
    from compress.core.reshaped import ReshapedCheckpoint


class Hidden(StructuredPruning):
    """A narrower residual stream. Heads and feed-forward channels stay as many and as wide as they are."""

    paper: ClassVar = "Muralidharan et al., 2024, arXiv:2407.14679"
    only_reads: ClassVar = True
    needs_calibration: ClassVar = True

    multiple: int = Field(
        8,
        ge=1,
        le=65536,
        description="what stays is a multiple of this: what kernels and groups like; and of the number of heads where "
        "transformers asks for that (Llama, Gemma)",
    )
    importance: Literal["activation", "magnitude"] = Field(
        "activation",
        description="by the activations behind all norms (Minitron), or by the size of the weights (a baseline)",
    )
    rescale: bool = Field(
        True,
        description="multiply each norm by what makes its outputs on calibration text as large as before, since it "
        "divides by the root mean square of fewer channels",
    )

    @property
    def what(self) -> str:
        return "channels of the residual stream"

    @property
    def calibrated(self) -> bool:
        return self.rescale or self.importance == "activation"

    def total(self, checkpoint: Checkpoint) -> int:
        return sizes_of(checkpoint.config)["hidden"]

    def step(self, checkpoint: Checkpoint) -> int:
        heads = sizes_of(checkpoint.config)["heads"] if checkpoint.architecture.heads_divide else 1
        return math.lcm(self.multiple, heads)

    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        return self.without(checkpoint, range(count), {})

    def without(self, checkpoint: Checkpoint, kept: Sequence[int], factors: Mapping[str, float]) -> ReshapedCheckpoint:
        """The model with these channels, and norms (by the names of their weights) multiplied by `factors`."""
        from compress.core.reshaped import ReshapedCheckpoint
        from prune._surgery import hidden_cuts

        sizes = sizes_of(checkpoint.config)
        config: dict[str, object] = {"hidden_size": len(kept), "head_dim": sizes["head_dim"]}
        if self.rescale and not checkpoint.architecture.scaled_embedding:
            config |= self._eps(checkpoint, sizes["hidden"] / len(kept))
        plus = 1.0 if checkpoint.architecture.norm_plus_one else 0.0
        changes = {name: partial(_scaled, factor=factor, plus=plus) for name, factor in factors.items() if factor != 1}
        return ReshapedCheckpoint(checkpoint, config, cuts=hidden_cuts(checkpoint, kept), changes=changes)

    def _eps(self, checkpoint: Checkpoint, factor: float) -> dict[str, object]:
        """What norms add to a mean square, which grows by as much when channels without any activation go."""
        eps = checkpoint.config.get("rms_norm_eps")
        return {"rms_norm_eps": eps * factor} if eps is not None and factor != 1 else {}

    def stage_bytes(self, checkpoint: Checkpoint, smaller: Checkpoint) -> int:
        from prune._surgery import norm_weights

        norms = [smaller.info(name) for name in norm_weights(smaller)]
        grown = sum(4 * math.prod(info.shape) - info.bytes for info in norms)
        return super().stage_bytes(checkpoint, smaller) + grown

    def run(self, job: Job) -> None:
        from prune._stream import choose_channels

        count = self.count(job.checkpoint)
        found = job.remember("kept", lambda: choose_channels(self, job, count))
        job = job.onto(self.without(job.checkpoint, found["kept"], found["factors"]))
        for block in job.walk(calibrate=False):
            for site in block.sites:
                site.note(method=self.importance)


def _scaled(weight: Tensor, factor: float, plus: float) -> Tensor:
    """A norm's weight fp32, such that its outputs are `factor` times as large; it multiplies by `plus` + weight."""
    return (weight.float() + plus) * factor - plus
