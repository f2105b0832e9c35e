"""Feed-forward channels: rows of gate and up go together with columns of down."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import InputError
from compress.core.passes import Job
from compress.core.sizes import EXAMPLES_NOTICE, PER_LAYER_KEY, sizes_of, width_entries, with_defaults
from prune._settings_width import WidthPruning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost
    from compress.core.reshaped import ReshapedCheckpoint


class Channels(WidthPruning):
    """Narrower feed-forward networks, equally wide in all blocks (of a mixture: in all experts)."""

    paper: ClassVar = "Meng et al., 2024, arXiv:2403.12983; Muralidharan et al., 2024, arXiv:2407.14679"
    kinds: ClassVar = ("down",)

    multiple: int = Field(
        8, ge=1, le=65536, description="what stays is a multiple of this: what kernels and groups like"
    )

    widths: Literal["uniform", "uneven"] = Field(
        "uniform",
        description="uneven: blocks that need them keep more channels than others, as many in all; only the bundled "
        "runtime opens the result, until `compress level` pads it",
    )

    @property
    def what(self) -> str:
        return "feed-forward channels"

    def total(self, checkpoint: Checkpoint) -> int:
        sizes = sizes_of(checkpoint.config)
        return sizes["ffn" if checkpoint.architecture.experts is None else "expert_ffn"]

    def step(self, checkpoint: Checkpoint) -> int:
        return self.multiple

    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        if checkpoint.architecture.experts is None:
            return self.narrowed(checkpoint, _apart(self, checkpoint, self.even_widths(checkpoint, count)))
        from compress.core.reshaped import ReshapedCheckpoint
        from prune._surgery import channel_cuts, channel_width, expert_prefixes

        cuts = {}
        for index in range(checkpoint.num_blocks):
            for prefix in expert_prefixes(checkpoint, index):
                kept = range(self.width_for(checkpoint, channel_width(checkpoint, index, prefix), count))
                cuts |= channel_cuts(checkpoint, index, prefix, kept)
        return ReshapedCheckpoint(checkpoint, self._config(checkpoint, count), cuts=cuts)

    def narrowed(self, checkpoint: Checkpoint, widths: Sequence[int]) -> ReshapedCheckpoint:
        """The model with so many channels in each block, whichever these are."""
        from compress.core.reshaped import ReshapedCheckpoint
        from prune._surgery import channel_cuts

        cuts = {}
        for index, width in enumerate(widths):
            cuts |= channel_cuts(checkpoint, index, "", range(width))
        config = width_entries(widths) | self.bias_config(checkpoint)
        return ReshapedCheckpoint(checkpoint, config, cuts=cuts, without={PER_LAYER_KEY})

    def inner_widths(self, checkpoint: Checkpoint) -> list[int]:
        """How many channels each block of a dense model has now."""
        from prune._surgery import channel_width

        return [channel_width(checkpoint, index, "") for index in range(checkpoint.num_blocks)]

    def even_widths(self, checkpoint: Checkpoint, count: int) -> list[int]:
        """What would be left of each if all lost as large a share."""
        return [self.width_for(checkpoint, width, count) for width in self.inner_widths(checkpoint)]

    def width_for(self, checkpoint: Checkpoint, width: int, count: int) -> int:
        """What becomes of a network's width: of dense blocks in a mixture of experts as large a part as of experts."""
        total = self.total(checkpoint)
        if width == total:
            return count
        return min(width, max(1, round(width * count / total / self.multiple)) * self.multiple)

    def _config(self, checkpoint: Checkpoint, count: int) -> dict[str, object]:
        stated = with_defaults(checkpoint.config)
        keys = [key for key in ("intermediate_size", "moe_intermediate_size") if key in stated]
        return {key: self.width_for(checkpoint, stated[key], count) for key in keys}

    def read_width(self, checkpoint: Checkpoint) -> tuple[int, int]:
        return max((checkpoint.matrix_shape(name) for name in self.changed(checkpoint)), key=lambda shape: shape[1])

    def count(self, checkpoint: Checkpoint) -> int:
        if self.widths == "uneven" and checkpoint.architecture.experts is not None:
            raise InputError(
                f"{checkpoint.model_type} models are mixtures of experts, and these stay equally wide",
                where=self._where("widths"),
                hint="take widths: uniform",
            )
        return super().count(checkpoint)

    def cost(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Cost:
        from compress.core.memory import estimate

        cost = super().cost(checkpoint, calibration)
        if self.widths == "uniform":
            return cost
        look = estimate(checkpoint, calibration)
        return replace(cost, minutes=cost.minutes + look.minutes)

    def notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        if self.widths == "uniform":
            return super().notices(checkpoint)
        return (*super().notices(checkpoint), EXAMPLES_NOTICE)

    def run(self, job: Job) -> None:
        from prune._width import prune_channels

        prune_channels(self, job, self.count(job.checkpoint))


def _apart(settings: Channels, checkpoint: Checkpoint, widths: Sequence[int]) -> list[int]:
    """With uneven widths, as many channels in all that lie one step apart, two and two: what later stages plan with, so
    that groups which only divide some widths are refused before any work."""
    found, step = list(widths), settings.multiple
    if settings.widths == "uneven":
        most = settings.inner_widths(checkpoint)
        for low in range(0, len(found) - 1, 2):
            if found[low] > step and found[low + 1] + step <= most[low + 1] and found[low] < most[low]:
                found[low], found[low + 1] = found[low] - step, found[low + 1] + step
    return found
