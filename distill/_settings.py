"""What every method that trains has in common: data, optimizer, schedule, saves, and the plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import LayerPlan, Pass, Plan
from compress.core.patterns import covered
from compress.core.processes import launched, launched_here, launcher_shards
from compress.core.quantities import format_bytes

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint

MOST_READINGS = 8  # of the same text that a plan says nothing about


class Training(Pass):
    """Settings shared by the methods that train the model, on the rows of `calibration`, each time in a new order."""

    kind: ClassVar = "distill"
    takes: ClassVar = frozenset({"dense", "masked"})
    gives: ClassVar = None
    needs_calibration: ClassVar = True

    can_shard: ClassVar[bool] = False
    """Whether a loss can be computed of a model that is gathered block by block."""

    can_compile: ClassVar[bool] = False
    """Whether its steps are of equal length and its blocks as the model's family has them: one graph serves for all."""

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
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the products in forwards and backwards; weights, their updates and losses are fp32"
    )
    checkpointing: bool = Field(
        False, description="keep only the inputs of blocks for the way back: less memory, a third more time"
    )
    compile: bool = Field(
        False, description="compile the blocks of student and teacher first, by torch.compile: for long runs"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="AdamW with moments in fp32, or in 8 bits by bitsandbytes: 10 bytes a parameter, not 16"
    )
    shard: bool = Field(
        False, description="of several processes each holds a part of weights, gradients and moments, and no whole copy"
    )
    seed: int = Field(0, ge=0, description="of the order of rows")
    save_every: int = Field(50, ge=1, description="steps between two saves, from which a run that was killed goes on")

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part: as the settings or the launcher say, where there are several."""
        return launched() > 1 and self.joins and self.can_shard and (self.shard or launcher_shards())

    @property
    def transforms(self) -> tuple[str, ...]:
        return (self._name,)

    @abstractmethod
    def trained_tokens(self, tokens: Tokens | None) -> int:
        """How many tokens are read in all steps together, at most; of an unknown text, what can be known."""

    def text_tokens(self, tokens: Tokens) -> int:
        """How many tokens there are to train on before any is read again."""
        return tokens.count

    def longest(self, tokens: Tokens) -> int:
        """Tokens of the longest row of a step."""
        return tokens.ids.shape[1]

    def teacher_for(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Checkpoint | None:
        """What the student learns from, if that is a model. InputError, before any work, for one that cannot teach."""
        return None

    def taught_tokens(self, calibration: Tokens | None) -> int:
        """How many tokens the teacher reads while the student is beside it."""
        return self.trained_tokens(calibration)

    def extra_numbers(self, checkpoint: Checkpoint) -> int:
        """How many parameters are trained beside the model's."""
        return 0

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        """Memory of the student's weights, and of what the optimizer holds of them."""
        from distill._memory import whole_model_bytes

        return whole_model_bytes(self, checkpoint)

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        return self.planned(checkpoint, calibration, self.teacher_for(checkpoint, calibration))

    def planned(self, checkpoint: Checkpoint, calibration: Tokens | None, teacher: Checkpoint | None) -> Plan:
        """Bytes from headers; memory and minutes from the number of parameters."""
        import torch

        from distill._memory import leaner, parameters_of, reading_minutes, training_bytes

        self._require_shards()
        self._require_compiling(checkpoint, teacher)
        numbers = parameters_of(checkpoint)
        length = 1 if calibration is None else self.longest(calibration)
        trained = self.trained_tokens(calibration)
        taught = 0 if teacher is None else self.taught_tokens(calibration)
        beside = teacher if taught else None
        minutes = (3 + self.checkpointing) * reading_minutes(checkpoint, trained)  # a way back is two forwards
        minutes += reading_minutes(beside, taught) if beside else 0.0
        processes = launched() if self.joins else 1
        here = launched_here() if self.joins and not torch.cuda.is_available() else 1  # each GPU has its own memory
        rows = self.batch if calibration is None else len(calibration.ids)
        times = 0 if calibration is None else trained / self.text_tokens(calibration)
        each_bytes = training_bytes(self, checkpoint, beside, length)
        return Plan(
            notices=(*_readings(times, self.batch, rows), *self._notices_for(processes, each_bytes)),
            layers=tuple(layer_plans(checkpoint)),
            bytes_out=sum(info.bytes for info in checkpoint.tensors.values()),
            peak_memory_bytes=here * each_bytes,
            disk_bytes=(4 + 2 * 12) * numbers,  # the result in fp32, and two saves
            minutes=minutes / processes,
            leaner=tuple((words, here * size) for words, size in leaner(self, checkpoint, beside, length)),
        )

    def _notices_for(self, processes: int, each_bytes: int) -> Iterator[str]:
        if processes > 1:
            what = "a part of the student" if self.sharded else "a whole student"
            yield f"each of {processes} processes trains {what} and takes up to {format_bytes(each_bytes)}"
        elif self.shard:
            yield "shard: true is for several processes, and there is one: it holds the whole student"
        if launcher_shards() and not self.sharded:
            yield f"the launcher asked for FSDP, and {self._name} does not cut a model up"
        if self.compile:
            yield "the blocks are compiled in the first steps, which takes up to some minutes in each run"

    def _require_shards(self) -> None:
        """UsageError for settings that do not work in parts."""
        where = "distill.shard"
        if self.shard and not self.can_shard:
            raise UsageError(f"{self._name} does not cut a model up", where=where, hint="logits and sequence do")
        if self.shard and not self.joins:
            raise UsageError("with these settings one process trains, and a model is cut up for several", where=where)
        if self.sharded and self.optimizer == "adamw8bit":
            hint = f"optimizer: adamw: {launched()} processes hold {round(16 / launched(), 1):g} bytes a parameter each"
            raise UsageError("moments of 8 bits are not cut up", where="distill.optimizer", hint=hint)

    def _require_compiling(self, checkpoint: Checkpoint, teacher: Checkpoint | None) -> None:
        """UsageError for what is not compiled, EnvironmentRefused where nothing can be."""
        if not self.compile:
            return
        where = "distill.compile"
        if not self.can_compile:
            raise UsageError(f"{self._name} does not compile blocks", where=where, hint="logits and features do")
        models = [model for model in (checkpoint, teacher) if model is not None]
        if any(model.expert_count(index) for model in models for index in range(model.num_blocks)):
            message = "blocks with experts are not compiled: which of them compute depends on the text"
            raise UsageError(message, where=where, hint="compile: false")
        if self.sharded:
            raise UsageError("a model in parts is not compiled", where=where, hint="compile: false, or shard: false")
        import torch

        from compress.core.inductor import require_inductor

        require_inductor("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def _name(self) -> str:
        return type(self).__module__.rpartition(".")[2]


def _readings(times: float, batch: int, rows: int) -> Iterator[str]:
    """What is worth knowing of a text that is short for the training."""
    if batch > rows:
        yield f"a step of {batch} rows takes some of the text's {rows} several times"
    if times > MOST_READINGS:
        yield (
            f"training reads the {rows} rows of calibration text {times:.0f} times over, and will learn them by heart: "
            "give more samples of text, or train on fewer tokens"
        )


def layer_plans(checkpoint: Checkpoint, trained: Sequence[str] = ("*",)) -> list[LayerPlan]:
    """The linear layers of the blocks as they are; those that a name pattern of `trained` covers are trained."""
    found = []
    for index in range(checkpoint.num_blocks):
        for name in checkpoint.sites(index):
            size = sum(checkpoint.info(stored).bytes for stored in checkpoint.stored_names(name))
            reason = "trained" if covered(name, trained) else ""
            scheme = checkpoint.schemes.get(name)
            found.append(LayerPlan(name, checkpoint.matrix_shape(name), size, size, scheme, reason))
    return found
