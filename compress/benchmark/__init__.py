"""Benchmark: how fast a model folder serves a workload through the runtime, in what memory, and another beside it.

The benchmark is offline: requests go to the engine in this process. One model at a time is in memory; with a model to
compare to they take turns, and the order of the turns alternates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.benchmark.figures import fallbacks, figures, memory, ratios, series
from compress.benchmark.measure import Measurement, measure
from compress.benchmark.workload import Asked, Workload, make_workload
from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from compress.core.events import Finished, Listener, Notice, Progress, Started, silent
from compress.facts import environment
from compress.report.packings import by_outcome
from kv_compress.policy import KVPolicy
from kv_compress.stage import KVCache
from runtime.models.reading import read

__all__ = ["SCHEMA_VERSION", "Asked", "benchmark"]

SCHEMA_VERSION = 1
MOST_ROUNDS = 100


@dataclass(frozen=True)
class _Model:
    role: str
    name: str
    folder: Path
    disk_bytes: int
    max_length: int
    vocabulary: int


def benchmark(
    model: str | Path,
    asked: Asked,
    *,
    against: str | Path | None = None,
    numerics: str = "fast",
    device: str = "cpu",
    sparse: str = "auto",
    kv_cache: KVCache | None = None,
    rounds: int | None = None,
    offline: bool = False,
    events: Listener = silent,
) -> dict[str, Any]:
    """Send the workload to `model` (and `against`) `rounds` times (default: once; three times each with `against`).

    `kv_cache`: how `model` keeps keys and values, whatever it says itself. The result is plain data: see
    docs/runtime.md. UsageError for settings that make no sense, InputError for a model or trace that is refused or a
    model that gives no usable logits.
    """
    rounds = rounds if rounds is not None else 1 if against is None else 3
    if not 1 <= rounds <= MOST_ROUNDS:
        raise UsageError(f"goes from 1 to {MOST_ROUNDS}, not {rounds}", where="--rounds")
    models = [_open("artifact", model, offline)]
    if against is not None:
        models.append(_open("original", against, offline))
    workload = make_workload(
        asked,
        max_length=min(each.max_length for each in models),
        vocabulary=min(each.vocabulary for each in models),
    )
    for notice in workload.notices:
        events(Notice(notice, level="warning"))
    policy = None if kv_cache is None else kv_cache.policy(Checkpoint.open(models[0].folder))
    measured = _in_turns(models, workload, rounds, numerics, device, sparse, policy, events)
    found = [_summed_up(each, measured[number]) for number, each in enumerate(models)]
    return {
        "schema_version": SCHEMA_VERSION,
        "workload": workload.description,
        "settings": {"numerics": numerics, "device": device, "sparse": sparse, "rounds": rounds},
        "models": found,
        "ratios": ratios(*found) if len(found) > 1 else None,
        "notices": [*workload.notices, *_failures(found)],
        "environment": environment(),
    }


def _open(role: str, model: str | Path, offline: bool) -> _Model:
    checkpoint = Checkpoint.open(model, offline=offline)
    config = read(checkpoint.config, str(checkpoint.folder / "config.json"))
    disk_bytes = sum(info.bytes for info in checkpoint.tensors.values())
    name = checkpoint.folder.resolve().name if Path(model).is_dir() else str(model)
    return _Model(role, name, checkpoint.folder, disk_bytes, config.max_length, config.vocab)


def _in_turns(
    models: Sequence[_Model],
    workload: Workload,
    rounds: int,
    numerics: str,
    device: str,
    sparse: str,
    policy: KVPolicy | None,
    events: Listener,
) -> list[list[Measurement]]:
    """Measurements of each model: A B, B A, A B …"""
    _warm_up()
    found: list[list[Measurement]] = [[] for _ in models]
    total = len(workload.requests)
    for number in range(rounds):
        turns = list(enumerate(models))
        for index, model in turns if number % 2 == 0 else reversed(turns):
            stage = f"{model.role}, round {number + 1} of {rounds}" if rounds > 1 else model.role
            events(Started(stage, total, unit="request"))
            measured = measure(
                model.folder,
                workload,
                numerics=numerics,
                device=device,
                sparse=sparse,
                kv_cache=policy if index == 0 else None,
                finished=lambda done, stage=stage: events(Progress(stage, done, total)),
            )
            if not any(timing.tokens for timing in measured.requests):
                raise InputError("the model gives no usable logits: no request got a token", where=str(model.folder))
            found[index].append(measured)
            events(Finished(stage, f"{measured.seconds:.1f} s"))
    return found


def _warm_up() -> None:
    """What a process does once: imports and kernels are not part of the time to load."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from runtime.llm import LLM
    from runtime.native.library import library

    _ = AutoTokenizer, PreTrainedTokenizerFast, LLM, library()


def _summed_up(model: _Model, rounds: Sequence[Measurement]) -> dict[str, Any]:
    return {
        "role": model.role,
        "name": model.name,
        "computes_in": rounds[0].computes_in,
        "figures": figures(rounds),
        "memory": memory(rounds, model.disk_bytes),
        "fallbacks": fallbacks(rounds),
        "packings": by_outcome(rounds[0].packings),
        "series": series(rounds),
    }


def _failures(models: Sequence[dict[str, Any]]) -> list[str]:
    failed = [(model["role"], model["figures"]["failed_requests"]) for model in models]
    return [f"{role}: {count:g} requests ended early, without all their tokens" for role, count in failed if count]
