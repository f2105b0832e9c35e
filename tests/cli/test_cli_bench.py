"""compress bench: a table that fits the terminal, one JSON object a line, a report, one sentence for bad input."""

from pathlib import Path

import pytest

SMALL = ("--requests", "3", "--prompt-tokens", "12-20", "--output-tokens", "4")


def test_figures_are_shown_in_80_columns_and_progress_goes_to_standard_error(call, tiny_model) -> None:
    model = tiny_model("llama")
    called = call("bench", model, *SMALL, "--against", model, "--rounds", "1", "--seed", "1")
    assert called.code == 0, called.err
    for words in ("Throughput", "generated tokens/s", "Latency", "p99", "Memory", "KV pool", "ratio"):
        assert words in called.out
    assert max(map(len, called.out.splitlines())) <= 80
    assert "artifact" in called.err
    assert "original" in called.err


def test_json_ends_with_figures_without_the_points_of_plots(call, tiny_model, tmp_path: Path) -> None:
    called = call("bench", tiny_model("llama"), *SMALL, "--json", "--output", tmp_path / "report")
    assert called.code == 0, called.err
    assert called.err == ""
    last = called.objects[-1]
    assert (last["event"], last["command"], last["exit_code"]) == ("summary", "bench", 0)
    [model] = last["models"]
    assert model["figures"]["generated_tokens"] == 12
    assert "series" not in model
    assert [Path(path).name for path in last["files"]] == ["benchmark.html", "benchmark.md", "benchmark.json"]
    assert all(Path(path).is_file() for path in last["files"])


def test_quiet_prints_the_paths_alone(call, tiny_model, tmp_path: Path) -> None:
    called = call("bench", tiny_model("llama"), *SMALL, "--quiet", "-o", tmp_path / "r")
    assert called.out.splitlines() == [str(tmp_path / "r" / f"benchmark.{end}") for end in ("html", "md", "json")]
    assert called.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--prompt-tokens", "many"), 2, "--prompt-tokens: is a number (128)"),
        (("--rate", "2x"), 2, "only a trace has a pace of its own"),
        (("--trace", "nowhere.csv"), 3, "nowhere.csv: cannot be read"),
        (("--rounds", "0"), 2, "--rounds"),
        (("--numerics", "slow"), 2, "fast or exact"),
        (("--device", "abacus"), 2, "unknown device"),
        (("--against", "/nowhere"), 3, "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence(call, tiny_model, arguments, code: int, says: str) -> None:
    called = call("bench", tiny_model("llama"), *SMALL[:2], *arguments)
    assert called.code == code, called.err
    assert called.out == ""
    assert says in called.err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    call, tiny_model, tmp_path: Path, monkeypatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("the benchmark has begun")

    monkeypatch.setattr("compress.benchmark.benchmark", measured)
    (tmp_path / "file").write_text("")
    called = call("bench", tiny_model("llama"), *SMALL, "-o", tmp_path / "file" / "report")
    assert called.code in (2, 3, 4), called.err
    assert "file" in called.err
    assert "Traceback" not in called.err


@pytest.mark.parametrize("given", ["report", "report/benchmark.json"])
def test_report_writes_a_benchmark_again(call, tiny_model, tmp_path: Path, given: str) -> None:
    assert call("bench", tiny_model("llama"), *SMALL, "-q", "-o", tmp_path / "report").code == 0
    called = call("report", tmp_path / given, "-o", tmp_path / "again", "--json")
    assert called.code == 0, called.err
    assert [Path(path).name for path in called.objects[-1]["files"]] == [
        f"benchmark.{end}" for end in ("html", "md", "json")
    ]
    for end in ("html", "md", "json"):
        assert (tmp_path / "again" / f"benchmark.{end}").read_bytes() == (
            tmp_path / "report" / f"benchmark.{end}"
        ).read_bytes()
