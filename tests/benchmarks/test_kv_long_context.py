"""Rows of the benchmark of eviction that are measured later: where they go, and what they may not stand beside."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(method: str, length: int, kept: float, right: int) -> dict[str, object]:
    when = "" if method in ("all", "cut") else "end"
    return {"length": length, "method": method, "when": when, "kept": kept, "right": right}


def test_a_row_measured_again_takes_the_place_of_its_like() -> None:
    import kv_long_context

    rows: list[dict] = []
    later = [
        row("adakv", 4096, 0.5, 1), row("random", 2048, 0.25, 2), row("cut", 2048, 0.5, 3), row("random", 2048, 0.5, 4),
        row("all", 2048, 1.0, 5), row("adakv", 2048, 0.5, 6), row("random", 2048, 0.5, 7),
    ]  # fmt: skip
    for found in later:
        rows = kv_long_context.placed(rows, found)
    assert [each["right"] for each in rows] == [5, 3, 7, 2, 6, 1]


def test_rows_of_another_protocol_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import kv_long_context

    out = tmp_path / "results.json"
    text = json.dumps({"protocol": {"samples": 1}, "recall": [], "perplexity": []})
    out.write_text(text)
    monkeypatch.setattr(sys, "argv", ["kv_long_context.py", "--data", str(tmp_path), "--out", str(out), "--add"])
    with pytest.raises(SystemExit) as stopped:
        kv_long_context.main()
    assert stopped.value.code == 2 and "of another protocol" in capsys.readouterr().err
    assert out.read_text() == text
