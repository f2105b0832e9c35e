"""Measurements and a benchmark's result as a run would make them, without a run."""

from typing import Any

from compress.benchmark.figures import fallbacks, figures, memory, ratios, series
from compress.benchmark.measure import Measurement, Moment, Timing
from runtime.memory import Ledger


def timing(arrival: float, *tokens: float) -> Timing:
    """A request of ten tokens of prompt."""
    return Timing(arrival, 10, list(tokens), "length")


def measurement(scale: float = 1.0, **changes: Any) -> Measurement:
    """Two requests: three tokens from second 1 on, and two from second 3 on, which arrived at second 1."""
    requests = [timing(0, scale, 2 * scale, 4 * scale), timing(1, 3 * scale, 4 * scale)]
    moments = [Moment(scale, 15, 1, 1, 1), Moment(4 * scale, 23, 5, 2, 0)]
    values = {
        "load_seconds": scale, "requests": requests, "moments": moments, "preemptions": 3, "hit_tokens": 16,
        "ledger": Ledger(100, 200, 300), "kv_used_bytes": 150, "peak_bytes": 1000, "peak_of": "this process",
        "kv_tokens": 32, "kept_as": "float32",
        "slow_layers": {"a": "no kernel", "b": "no kernel", "c": "too wide"}, "computes_in": "float32",
    }  # fmt: skip
    return Measurement(**values | changes)


def sample_benchmark(name: str = "tiny-w4") -> dict[str, Any]:
    """An artifact against its original, three rounds each."""
    models = [_model("artifact", name, 1.0), _model("original", "tiny", 1.5)]
    return {
        "schema_version": 1,
        "workload": {
            "source": "drawn: prompts of 10 tokens, answers of 2-3", "requests": 2, "prompt_tokens": 20,
            "output_tokens": 5, "longest_tokens": 13, "arrivals": "all at once", "seed": 0,
        },
        "settings": {"numerics": "fast", "device": "cpu", "rounds": 3},
        "models": models,
        "ratios": ratios(*models),
        "notices": ["1 of 2 requests were cut to the model's limit of 13 tokens; 90 % of all tokens are left"],
        "environment": {"python": "3.12", "torch": "2.13.0", "cpu": "a CPU", "threads": 2, "gpu": None},
    }  # fmt: skip


def _model(role: str, name: str, scale: float) -> dict[str, Any]:
    rounds = [measurement(scale * factor) for factor in (1, 1.1, 1.2)]
    return {
        "role": role,
        "name": name,
        "computes_in": "float32",
        "figures": figures(rounds),
        "memory": memory(rounds, 50),
        "fallbacks": fallbacks(rounds),
        "series": series(rounds),
    }
