"""What every method that sets single weights to zero has in common: how many, in which pattern, and the plan."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from compress.core.errors import UsageError
from compress.core.passes import Job, LayerPlan, Pass, Plan
from compress.core.patterns import Pattern, covered, unused
from compress.core.quantities import Fraction
from prune._parts import changed, tidy
from prune._pattern import Spread, parse_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.memory import Cost
    from compress.core.walk import Group, Site

DEFAULT_SPARSITY = 0.5
_SENSED = 9  # sparsities that are judged for each layer
_SCORE_PASSES = 60  # over a layer's weights to find its lowest scores
_DENSE_ON_DISK = (
    "zeros are stored like other weights: they make the artifact no smaller, and an engine that does not look for them "
    "no faster"
)


def _known_pattern(pattern: str) -> str:
    parse_pattern(pattern)
    return pattern


class WeightPruning(Pass):
    """Settings shared by the methods that set single weights of the blocks' linear layers to zero."""

    kind: ClassVar = "prune"
    takes: ClassVar = frozenset({"dense", "masked"})
    gives: ClassVar = "masked"

    sparsity: Annotated[Fraction, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the weights that become zero, default 0.5; a pattern N:M says it itself"
    )
    pattern: Annotated[str, AfterValidator(_known_pattern)] = Field(
        "unstructured", description="where zeros may lie: unstructured, or N:M, N weights kept of M neighbours: '2:4'"
    )
    allocation: Literal["uniform", "owl", "sensitivity"] = Field(
        "uniform",
        description="the same sparsity everywhere, less in blocks with outliers (OWL), or less in layers whose errors "
        "the model minds",
    )
    owl_spread: float = Field(
        0.08, gt=0, lt=0.5, description="of owl: sparsities lie this far around the one that is asked for"
    )
    owl_outlier: float = Field(
        5.0, gt=1, description="of owl: a weight's product with its input is an outlier from this multiple of the mean"
    )
    sensitivity_spread: float = Field(
        0.2, gt=0, lt=0.5, description="of sensitivity: sparsities lie this far around the one that is asked for"
    )
    sensitivity_tokens: int = Field(
        16384, ge=64, description="of sensitivity: calibration tokens that it is measured on"
    )
    ignore: tuple[Pattern, ...] = Field(
        (), description="layers left alone, by name pattern: '*.down_proj', 'model.layers.0.*'"
    )

    def model_post_init(self, context: object) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        group = parse_pattern(self.pattern)
        if group is None:
            if self.compares_all and self.allocation != "uniform":
                return (
                    f"compare: global finds the sparsity of each layer itself: leave out allocation {self.allocation}"
                )
            return None
        if self.sparsity is not None and abs(self.sparsity - group.sparsity) > 1e-9:
            return f"pattern {self.pattern} has a sparsity of {group.sparsity:g}, not {self.sparsity:g}: leave it out"
        if self.allocation != "uniform":
            return (
                f"pattern {self.pattern} has one sparsity everywhere: allocation {self.allocation} needs unstructured"
            )
        return None

    def part(self, number: int, count: int) -> WeightPruning:
        """Sparsities rise quickly at first and slowly then (Zhu & Gupta, 2017, arXiv:1710.01878). Of a pattern more and
        more of the M neighbours go."""
        if number == count:
            return self
        rise = 1 - (1 - number / count) ** 3
        if self.spread is None:
            return changed(self, sparsity=tidy(self.share * rise))
        dropped = max(1, round((self.spread.among - self.spread.kept) * rise))
        return changed(self, sparsity=None, pattern=f"{self.spread.among - dropped}:{self.spread.among}")

    @cached_property
    def spread(self) -> Spread | None:
        """N of M of the pattern; None: unstructured."""
        return parse_pattern(self.pattern)

    @property
    def share(self) -> float:
        """Of the weights that become zero."""
        if self.spread is not None:
            return self.spread.sparsity
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def compares_all(self) -> bool:
        """Whether one threshold cuts all layers, each of which gets the sparsity that follows from it."""
        return False

    @property
    def transforms(self) -> tuple[str, ...]:
        return (type(self).__module__.rpartition(".")[2],)

    @property
    def calibrated(self) -> bool:
        return self.needs_calibration or self.allocation != "uniform"

    @property
    def sequential(self) -> bool:
        """Whether statistics are gathered group by group (true-sequential) instead of once a block."""
        return False

    def solver_bytes(self, rows: int, width: int) -> int:
        """Memory of the work on one layer, beside its input's statistics: weight, scores and mask, in fp32."""
        return 3 * 4 * rows * width

    def solver_operations(self, rows: int, width: int) -> float:
        """Of the work on one layer, beyond those of a sweep."""
        return 0

    def chosen(self, group: Group) -> list[Site]:
        """The layers of a group that are not left alone."""
        return [site for site in group.sites if not covered(site.name, self.ignore)]

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """Bytes from headers; memory and minutes from the shapes."""
        from compress.core.memory import estimate, machine_speed

        layers = tuple(self._layers(checkpoint))
        if not any(layer.sparsity is not None for layer in layers):
            raise UsageError("every layer is ignored: there is nothing to prune", hint="shorten `ignore`")
        self._refuse_ragged(layers)
        bytes_in = sum(info.bytes for info in checkpoint.tensors.values())
        pruned = [layer for layer in layers if layer.sparsity is not None]
        numbers = sum(layer.shape[0] * layer.shape[1] for layer in pruned)
        kept_bytes = bytes_in - sum(layer.bytes_in for layer in pruned)
        operations = sum(self.solver_operations(*layer.shape) for layer in pruned)
        cost = estimate(checkpoint, calibration if self.calibrated else None, true_sequential=self.sequential)
        sensing = self._sensing(checkpoint, calibration, max((layer.shape for layer in pruned), key=math.prod))
        solver_bytes = max(self.solver_bytes(*layer.shape) for layer in pruned)
        written_bytes = kept_bytes + 4 * numbers  # a stage keeps what it changed in fp32
        return Plan(
            layers=layers,
            bytes_out=bytes_in,
            peak_memory_bytes=max(cost.memory_bytes + solver_bytes, sensing.memory_bytes),
            disk_bytes=max(written_bytes + cost.spill_bytes, sensing.spill_bytes),
            minutes=cost.minutes + sensing.minutes + operations / machine_speed().matmul / 60,
            notices=(*unused("ignore", self.ignore, (layer.name for layer in layers)), _DENSE_ON_DISK),
        )

    def _sensing(self, checkpoint: Checkpoint, calibration: Tokens | None, largest: tuple[int, int]) -> Cost:
        """What finding out the sparsities takes, beyond a pass like that of the work."""
        from compress.core.memory import Cost, sensing_cost

        if self.allocation != "sensitivity" or calibration is None:
            return Cost(0, 0, 0)
        tokens = calibration.first(self.sensitivity_tokens)
        cost = sensing_cost(checkpoint, tokens, choices=_SENSED, passes=_SCORE_PASSES, forwards=2)
        return Cost(cost.memory_bytes + WeightPruning.solver_bytes(self, *largest), cost.spill_bytes, cost.minutes)

    def _layers(self, checkpoint: Checkpoint) -> Iterator[LayerPlan]:
        for index in range(checkpoint.num_blocks):
            for name in checkpoint.sites(index):
                size = checkpoint.info(f"{name}.weight").bytes
                ignored = covered(name, self.ignore)
                reason = "ignored by the recipe" if ignored else self._reason
                shape = checkpoint.matrix_shape(name)
                yield LayerPlan(name, shape, size, size, reason=reason, sparsity=None if ignored else self.share)

    @property
    def _reason(self) -> str:
        """What else there is to say about a layer's zeros."""
        if self.spread is not None:
            return f"{self.pattern}"
        return "on the whole, more or less of it by block or layer" if self.allocation != "uniform" else ""

    def _refuse_ragged(self, layers: tuple[LayerPlan, ...]) -> None:
        spread = self.spread
        if spread is None:
            return
        ragged = [layer for layer in layers if layer.sparsity is not None and layer.shape[1] % spread.among]
        if ragged:
            raise UsageError(
                f"pattern {self.pattern} does not fit {len(ragged)} layers, e.g. {ragged[0].name}: {spread.among} does "
                f"not divide its {ragged[0].shape[1]} input channels",
                where="prune.pattern",
                hint="leave these layers alone with `ignore`, or choose another pattern",
            )


class UpdatingPruning(WeightPruning):
    """Settings of the methods whose weights that stay make up for those that go."""

    needs_calibration: ClassVar = True

    damping: float = Field(0.01, gt=0, le=10, description="part of the Hessian's mean diagonal that is added to it")
    order: Literal["block", "groups"] = Field(
        "groups", description="statistics of each group after the groups before it (true sequential), or once a block"
    )

    @property
    def sequential(self) -> bool:
        return self.order == "groups"

    @abstractmethod
    def prune_group(self, group: Group, sites: Sequence[Site], shares: Mapping[str, float], job: Job) -> None:
        """Prune layers that share the group's input, each by its share."""

    def run(self, job: Job) -> None:
        from compress.core.statistics import Hessian
        from prune._allocation import shares_of

        shares = shares_of(self, job)
        for block in job.walk(frozenset({Hessian}), self.order):
            for group in block.groups:
                sites = self.chosen(group)
                if sites:
                    self.prune_group(group, sites, shares, job)
                group.release()
