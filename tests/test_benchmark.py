"""Benchmarks: lengths, traces and arrivals are what was asked for; figures are right; the report says all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.benchmark import Asked, benchmark
from compress.benchmark.fallbacks import sentences
from compress.benchmark.figures import fallbacks, figures, memory, series
from compress.benchmark.lengths import Lengths
from compress.benchmark.measure import Moment, Timing
from compress.benchmark.traces import Shape, read_trace
from compress.benchmark.workload import make_workload
from compress.core.errors import InputError, UsageError
from compress.core.events import Event, Notice, Started
from compress.report.speed import milliseconds, speed_report, three_digits, write_speed_report
from tests.hostile_names import HOSTILE
from tests.sample_benchmark import measurement, sample_benchmark, timing

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.6805900,39,10
2023-11-16 18:15:50.6805900,20,55
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 2]},
]


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return path


# Lengths


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [
        ("128", 128, 128, 128),
        ("64-512", 288, 64, 512),
        ("lognormal:256,0.8", 256, 1, 10_000),
        ("exponential:100", 100, 1, 2_000),
    ],
)
def test_lengths_have_the_mean_and_the_bounds_that_were_asked_for(text, mean, low, high) -> None:
    drawn = Lengths.parse(text).draw(40_000, np.random.default_rng(0))
    assert np.mean(drawn) == pytest.approx(mean, rel=0.02)
    assert low <= min(drawn) <= max(drawn) <= high
    assert text == "128" or len(set(drawn)) > 300


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "12.5", "9-3", "0-4", "lognormal:256", "lognormal:0,1", "lognormal:9,99", "normal:3", "1e9"]
)
def test_lengths_that_make_no_sense_are_refused_by_option(text) -> None:
    with pytest.raises(UsageError) as refused:
        Lengths.parse(text, "--prompt-tokens")
    assert refused.value.where == "--prompt-tokens"


# Traces


def test_an_azure_trace_starts_at_zero(azure: Path) -> None:
    assert read_trace(azure, 10) == [Shape(0.0, 374, 44), Shape(1.0, 39, 10), Shape(4.0, 20, 55)]
    assert len(read_trace(azure, 2)) == 2


def test_a_mooncake_trace_has_blocks(mooncake: Path) -> None:
    assert read_trace(mooncake, 10) == [Shape(0.0, 700, 5, (0, 1)), Shape(2.0, 600, 7, (0, 2))]


@pytest.mark.parametrize(
    ("content", "where", "says"),
    [
        (AZURE.replace("39", "-39"), ":3", "ContextTokens is '-39'"),
        (AZURE.replace("2023-11-16 18:15:47.6805900", "noon"), ":3", "TIMESTAMP is 'noon'"),
        (AZURE + "2023-11-16 18:15:51\n", ":5", "ContextTokens is None"),
        ("a,b\n1,2\n", "", "no trace that is known"),
        (AZURE.split("\n")[0], "", "holds no request"),
        ("", "", "no trace"),
        (b"\xff\xfe\x00", "", "no text"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp"', ":2", "not JSON"),
        ('{"timestamp": "x", "input_length": 5, "output_length": 1}', ":1", "timestamp is 'x'"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1}', ":1", "input_length is True"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', ":1", "2 hash_ids do not fit"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}', ":1", "whole numbers"),
    ],
)
def test_a_trace_that_is_not_understood_is_refused_by_line(tmp_path: Path, content: str | bytes, where, says) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says) as refused:
        read_trace(path, 10)
    assert refused.value.where == f"{path}{where}"


def test_the_real_traces_are_read(shared_data: Path) -> None:
    azure = read_trace(shared_data / "traces/azure-llm-2023/AzureLLMInferenceTrace_conv.csv", 10**6)
    mooncake = read_trace(shared_data / "traces/mooncake/conversation_trace.jsonl", 10**6)
    assert (len(azure), len(mooncake)) == (19_366, 12_031)
    assert all(shape.blocks for shape in mooncake)
    assert mooncake[-1].arrival_seconds == pytest.approx(3537, abs=1)


# Workloads


def made(limit: int = 4096, **asked: Any):
    return make_workload(Asked(**asked), max_length=limit, vocabulary=300)


def test_a_seed_gives_the_same_requests() -> None:
    asked = {"requests": 5, "prompt_tokens": "4-40", "output_tokens": "exponential:9", "rate": "3"}
    assert made(**asked).requests == made(**asked).requests
    assert made(**asked).requests != made(**asked, seed=1).requests
    tokens = [token for request in made(**asked).requests for token in request.prompt]
    assert 0 <= min(tokens) <= max(tokens) < 300


def test_requests_arrive_all_at_once_or_at_the_rate(azure: Path) -> None:
    def times(**asked: Any) -> list[float]:
        return [request.arrival_seconds for request in made(**asked).requests]

    assert times(requests=3) == [0, 0, 0]
    assert times(trace=azure) == [0, 0, 0]
    assert times(trace=azure, rate="1x") == pytest.approx([0, 1, 4])
    assert times(trace=azure, rate="0.5x") == pytest.approx([0, 2, 8])
    assert times(trace=azure, rate="4") == pytest.approx([0, 1 / 8, 1 / 2])
    poisson = times(requests=20_000, rate="50", prompt_tokens="1")
    assert poisson[-1] == pytest.approx(400, rel=0.03)
    assert np.std(np.diff(poisson)) == pytest.approx(1 / 50, rel=0.05)


def test_lengths_are_cut_to_the_model_s_limit_and_that_is_said(azure: Path) -> None:
    workload = made(limit=64, trace=azure, requests=10)
    assert [(len(request.prompt), request.output_tokens) for request in workload.requests] == [
        (32, 32),
        (39, 10),
        (20, 44),
    ]
    assert workload.longest_tokens == 64
    assert workload.notices == (
        "2 of 3 requests were cut to the model's limit of 64 tokens; 33 % of all tokens are left",
        "the trace holds 3 requests, not 10",
    )
    assert made(limit=1000, trace=azure, requests=3).notices == ()


def test_prompts_that_began_alike_in_the_trace_begin_alike(mooncake: Path) -> None:
    first, second = (request.prompt for request in made(trace=mooncake).requests)
    assert (len(first), len(second)) == (700, 600)
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:600]


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"requests": 0}, "--requests"),
        ({"seed": -1}, "--seed"),
        ({"rate": "fast"}, "--rate"),
        ({"rate": "0"}, "--rate"),
        ({"rate": "2x"}, "--rate"),
        ({"trace": Path("t"), "prompt_tokens": "5"}, "--prompt-tokens"),
        ({"trace": Path("t"), "output_tokens": "5"}, "--output-tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_by_option(asked, where) -> None:
    with pytest.raises(UsageError) as refused:
        made(**asked)
    assert refused.value.where == where


# Figures


def test_figures_of_one_round() -> None:
    found = figures([measurement()])
    assert found["seconds"] == 4
    assert (found["generated_tokens"], found["generated_tokens_per_second"]) == (5, 5 / 4)
    assert (found["prompt_tokens"], found["prompt_tokens_per_second"]) == (20, 20 / 4)
    assert found["requests_per_second"] == 2 / 4
    assert found["first_token"] == {
        "mean": 1.5,
        "p50": 1.5,
        "p90": pytest.approx(1.9),
        "p99": pytest.approx(1.99),
        "max": 2,
    }
    assert found["per_token"]["p50"] == 1.25
    assert (found["gap"]["p50"], found["gap"]["max"]) == (1, 2)
    assert (found["preemptions"], found["prefix_hit_tokens"], found["failed_requests"]) == (3, 16, 0)


def test_several_rounds_give_medians_and_the_series_of_one() -> None:
    rounds = [measurement(scale) for scale in (1, 4, 2)]
    found = figures(rounds)
    assert found["seconds"] == 8
    assert found["load_seconds"] == 1
    assert found["gap"]["max"] == 4
    assert found["rounds_generated_tokens_per_second"] == [5 / 4, 5 / 16, 5 / 8]
    assert series(rounds)["moments"][-1]["seconds"] == 8
    assert series(rounds)["latencies"]["gap"] == [2, 2, 4]


def test_a_single_token_has_no_gaps_and_no_token_no_latency() -> None:
    found = figures([measurement(requests=[timing(0, 1), Timing(0, 10, [], "error")])])
    assert found["gap"] == found["per_token"] == dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    assert found["first_token"]["max"] == 1
    assert found["failed_requests"] == 1


def test_long_series_are_thinned_to_their_ends() -> None:
    moments = [Moment(number, number, number, 1, 0) for number in range(5000)]
    shown = series([measurement(moments=moments)])["moments"]
    assert len(shown) == 300
    assert (shown[0]["seconds"], shown[-1]["seconds"]) == (0, 4999)


def test_memory_and_fallbacks() -> None:
    held = memory([measurement(), measurement(peak_bytes=2000, kv_used_bytes=180)], 50)
    assert held["total_bytes"] == 600
    assert (held["disk_bytes"], held["peak_bytes"], held["kv_used_bytes"]) == (50, 2000, 180)
    assert fallbacks([measurement()]) == [
        {"reason": "no kernel", "layers": ["a", "b"]},
        {"reason": "too wide", "layers": ["c"]},
    ]
    assert sentences({"a": "why"}) == ["1 layer has no fast path (a): why"]
    assert sentences(dict.fromkeys("abc", "why")) == ["3 layers have no fast path (a, b, …): why"]


# Through the runtime


@pytest.fixture(scope="module")
def result(tiny_model) -> dict[str, Any]:
    """Two models in turns, small."""
    asked = Asked(requests=6, prompt_tokens="20-60", output_tokens="2-9", seed=3)
    heard: list[Event] = []
    found = benchmark(
        tiny_model("llama"), asked, against=tiny_model("llama", dtype="bfloat16"), rounds=2, events=heard.append
    )
    return found | {"heard": heard}


def test_every_token_is_generated_and_counted(result) -> None:
    asked = result["workload"]
    for model in result["models"]:
        found = model["figures"]
        assert found["generated_tokens"] == asked["output_tokens"]
        assert found["prompt_tokens"] == asked["prompt_tokens"]
        assert found["computed_tokens"] == asked["prompt_tokens"] + asked["output_tokens"] - asked["requests"]
        assert found["prefix_hit_tokens"] == found["preemptions"] == found["failed_requests"] == 0
        assert 0 < found["per_token"]["p50"] <= found["gap"]["max"] < found["seconds"]
        assert model["series"]["moments"][-1]["generated_tokens"] == asked["output_tokens"]
        assert 0 < model["memory"]["kv_used_bytes"] <= model["memory"]["kv_pool_bytes"]
        assert model["memory"]["peak_bytes"] > model["memory"]["weights_bytes"] > 0


def test_two_models_take_turns_whose_order_alternates(result) -> None:
    stages = [event.stage for event in result["heard"] if isinstance(event, Started)]
    assert stages == [
        "artifact, round 1 of 2", "original, round 1 of 2", "original, round 2 of 2", "artifact, round 2 of 2"
    ]  # fmt: skip
    ours, theirs = (model["memory"]["disk_bytes"] for model in result["models"])
    assert ours == 2 * theirs
    assert result["ratios"]["disk_bytes"] == 2
    rates = [model["figures"]["generated_tokens_per_second"] for model in result["models"]]
    assert result["ratios"]["generated_tokens_per_second"] == pytest.approx(rates[0] / rates[1])


def test_shared_prefixes_of_a_trace_are_found_in_the_cache(tiny_model, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 100, "output_length": 2, "hash_ids": [7]}
    path.write_text("".join(json.dumps(row | {"timestamp": 100 * number}) + "\n" for number in range(4)))
    found = benchmark(tiny_model("llama"), Asked(trace=path, rate="20", requests=4))
    assert found["models"][0]["figures"]["prefix_hit_tokens"] == 3 * 96  # whole pages of 16
    assert found["models"][0]["figures"]["seconds"] >= 3 / 20, "the last came after three gaps"


def test_requests_that_are_cut_are_told_to_the_listener(tiny_model, azure: Path) -> None:
    heard: list[Event] = []
    benchmark(tiny_model("llama"), Asked(trace=azure, requests=3), events=heard.append)
    told = [event.message for event in heard if isinstance(event, Notice)]
    assert told == ["1 of 3 requests were cut to the model's limit of 256 tokens; 70 % of all tokens are left"]


def test_bad_rounds_and_models_are_refused(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="from 1 to 100"):
        benchmark(tiny_model("llama"), Asked(), rounds=0)
    with pytest.raises(InputError):
        benchmark(tmp_path, Asked())


# The report


def test_the_report_has_figures_plots_memory_and_environment(tmp_path: Path) -> None:
    page, text, data = (path.read_text(encoding="utf-8") for path in write_speed_report(sample_benchmark(), tmp_path))
    for words in (
        "generated tokens/s", "first token, artifact", "gap between tokens, original", "p99", "weights in memory",
        "KV pool", "× 1.50", "preemptions", "prefix-cache hits", "3 passes each", "activations in float32",
        "drawn: prompts of 10 tokens", "were cut to the model", "no fast path: no kernel", "a CPU",
    ):  # fmt: skip
        assert words in page, words
        assert words in text, words
    assert page.count("<svg") == 5
    assert json.loads(data)["models"][0]["series"]["latencies"]["gap"]


def test_a_real_result_makes_a_report_and_is_json(result, tmp_path: Path) -> None:
    plain = {key: value for key, value in result.items() if key != "heard"}
    _, _, data = write_speed_report(plain, tmp_path)
    assert json.loads(data.read_text())["models"] == json.loads(json.dumps(plain["models"]))


def test_no_name_acts_in_the_report(tmp_path: Path) -> None:
    result = sample_benchmark("".join(HOSTILE))
    result["models"][0]["fallbacks"] = [{"reason": name, "layers": [name] * 5} for name in HOSTILE]
    result["environment"] = dict(enumerate(HOSTILE))
    page, text, _ = (path.read_text(encoding="utf-8") for path in write_speed_report(result, tmp_path))
    assert page.count("and 2 more") == text.count("and 2 more") == len(HOSTILE)
    for told in (page, text):
        assert not re.search(r"<(script|img|iframe|a|form|input|object|base|link|svg/|body onload)\b", told)
    assert "](" not in text


def test_one_model_has_no_ratios() -> None:
    result = sample_benchmark()
    report = speed_report({**result, "models": result["models"][:1], "ratios": None})
    assert report.tables[0].columns == ["", "artifact"]
    assert not any("ratio" in row or "×" in str(row) for table in report.tables for row in table.rows)


def test_what_there_is_nothing_of_has_no_plot() -> None:
    result = sample_benchmark()
    for model in result["models"]:
        model["series"]["latencies"] |= {"per_token": [], "gap": []}
    assert [plot.key for plot in speed_report(result).small_plots] == ["first_token"]


def test_the_names_of_curves_lie_on_no_curve() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from compress.report.plots import new_figure
    from compress.report.speed_plots import _name

    figure, axes = new_figure(width=3.7, height=2.7)
    for role in ("artifact", "original"):
        axes.plot([0, 1], [0, 1], label=role)
    _name(axes, [{}, {}])
    FigureCanvasAgg(figure).draw()
    box = axes.get_legend().get_window_extent()
    assert box.y0 >= axes.get_window_extent().y1 - 1
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width + 1
    assert box.y1 <= figure.bbox.height + 1


def test_figures_have_three_digits() -> None:
    assert [three_digits(value) for value in (None, 0, 2.9, 0.2, 143.4, 12_345, 999.7)] == [
        "–", "0", "2.90", "0.200", "143", "12,345", "1,000"
    ]  # fmt: skip
    assert [milliseconds(value) for value in (None, 0.0123, 1.5)] == ["–", "12.3 ms", "1.50 s"]
