"""Measure: a workload through a loaded model, and when what happened. Times are seconds since the first arrival."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.benchmark.workload import Workload
from compress.peak_memory import PeakMemory
from kv_compress.eviction import eviction_of
from runtime.llm import LLM
from runtime.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kv_compress.policy import KVPolicy
    from runtime.engine import EngineStats
    from runtime.layers.sparse import Packing
    from runtime.memory import Ledger

_WARM_REQUESTS, _WARM_PROMPT, _WARM_TOKENS = 8, 256, 4


@dataclass
class Timing:
    """One request: when it arrived, when each of its tokens was there, and why it ended."""

    arrival: float
    prompt_tokens: int
    tokens: list[float] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def first_token(self) -> float | None:
        """Seconds from arrival to the first token, waiting included."""
        return self.tokens[0] - self.arrival if self.tokens else None

    @property
    def per_token(self) -> float | None:
        """Mean seconds from one token to the next."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def gaps(self) -> Iterator[float]:
        """Seconds between each token and the next."""
        return (after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False))


@dataclass(frozen=True)
class Moment:
    """The state after a step; counts since the start."""

    seconds: float
    computed_tokens: int
    generated_tokens: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Measurement:
    """One pass of a workload through one model."""

    load_seconds: float
    requests: list[Timing]
    moments: list[Moment]
    preemptions: int
    hit_tokens: int
    ledger: Ledger
    kv_used_bytes: int
    peak_bytes: int  # of the process, or of the GPU's allocator
    peak_of: str
    kv_tokens: int  # that the pool holds
    kept_as: str  # what the pool's pages hold, and what is dropped
    slow_layers: dict[str, str]
    computes_in: str  # the dtype of activations
    packings: dict[str, Packing] = field(default_factory=dict)  # of layers with zeros

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max((timing.tokens[-1] for timing in self.requests if timing.tokens), default=0.0)


def measure(
    folder: Path,
    workload: Workload,
    *,
    numerics: str,
    device: str,
    sparse: str = "auto",
    kv_cache: KVPolicy | None = None,
    finished: Callable[[int], None],
) -> Measurement:
    """Load the model, warm it up, send the workload, and let go of the model. `finished` hears how many are done."""
    gc.collect()
    with PeakMemory() as memory:
        start = time.perf_counter()
        llm = _load(folder, workload, numerics, device, sparse, kv_cache)
        load_seconds = time.perf_counter() - start
        _warm_up(llm, workload)
        before = llm.stats()
        timings, moments, most_pages = _send(llm, workload, finished)
        after = llm.stats()
    gpu_bytes = _gpu_peak(device)
    found = Measurement(
        load_seconds,
        timings,
        moments,
        after.preemptions - before.preemptions,
        after.pages.hit_tokens - before.pages.hit_tokens,
        llm.ledger,
        most_pages * llm.engine.scheduler.pool.page.bytes,
        memory.peak_bytes if gpu_bytes is None else gpu_bytes,
        "this process" if gpu_bytes is None else "the GPU",
        llm.kv_tokens,
        kept_as(llm),
        dict(llm.engine.runner.model.slow_reasons),
        str(llm.engine.runner.model.dtype).removeprefix("torch."),
        llm.engine.runner.model.packings,
    )
    del llm
    gc.collect()
    return found


def kept_as(llm: LLM) -> str:
    """What the pages of keys and values hold, and what is dropped: "int8, snapkv 25%"."""
    page, eviction = llm.engine.scheduler.pool.page.name, eviction_of(llm.engine.runner.model.kv_policy)
    return page if eviction is None else f"{page}, {eviction.words}"


def _load(folder: Path, workload: Workload, numerics: str, device: str, sparse: str, kv_cache: KVPolicy | None) -> LLM:
    count = len(workload.requests)
    return LLM(
        folder,
        numerics=numerics,  # type: ignore[arg-type]  the loader refuses what it does not know
        device=device,
        sparse=sparse,  # type: ignore[arg-type]  likewise
        kv_cache=kv_cache,
        max_length=workload.longest_tokens,
        max_queue=max(1024, count),
        max_sequences=min(256, count),
    )


def _warm_up(llm: LLM, workload: Workload) -> None:
    """What happens only once (kernels, allocations) happens now; no page of it is found again."""
    requests = workload.requests[:_WARM_REQUESTS]
    prompts = [request.prompt[:_WARM_PROMPT] for request in requests]
    params = [
        SamplingParams(max_tokens=min(_WARM_TOKENS, request.output_tokens), temperature=0.0, ignore_eos=True)
        for request in requests
    ]
    llm.generate(prompts, params)
    llm.engine.scheduler.pool.forget()
    _reset_gpu_peak()


def _send(llm: LLM, workload: Workload, finished: Callable[[int], None]) -> tuple[list[Timing], list[Moment], int]:
    """Timings of the requests, the state after each step, and the most pages that sequences held."""
    waiting = list(reversed(workload.requests))
    timings = [Timing(request.arrival_seconds, len(request.prompt)) for request in workload.requests]
    by_name: dict[str, Timing] = {}
    moments: list[Moment] = []
    base, generated, done, most_pages = llm.stats(), 0, 0, 0
    start = time.perf_counter()
    while waiting or llm.has_work:
        now = time.perf_counter() - start
        while waiting and waiting[-1].arrival_seconds <= now:
            request = waiting.pop()
            params = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
            by_name[llm.add(request.prompt, params)] = timings[len(by_name)]
        if not llm.has_work:
            time.sleep(min(1.0, max(0.0, waiting[-1].arrival_seconds - now)))
            continue
        updates = llm.step()
        now = time.perf_counter() - start
        for update in updates:
            timing = by_name[update.request]
            timing.tokens += [now] * len(update.token_ids)
            generated += len(update.token_ids)
            if update.finish_reason is not None:
                timing.finish_reason = update.finish_reason
                done += 1
                finished(done)
        stats = llm.stats()
        most_pages = max(most_pages, stats.pages.owned)
        moments.append(_moment(now, generated, stats, base))
    return timings, moments, most_pages


def _moment(now: float, generated: int, stats: EngineStats, base: EngineStats) -> Moment:
    return Moment(now, stats.computed_tokens - base.computed_tokens, generated, stats.running, stats.waiting)


def _gpu_peak(device: str) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def _reset_gpu_peak() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
