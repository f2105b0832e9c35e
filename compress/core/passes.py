"""Pass: one method as data plus two functions. Plan: what it will cost. Job: what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from compress.core.events import Listener, silent
from compress.core.memory import SPILL_ABOVE_BYTES
from compress.core.processes import ALONE, Processes

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.curvature import Curvature
    from compress.core.saves import Saves
    from compress.core.scheme import Scheme
    from compress.core.services import OpenSampler
    from compress.core.statistics import Statistic
    from compress.core.tensors import QuantTensor
    from compress.core.walk import Block, BlockSink, Preparation, Watch

WeightKind = Literal["dense", "masked", "quantized"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one linear layer: its scheme, or the share of its weights that becomes zero, or the shape that it
    shrinks to, or the reason why it stays as it is. With `alternatives` it gets one of these schemes, found out while
    the stage runs; scheme and bytes are then those of a uniform choice."""

    name: str
    shape: tuple[int, int]
    bytes_in: int
    bytes_out: int
    scheme: Scheme | None = None
    reason: str = ""
    alternatives: tuple[Scheme, ...] = ()
    sparsity: float | None = None
    becomes: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stage will do and cost, known before it starts. Bytes, bytes, bytes, minutes."""

    layers: tuple[LayerPlan, ...]
    bytes_out: int
    peak_memory_bytes: int
    disk_bytes: int
    minutes: float
    notices: tuple[str, ...] = ()
    leaner: tuple[tuple[str, int], ...] = ()
    """Other settings, as written in a recipe, with the peak memory that they would need; the mildest change first."""


@dataclass(frozen=True)
class Job:
    """One stage's surroundings. `original` is what the run started from: what stays dense is stored in its dtypes.

    Methods read from here and write through `walk`; they open no files themselves."""

    checkpoint: Checkpoint
    calibration: Tokens | None
    sink: BlockSink
    original: Checkpoint | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    micro_batch: int | None = None
    spill_folder: str | None = None
    spill_above_bytes: int = SPILL_ABOVE_BYTES
    events: Listener = silent
    open_sampler: OpenSampler | None = None
    saves: Saves | None = None
    kept_blocks: tuple[int, ...] | None = None
    """Which block of `original` each block of `checkpoint` was; None if the run does not know."""
    processes: Processes = ALONE
    zeros_stay: bool = False
    """Whether zeros among the weights are chosen, also where these are quantized by now."""
    notes: list[str] = field(default_factory=list)
    remember: Callable[[str, Callable[[], Any]], Any] = lambda name, compute: compute()
    """remember(name, compute): what `compute` gives as plain data; a resumed run gets it without computing again."""
    keep: Callable[[str, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]] = lambda name, compute: compute()
    """keep(name, compute): the same for tensors, which go to a file."""

    def walk(
        self,
        collect: frozenset[type[Statistic]] = frozenset(),
        order: Literal["block", "groups"] = "block",
        keep: frozenset[str] = frozenset(),
        calibrate: bool = True,
        preparation: Preparation | None = None,
    ) -> Iterator[Block]:
        """The calibration generator bound to this job; `calibrate=False` walks the weights without any forward."""
        from compress.core.walk import walk

        return walk(
            self.checkpoint,
            self.calibration if calibrate else None,
            collect=collect,
            order=order,
            keep=keep,
            preparation=preparation,
            sink=self.sink,
            stored_like=self.original,
            **self._means,
        )

    def measure(
        self,
        collect: frozenset[type[Statistic]] = frozenset(),
        calibrate: bool = True,
        keep: frozenset[str] = frozenset(),
        watch: Watch | None = None,
    ) -> Iterator[Block]:
        """Every block as it is, with statistics of its inputs, for what must see all layers before the work. `watch`
        sees single modules at work."""
        from compress.core.walk import measure

        tokens = self.calibration if calibrate else None
        return measure(self.checkpoint, tokens, collect, keep=keep, watch=watch, **self._means)

    def logits(self, source: Checkpoint) -> Iterator[Tensor]:
        """Logits [B, T, V] of `source` on the calibration tokens, with one block in memory at a time."""
        from compress.core.walk import stream_logits

        if self.calibration is None:
            return iter(())
        means = {name: value for name, value in self._means.items() if name != "events"}
        return stream_logits(source, self.calibration, **means)

    def onto(self, source: Checkpoint) -> Job:
        """The same stage, reading and writing `source` instead: names, numbers of blocks and config are its own."""
        self.sink.become(source)
        return replace(self, checkpoint=source)

    def curvatures(self, tokens: Tokens, *, vocabulary: bool) -> Iterator[Curvature]:
        """How much the model minds errors in each layer, on these tokens; `vocabulary`: of embedding and head, too."""
        from compress.core.curvature import curvatures

        return curvatures(self.checkpoint, tokens, vocabulary=vocabulary, seed=self.seed, **self._means)

    @property
    def _means(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": self.dtype,
            "micro_batch": self.micro_batch,
            "spill_folder": self.spill_folder,
            "spill_above_bytes": self.spill_above_bytes,
            "events": self.events,
        }


class Pass(BaseModel, ABC):
    """One method. Its fields are its settings (the words of the recipe); unknown keys are refused.

    `takes` are the kinds of checkpoint it accepts, `gives` the kind it leaves (None: the kind it took). `formats` can
    hold what it gives: its stage keeps it in the first.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)

    kind: ClassVar[Literal["prune", "distill", "quantize", "kv_cache"]]
    takes: ClassVar[frozenset[WeightKind]]
    gives: ClassVar[WeightKind | None]
    paper: ClassVar[str]
    needs_calibration: ClassVar[bool]
    renumbers_tokens: ClassVar[bool] = False
    """Whether tokens have other ids after it. It remembers as "kept" which of the old ones stay, in the new order."""
    renumbers_blocks: ClassVar[bool] = False
    """Whether blocks have other numbers after it. It remembers as "kept" which of the old ones stay, ascending."""
    formats: ClassVar[tuple[str, ...]] = ("compressed-tensors", "gptq", "awq")

    samples: int | None = Field(
        None, ge=1, description="look at so many rows of the calibration text at most, the first; at all, unless given"
    )

    def text(self, calibration: Tokens | None) -> Tokens | None:
        """The part of the recipe's calibration text that is for this pass."""
        return calibration if calibration is None or self.samples is None else calibration.rows(self.samples)

    def refusal(self, kind: WeightKind) -> str | None:
        """Why these settings cannot work on weights of `kind`, as what follows the method's name; None if they can."""
        return None if kind in self.takes else f"takes {' or '.join(sorted(self.takes))} weights"

    @property
    def joins(self) -> bool:
        """Whether the processes that a launcher started beside the main one take part in its work."""
        return False

    @property
    def calibrated(self) -> bool:
        """Whether these settings need calibration data."""
        return self.needs_calibration

    @property
    def transforms(self) -> tuple[str, ...]:
        """What changes weights beside the method proper, by name: such weights do not resemble the source's."""
        return ()

    def located(self, base_folder: Path) -> Self:
        """These settings with the paths in them made absolute: relative ones start at `base_folder`."""
        return self

    def after(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the shapes and the config that this pass leaves: what later stages plan with. Which rows
        and columns stay is known only when it has run."""
        return checkpoint

    def part(self, number: int, count: int) -> Pass:
        """This pass as step `number` (from 1) of `count` with which it reaches its target; itself if it has none."""
        return self

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as this pass reads it: itself, or a view that transforms tensors as they are read."""
        return checkpoint

    def outside(self, job: Job) -> Mapping[str, QuantTensor]:
        """What becomes of modules outside the blocks, embedding and head; those left out stay as they are."""
        return {}

    @abstractmethod
    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """What `run` will touch, write and take. Reads headers only; raises CompressError for what cannot work."""

    @abstractmethod
    def run(self, job: Job) -> None:
        """Do it, block by block, through `job.walk`."""
