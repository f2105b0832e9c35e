"""The parts of throughput.py that decide what a figure means."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_everyone_is_asked_the_same_and_within_what_all_can_take() -> None:
    import workloads

    for name in workloads.NAMES:
        asked = workloads.requests_of(name, 2048)
        assert asked == workloads.requests_of(name, 2048)
        assert all(len(prompt) + tokens <= 2 * workloads.LONGEST for prompt, tokens in asked)
    many = workloads.requests_of("many", 2048)
    assert len(many) == 64
    assert all(len(prompt) + tokens <= workloads.LONGEST for prompt, tokens in many)
    lengths = np.array([tokens for _, tokens in many])
    assert lengths.max() > 3 * lengths.mean()  # skewed, as the target says


def test_a_contestant_that_fails_is_taken_down_with_its_reason() -> None:
    import throughput

    script = 'import sys; print(\'{"workload": "many", "tokens_per_second": 5.0}\'); sys.exit(\'no such kernel\')'
    first, second = throughput.run_once([sys.executable, "-c", script], ("many", "stream"), 1.0, 1)
    assert (first["workload"], first["tokens_per_second"]) == ("many", 5.0)
    assert (second["workload"], second["failed"]) == ("stream", "no such kernel")


def test_medians_ratios_and_failures() -> None:
    import throughput

    def line(contestant: str, speed: float) -> dict[str, object]:
        return {"shape": "demo", "workload": "many", "contestant": contestant, "tokens_per_second": speed}

    runs = [line("ours/original", speed) for speed in (30.0, 10.0, 20.0)]
    runs += [line("transformers/float32", 5.0)]
    runs += [{"shape": "demo", "workload": "many", "contestant": "transformers/continuous", "failed": "why"}]
    results = throughput.results_of(runs, 2)
    assert results["summary"]["demo"]["many"] == {"ours/original": 20.0, "transformers/float32": 5.0}
    assert results["ratios"]["demo"] == {"many: ours / padded": 4.0}
    assert results["failures"] == runs[-1:]
    assert "failed: transformers/continuous on demo: why" in throughput.render(results)


def test_rows_of_queries_are_put_in_llamacpps_order() -> None:
    import make_gguf

    weight = np.arange(8)[:, None] * np.ones((1, 2))
    assert make_gguf.interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert make_gguf.name_of("model.layers.3.self_attn.o_proj.weight") == "blk.3.attn_output.weight"
    assert make_gguf.name_of("model.norm.weight") == "output_norm.weight"


def test_gates_of_the_batching_measurement() -> None:
    import batching

    gap = {"chunk_tokens": 8, "largest_over_steady": 1.4}
    whole = {"chunk_tokens": None, "largest_over_steady": 9.0}
    result = {
        "batching": {"continuous_over_padded": 2.5},
        "long_prompt": [gap, {**gap, "largest_over_steady": 3}, whole],
    }
    assert all(batching.gates(result).values())
    assert not any(
        batching.gates(
            {"batching": {"continuous_over_padded": 1.9}, "long_prompt": [whole, {**gap, "chunk_tokens": None}]}
        ).values()
    )
