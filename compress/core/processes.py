"""Processes that were started together for one run, by `accelerate launch` or torchrun: what they tell each other.

The main process runs the pipeline; the others wait for its word and compute with it. Words are JSON and tensors,
nothing is pickled. Without a launcher there is one process, and all of this costs nothing.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from compress.core.errors import ResourceError, UsageError
from compress.core.lazy import lazy_module

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

torch = lazy_module("torch")

Message = tuple[Mapping[str, Any], Mapping[str, "Tensor"]]
"""Plain data, and tensors by name."""

PATIENCE = timedelta(days=30)  # pruning and evaluation go on meanwhile
_BUCKET = 1 << 24  # numbers that are summed together


class Dismissed(Exception):
    """The main process needs the others no more."""


def launched() -> int:
    """How many processes the launcher started; 1 without one. Imports nothing."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def require_launched() -> None:
    """UsageError if a launcher was asked for several processes and started this one alone."""
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        raise UsageError(
            "accelerate launch --cpu starts one process, however many are asked for",
            hint="accelerate launch --multi_gpu starts them, also without a GPU, and so does torchrun --nproc-per-node",
        )


def launcher_shards() -> bool:
    """Whether the launcher was asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and launched() > 1


def launched_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if launched() > 1 else 1


@dataclass(frozen=True, slots=True)
class Processes:
    """All processes of a run, seen from process `rank` of `count`. `place` is its number on its machine."""

    rank: int = 0
    count: int = 1
    place: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this one runs the pipeline, writes and speaks."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """This process's own device of the kind asked for."""
        return f"cuda:{self.place}" if self.count > 1 and asked.startswith("cuda") else asked

    def share(self, make: Callable[[], Message]) -> Message:
        """What `make` gives in the main process, in all of them; tensors come as they are on the CPU."""
        if self.count == 1:
            return make()
        if self.is_main:
            data, tensors = make()
            self.tell(data, tensors)
            return data, tensors
        return self.hear()

    def tell(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """From the main process to those that hear()."""
        kinds = {name: (str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in tensors.items()}
        text = json.dumps({"data": data, "tensors": kinds}).encode()
        self._broadcast(torch.tensor([len(text)]))
        self._broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        for value in tensors.values():
            self._broadcast(value.detach().cpu().contiguous().flatten().view(torch.uint8))

    def hear(self) -> Message:
        """What the main process tells next. Dismissed if that is the end."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        if not int(length):
            raise Dismissed
        text = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(text)
        message = json.loads(text.numpy().tobytes())
        tensors = {}
        for name, (dtype, shape) in message["tensors"].items():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self._broadcast(tensors[name].flatten().view(torch.uint8))
        return message["data"], tensors

    def dismiss(self) -> None:
        """Let the others end; they must be waiting for a word."""
        self._broadcast(torch.zeros(1, dtype=torch.int64))
        self.leave()

    def leave(self) -> None:
        """Close the connection to the others: nothing is to be told or heard any more."""
        torch.distributed.destroy_process_group()

    def add_up(self, values: Iterable[Tensor]) -> None:
        """Sum tensors over all processes, in place; in the same order everywhere, so that all get the same bits."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for value in values:
            bucket.append(value)
            if sum(each.numel() for each in bucket) >= _BUCKET:
                self._add_up(bucket)
                bucket = []
        if bucket:
            self._add_up(bucket)

    def _add_up(self, values: list[Tensor]) -> None:
        flat = torch.cat([value.flatten() for value in values])
        group = self.control if flat.device.type == "cpu" else None  # None: by the GPUs' own library
        with others_are_there():
            torch.distributed.all_reduce(flat, group=group)
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))

    def gather(self, rows: Tensor, count: int) -> Tensor | None:
        """In the main process `count` rows, on the CPU, of which each process has as many as the others, or fewer at
        the end; None in the others."""
        each = -(-count // self.count)
        own = torch.zeros(each, *rows.shape[1:], dtype=rows.dtype)
        own[: len(rows)] = rows
        parts = [torch.empty_like(own) for _ in range(self.count)] if self.is_main else None
        with others_are_there():
            torch.distributed.gather(own, parts, dst=0, group=self.control)
        return None if parts is None else torch.cat(parts)[:count]

    def _broadcast(self, value: Tensor) -> None:
        if not value.numel():
            return
        with others_are_there():
            torch.distributed.broadcast(value, 0, group=self.control)


ALONE = Processes()


@cache
def current() -> Processes:
    """The processes of this run. The first call waits until all of them have called it."""
    if launched() == 1:
        return ALONE
    from accelerate import PartialState

    with warnings.catch_warnings(), others_are_there():
        warnings.simplefilter("ignore")  # accelerate tells how many threads it chose
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, state.local_process_index, control)


def end_with_launcher() -> None:
    """Let SIGTERM end the main process with a ResourceError: a launcher sends it when one of the others has failed."""

    def end(_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if _is_finalizing(frame):
            signal.signal(signal.SIGALRM, end)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        raise ResourceError(
            "the launcher has ended this run: another of its processes has failed, or it was told to stop",
            hint="see what was printed; the same command goes on where the run was",
        )

    signal.signal(signal.SIGTERM, end)


def _is_finalizing(frame: FrameType | None) -> bool:
    """Whether this runs inside a finalizer, where what is raised is lost."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def others_are_there(*, among_others: bool = False) -> Iterator[None]:
    """ResourceError where one of them is gone. `among_others`: inside is more than talk, which can fail, too."""
    try:
        yield
    except RuntimeError as error:  # gloo's own have no class
        if among_others and not (
            isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo" in str(error)
        ):
            raise
        raise ResourceError(
            "another process of this run has ended or cannot be reached",
            hint="see what it printed; the same command goes on where the run was",
        ) from error
