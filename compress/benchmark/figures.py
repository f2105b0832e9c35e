"""Figures: what measurements of one model come to, as plain data. Several rounds give medians; series are of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from compress.benchmark.fallbacks import by_reason
from compress.benchmark.measure import Measurement

LATENCIES = ("first_token", "per_token", "gap")
"""Seconds to the first token of a request; mean seconds per further token of a request; seconds of single gaps."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_MOST_POINTS = 300


def figures(rounds: Sequence[Measurement]) -> dict[str, Any]:
    """Throughput, latencies in seconds and counts: the median of the rounds, each by itself."""
    found = [_figures(measured) for measured in rounds]
    return {
        **{name: _median([each[name] for each in found]) for name in found[0] if name not in LATENCIES},
        **{name: {key: _median([each[name][key] for each in found]) for key in found[0][name]} for name in LATENCIES},
        "load_seconds": min(measured.load_seconds for measured in rounds),  # the first may have kernels to compile
        "rounds_generated_tokens_per_second": [each["generated_tokens_per_second"] for each in found],
    }


def _figures(measured: Measurement) -> dict[str, Any]:
    seconds = measured.seconds
    prompt = sum(timing.prompt_tokens for timing in measured.requests)
    generated = sum(len(timing.tokens) for timing in measured.requests)
    computed = measured.moments[-1].computed_tokens if measured.moments else 0
    return {
        "seconds": seconds,
        "requests": len(measured.requests),
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "computed_tokens": computed,
        "requests_per_second": _per(len(measured.requests), seconds),
        "prompt_tokens_per_second": _per(prompt, seconds),
        "generated_tokens_per_second": _per(generated, seconds),
        "tokens_per_second": _per(prompt + generated, seconds),
        "steps": len(measured.moments),
        "preemptions": measured.preemptions,
        "prefix_hit_tokens": measured.hit_tokens,
        "failed_requests": sum(timing.finish_reason != "length" for timing in measured.requests),
        **{name: _spread(values) for name, values in _latencies(measured).items()},
    }


def _latencies(measured: Measurement) -> dict[str, list[float]]:
    requests = measured.requests
    return {
        "first_token": [value for timing in requests if (value := timing.first_token) is not None],
        "per_token": [value for timing in requests if (value := timing.per_token) is not None],
        "gap": [gap for timing in requests for gap in timing.gaps],
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles and largest; None where there is nothing to measure."""
    if not values:
        return dict.fromkeys(("mean", *QUANTILES, "max"))
    shares = np.quantile(values, list(QUANTILES.values()))
    spread = dict(zip(QUANTILES, map(float, shares), strict=True))
    return {"mean": float(np.mean(values)), **spread, "max": float(max(values))}


def memory(rounds: Sequence[Measurement], disk_bytes: int) -> dict[str, Any]:
    """Bytes by what they are for. `peak_bytes` is the most that was held at a time, over all rounds."""
    first = rounds[0]
    return {
        "disk_bytes": disk_bytes,
        **asdict(first.ledger),
        "total_bytes": first.ledger.total_bytes,
        "kv_tokens": first.kv_tokens,
        "kept_as": first.kept_as,
        "kv_used_bytes": max(measured.kv_used_bytes for measured in rounds),
        "peak_bytes": max(measured.peak_bytes for measured in rounds),
        "peak_of": first.peak_of,
    }


def series(rounds: Sequence[Measurement]) -> dict[str, Any]:
    """Latencies and the course of time, thinned out, of the round with the median throughput (the lower of two)."""
    ordered = sorted(rounds, key=lambda measured: measured.seconds, reverse=True)
    chosen = ordered[(len(ordered) - 1) // 2]
    return {
        "latencies": {name: _thinned(sorted(values)) for name, values in _latencies(chosen).items()},
        "moments": [asdict(moment) for moment in _thinned(chosen.moments)],
    }


def fallbacks(rounds: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Layers without a fast path, by reason."""
    return [{"reason": reason, "layers": names} for reason, names in by_reason(rounds[0].slow_layers).items()]


def ratios(artifact: dict[str, Any], original: dict[str, Any]) -> dict[str, float | None]:
    """The artifact's figures in units of the original's."""
    ours, theirs = artifact["figures"], original["figures"]
    found = {
        name: _ratio(ours[name], theirs[name])
        for name in ("generated_tokens_per_second", "prompt_tokens_per_second", "requests_per_second", "seconds",
                     "load_seconds")
    }  # fmt: skip
    found |= {
        f"{name}_{key}": _ratio(ours[name][key], theirs[name][key])
        for name in LATENCIES
        for key in (*QUANTILES, "mean", "max")
    }
    held, before = artifact["memory"], original["memory"]
    return found | {name: _ratio(held[name], before[name]) for name in ("disk_bytes", "weights_bytes", "total_bytes")}


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _per(count: float, seconds: float) -> float | None:
    return count / seconds if seconds else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _thinned(values: Sequence[Any]) -> list[Any]:
    """At most so many points, the first and the last among them."""
    if len(values) <= _MOST_POINTS:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, _MOST_POINTS)]
