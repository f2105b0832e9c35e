"""What reports say of layers with zeros: how they ran where speed was measured, and nothing about speed elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.core.recipe import parse_recipe
from compress.pipeline import RunOptions, run
from compress.report.packings import by_outcome, run_notes, sentence
from compress.report.speed import speed_report
from runtime.layers import sparse
from runtime.layers.sparse import Packing
from runtime.native.library import library
from tests.conftest import TinyModel
from tests.sample_benchmark import measurement, sample_benchmark


def packing(form: str, reason: str, **ratios: float) -> Packing:
    return Packing(form, 0.5, reason, {int(rows[1:]): ratio for rows, ratio in ratios.items()})


OUTCOMES = by_outcome(
    {
        "a": packing("2:4", "measured", r1=1.2, r512=0.6),
        "b": packing("2:4", "measured", r1=1.0, r512=0.5),
        "c": packing("", "it is small"),
    }
)


def test_layers_are_put_together_by_what_became_of_them() -> None:
    assert [outcome["layers"] for outcome in OUTCOMES] == [["a", "b"], ["c"]]
    assert OUTCOMES[0]["against_dense"] == {"1": 1.1, "512": 0.55}
    assert [sentence(outcome) for outcome in OUTCOMES] == [
        "2 layers with zeros (50% of them) ran packed, as 2:4 on sparse tensor cores (a, b): measured; "
        "packed : dense by rows: 1.10 at 1, 0.55 at 512",
        "1 layer with zeros (50% of it) ran dense (c): it is small",
    ]


def test_a_benchmark_says_how_zeros_ran() -> None:
    result = sample_benchmark()
    assert measurement().packings == {}
    result["models"][0]["packings"] = OUTCOMES
    assert "artifact: 1 layer with zeros (50% of it) ran dense (c): it is small" in speed_report(result).notices


def test_a_run_implies_no_speed_that_was_not_measured() -> None:
    pruned = {"stages": [{"layers": [{"sparsity": 0.5}]}]}
    assert run_notes(pruned) == run_notes({**pruned, "speed": {"found": [{}]}}) == []
    found = [{"packings": OUTCOMES[1:]}, {"packings": OUTCOMES[1:]}]
    assert run_notes({**pruned, "speed": {"found": found}}) == [sentence(OUTCOMES[1])]


def test_a_pruned_run_with_speed_names_what_ran_packed(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library().loaded is None or not library().loaded.bitmap_served():
        pytest.skip("no AVX-512 VBMI2 or gcc here")
    monkeypatch.setattr(sparse, "_LEAST_WEIGHTS", 1 << 13)
    asked = {"batches": [1], "prompt_tokens": 4, "output_tokens": 3, "rounds": 1}
    pruning = {"prune": {"method": "magnitude", "pattern": "2:4"}}
    data = {"model": str(tiny_model("llama", dtype="bfloat16")), "stages": [pruning]}
    result = run(parse_recipe({**data, "evaluate": {"speed": asked}}), RunOptions(tmp_path / "out"))
    report = (result.report_folder / "report.md").read_text()
    assert "9 layers with zeros (50% of them) ran packed, as a bitmap" in report
    assert "3 layers with zeros (50% of them) ran dense (blocks.0.attention.output, " in report
    assert "ran packed" not in (result.artifact / "README.md").read_text(), "another machine would say something else"
