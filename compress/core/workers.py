"""Workers: the processes beside the main one. They run the same pass on the same inputs, and write nothing."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.core.errors import CompressError
from compress.core.passes import Job, Pass
from compress.core.processes import Dismissed, Processes, current

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.checkpoint import Checkpoint
    from compress.core.cuts import Cuts
    from compress.core.tensors import QuantTensor
    from compress.core.walk import BlockRecord

MOURNING_SECONDS = 10.0  # the main process most likely fails of the same cause: it speaks


class NoSink:
    """A BlockSink for a process that must not write."""

    def finished(self) -> int:
        return 0

    def load(self, index: int) -> Mapping[str, Tensor | QuantTensor]:
        raise _writes()

    def record(self, index: int) -> BlockRecord:
        raise _writes()

    def commit(self, index: int, tensors: dict[str, Tensor | QuantTensor], record: BlockRecord, cuts: Cuts) -> None:
        raise _writes()

    def become(self, source: Checkpoint) -> None:
        raise _writes()

    def attach(self, name: str, content: str | Mapping[str, Tensor]) -> None:
        raise _writes()

    def add(self, describe: Callable[[dict[str, Any]], dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        raise _writes()


def _writes() -> RuntimeError:
    return RuntimeError("a process beside the main one was about to write")


@dataclass(frozen=True, slots=True)
class Order:
    """One stage that all processes work on: the pass by its name and settings, and what a Job is made of."""

    kind: str
    method: str
    settings: dict[str, Any]
    checkpoint: str
    original: str | None
    seed: int
    device: str
    dtype: str
    kept_blocks: list[int] | None
    allow_code: list[str]


def joined(settings: Pass, method: str, job: Job, allow_code: tuple[str, ...] = ()) -> Job:
    """The job with the processes that were started beside this one, which begin to work on the same; the job itself if
    there are none, or the pass works alone."""
    processes = current()
    if processes.count == 1 or not settings.joins:
        return job
    order = Order(
        kind=settings.kind,
        method=method,
        settings=settings.model_dump(mode="json"),
        checkpoint=str(job.checkpoint.folder.absolute()),
        original=str(job.original.folder.absolute()) if job.original else None,
        seed=job.seed,
        device=job.device,
        dtype=job.dtype,
        kept_blocks=None if job.kept_blocks is None else list(job.kept_blocks),
        allow_code=list(allow_code),
    )
    processes.tell(asdict(order), _tensors_of(job))

    def remember(name: str, compute: Callable[[], Any]) -> Any:
        value = job.remember(name, compute)
        processes.tell({"value": value}, {})
        return value

    return replace(job, processes=processes, device=processes.device(job.device), remember=remember)


def _tensors_of(job: Job) -> dict[str, Tensor]:
    tokens = job.calibration
    if tokens is None:
        return {}
    return {"ids": tokens.ids} | ({} if tokens.lengths is None else {"lengths": tokens.lengths})


def serve() -> int:
    """Work for the main process until it needs no one; gives the exit code. What fails is told on standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process finishes its unit first, and this one ends with it
    processes = current()
    try:
        while True:
            data, tensors = processes.hear()
            _work(Order(**data), tensors, processes)
    except Dismissed:
        current().leave()
        return 0
    except CompressError as error:
        time.sleep(MOURNING_SECONDS)
        sys.stderr.write(f"error in process {current().rank}: {error}\n")
        return error.exit_code
    except Exception:  # noqa: BLE001  the outermost frame of this process
        traceback.print_exc()
        return CompressError.exit_code


def _work(order: Order, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    import json

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.methods import find_pass

    found = find_pass(order.kind, order.method, tuple(order.allow_code))
    settings = found.model_validate_json(json.dumps(order.settings))
    job = Job(
        checkpoint=settings.view(Checkpoint.open(order.checkpoint)),
        calibration=Tokens.of(tensors["ids"], tensors.get("lengths")) if "ids" in tensors else None,
        sink=NoSink(),
        original=Checkpoint.open(order.original) if order.original else None,
        seed=order.seed,
        device=processes.device(order.device),
        dtype=order.dtype,
        kept_blocks=None if order.kept_blocks is None else tuple(order.kept_blocks),
        processes=processes,
        remember=lambda name, compute: processes.hear()[0]["value"],
    )
    settings.run(job)
