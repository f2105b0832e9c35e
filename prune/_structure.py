"""What every method that makes a model smaller has in common: how much goes, and the plan.

The result is a plain dense model: whole rows and columns are gone, config.json says the new sizes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import LayerPlan, Pass, Plan
from compress.core.quantities import Fraction, Size, format_bytes
from prune._parts import changed, tidy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost
    from compress.core.reshaped import ReshapedCheckpoint

DEFAULT_RATIO = 0.25
_TARGETS = ("ratio", "keep", "parameters", "max_size", "latency")


class StructuredPruning(Pass):
    """Settings shared by the methods that take whole structures out: how many of them, by one of four targets."""

    kind: ClassVar = "prune"
    takes: ClassVar = frozenset({"dense"})
    gives: ClassVar = "dense"
    only_reads: ClassVar[bool] = False
    """Whether its walk over the blocks gathers nothing of the size of their inputs' curvature, and solves nothing."""

    ratio: Annotated[Fraction, Field(gt=0, lt=1)] | None = Field(
        None, description="share that goes, 0.25 or 25%, the default; or one of the others:"
    )
    keep: int | None = Field(None, ge=1, description="how many stay")
    parameters: int | None = Field(None, ge=1, description="the most parameters that the whole model may have then")
    max_size: Size | None = Field(None, description="the most bytes that its weights may take then, such as 120MB")
    latency: Fraction | None = Field(
        None,
        description="the most of the original's time per token that one may take then, such as 80%: in the bundled "
        "runtime, one request at a time, measured on this machine before the run",
    )
    parts: int = Field(
        1, ge=1, le=32, description="of keep, parameters and max_size: stages to go, of which this is the first (steps)"
    )

    def model_post_init(self, context: object) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same thing in two ways: leave one of them out")
        if self.parts > 1 and given in ([], ["ratio"], ["latency"]):
            raise ValueError("parts goes with keep, parameters or max_size: others are shares of what is there anyway")

    def part(self, number: int, count: int) -> StructuredPruning:
        """As large a share of what is there in each step: so large that together they reach the target."""
        if self.latency is not None:
            return changed(self, latency=tidy(self.latency ** (1 / count)))
        if any(getattr(self, name) is not None for name in _TARGETS[1:]):
            return changed(self, parts=count - number + 1)
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        return changed(self, ratio=tidy(1 - (1 - ratio) ** (1 / count)))

    # what a method says of itself

    @property
    @abstractmethod
    def what(self) -> str:
        """What is taken out, in words: key-value heads."""

    @abstractmethod
    def total(self, checkpoint: Checkpoint) -> int:
        """How many there are."""

    def step(self, checkpoint: Checkpoint) -> int:
        """Counts are multiples of this."""
        return 1

    @abstractmethod
    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        """The model with `count` of them, whichever these are: shapes and config are those of the result."""

    def solver_bytes(self, checkpoint: Checkpoint) -> int:
        """Memory of the work on the largest block, beside weights and statistics."""
        return 0

    # how many stay

    def count(self, checkpoint: Checkpoint) -> int:
        """How many stay. UsageError for a target that cannot be met."""
        total, step = self.total(checkpoint), self.step(checkpoint)
        count = self._target(checkpoint, total, step)
        between = round(total * (count / total) ** (1 / self.parts) / step) * step  # as large a share in every part
        return count if self.parts == 1 else max(count, min(total, between))

    def _target(self, checkpoint: Checkpoint, total: int, step: int) -> int:
        if self.keep is not None:
            return self._kept(self.keep, total, step)
        if self.parameters is not None:
            return self._largest(checkpoint, total, step, "parameters", self.parameters)
        if self.max_size is not None:
            return self._largest(checkpoint, total, step, "max_size", self.max_size)
        if self.latency is not None:
            raise UsageError("latency is measured by a run, which says how many stay", where=self._where("latency"))
        ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
        count = round((1 - ratio) * total / step) * step
        if not 0 < count < total:
            fate, least = ("all", "at most") if count == 0 else ("none", "at least")
            limit = (total - step) / total if count == 0 else step / total
            raise UsageError(
                f"ratio {ratio:g} of {total} {self.what} would remove {fate}" + self._in_steps(step),
                where=self._where("ratio"),
                hint=f"choose {least} {limit:.3g}" if 0 < limit < 1 else self._too_few(step),
            )
        return count

    def _too_few(self, step: int) -> str:
        return "lower multiple" if step > 1 and hasattr(self, "multiple") else "this model has too few of them"

    def _kept(self, keep: int, total: int, step: int) -> int:
        if keep > total:
            raise UsageError(f"keep {keep}: there are only {total} {self.what}", where=self._where("keep"))
        if keep % step and keep != total:
            raise UsageError(
                f"keep {keep} {self.what} does not work" + self._in_steps(step),
                where=self._where("keep"),
                hint=f"{max(step, keep // step * step)} would",
            )
        return keep

    def _largest(self, checkpoint: Checkpoint, total: int, step: int, target: str, limit: int) -> int:
        """The largest count that keeps the model within `limit`."""
        counts = [*range(step, total, step), total]
        low, high = 0, len(counts)  # counts before low fit, those from high on do not
        while low < high:
            middle = (low + high) // 2
            fits = _measure(self.shrunk(checkpoint, counts[middle]), target) <= limit
            low, high = (middle + 1, high) if fits else (low, middle)
        if low == 0:
            least = _measure(self.shrunk(checkpoint, counts[0]), target)
            raise UsageError(
                f"{target} {_amount(limit, target)} cannot be reached by {self.what} alone: with {counts[0]} of "
                f"{total} of them the model has {_amount(least, target)}",
                where=self._where(target),
                hint="choose at least that, or take other structures out, too, in a stage before",
            )
        return counts[low - 1]

    def _in_steps(self, step: int) -> str:
        return f": they go in steps of {step}" if step > 1 else ""

    def _where(self, field: str) -> str:
        return f"prune.{field}"

    # the plan

    def after(self, checkpoint: Checkpoint) -> Checkpoint:
        return self.shrunk(checkpoint, self.count(checkpoint))

    @property
    def transforms(self) -> tuple[str, ...]:
        return (type(self).__module__.rpartition(".")[2],)

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """Bytes from headers; memory and minutes from the shapes."""
        count, total = self.count(checkpoint), self.total(checkpoint)
        smaller = self.shrunk(checkpoint, count)
        added_bytes = self.added_bytes(checkpoint, smaller)
        bytes_out = sum(info.bytes for info in smaller.tensors.values()) + added_bytes
        cost = self.cost(checkpoint, calibration if self.calibrated else None)
        return Plan(
            layers=tuple(self._layers(checkpoint, smaller)),
            bytes_out=bytes_out,
            peak_memory_bytes=cost.memory_bytes + self.solver_bytes(checkpoint),
            disk_bytes=self.stage_bytes(checkpoint, smaller) + added_bytes + cost.spill_bytes,
            minutes=cost.minutes,
            notices=(self._told(count, total), *self.notices(checkpoint)),
        )

    def cost(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Cost:
        """Of the walk over the blocks."""
        from compress.core.memory import estimate, reading_cost

        if self.only_reads:
            return reading_cost(checkpoint, calibration, blocks=checkpoint.num_blocks, heads=0, beside_bytes=0)
        return estimate(checkpoint, calibration, true_sequential=True)

    def _told(self, count: int, total: int) -> str:
        if count == total and self.parts == 1:
            return f"all {total} {self.what} stay: the model is within what is asked for as it is"
        return f"{count} of {total} {self.what} stay"

    def stage_bytes(self, checkpoint: Checkpoint, smaller: Checkpoint) -> int:
        """What the stage writes: more than the result where it keeps what it changed in fp32."""
        return sum(info.bytes for info in smaller.tensors.values())

    def added_bytes(self, checkpoint: Checkpoint, smaller: Checkpoint) -> int:
        """Of tensors that the original does not have."""
        return 0

    def notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """What else is worth knowing before."""
        return ()

    def _layers(self, checkpoint: Checkpoint, smaller: Checkpoint) -> Iterator[LayerPlan]:
        for name in dict.fromkeys((checkpoint.embedding_tensor, checkpoint.head_tensor)):
            before, after = checkpoint.info(name), smaller.info(name)
            if before.shape != after.shape:
                shape, becomes = ((rows, width) for rows, width in (before.shape, after.shape))
                module = name.removesuffix(".weight")
                yield LayerPlan(module, shape, before.bytes, after.bytes, becomes=becomes)
        for index in range(checkpoint.num_blocks):
            for name in checkpoint.sites(index):
                weight = f"{name}.weight"
                before, shape = checkpoint.info(weight).bytes, checkpoint.matrix_shape(name)
                if weight not in smaller.tensors:
                    yield LayerPlan(name, shape, before, 0, reason="as many blocks, or experts, go")
                    continue
                becomes = smaller.matrix_shape(name)
                after = smaller.info(weight).bytes
                yield LayerPlan(name, shape, before, after, becomes=becomes if becomes != shape else None)


def _measure(checkpoint: Checkpoint, target: str) -> int:
    """Parameters, or bytes as the result will have them: a stage before may have left matrices in fp32."""
    infos = checkpoint.tensors.values()
    if target == "parameters":
        return sum(math.prod(info.shape) for info in infos)
    size = checkpoint.dtype.itemsize
    return sum(math.prod(info.shape) * size if len(info.shape) == 2 else info.bytes for info in infos)


def _amount(value: int, target: str) -> str:
    return f"{value:,}" if target == "parameters" else f"{value:,} bytes ({format_bytes(value)})"
