"""Pruning to a share of the original's time per token: what is measured decides, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress import latency
from compress.core.artifact import open_artifact
from compress.core.checkpoint import Checkpoint
from compress.core.errors import RecipeError, UsageError
from compress.core.events import Event, Notice, Progress
from compress.core.recipe import Recipe, parse_recipe
from compress.pipeline import RunOptions, plan, run
from prune.channels import Channels
from tests.conftest import TinyModel


class Stopped(Exception):
    pass


def recipe_of(model: Path, **settings: Any) -> Recipe:
    asked = {"method": "channels", "importance": "magnitude", **settings}
    return parse_recipe({"model": str(model), "stages": [{"prune": asked}]})


@pytest.fixture
def as_wide(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A token takes 1 ms and as many µs as there are channels; gives the folders that were measured."""
    measured: list[Path] = []

    def seconds(folder: Path, device: str, rounds: int) -> list[float]:
        measured.append(folder)
        width = json.loads((folder / "config.json").read_text())["intermediate_size"]
        return [(1000 + width) * 1e-6] * rounds

    monkeypatch.setattr(latency, "_seconds", seconds)
    return measured


def test_the_largest_count_within_it_stays(tiny_model: TinyModel, tmp_path: Path, as_wide: list[Path]) -> None:
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.message)

    result = run(recipe_of(tiny_model(), latency="94%"), RunOptions(tmp_path / "out"), listen)
    assert Checkpoint.open(result.artifact).config["intermediate_size"] == 56  # 1056 / 1128 = 0.936, 1064: 0.943
    (stage,) = open_artifact(result.artifact).manifest.recipe["stages"]
    assert stage["prune"]["keep"] == 56 and stage["prune"]["latency"] is None
    assert any("56 of 128 feed-forward channels stay: a token then takes 94 % of the time" in line for line in told)


def test_a_resumed_run_does_not_measure_again(tiny_model: TinyModel, tmp_path: Path, as_wide: list[Path]) -> None:
    recipe = recipe_of(tiny_model(), latency=0.95)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and event.done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "out"), stop)
    before = len(as_wide)
    run(recipe, RunOptions(tmp_path / "out"))
    assert len(as_wide) == before > 0


def test_later_stages_are_measured_behind_earlier_ones(
    tiny_model: TinyModel, tmp_path: Path, as_wide: list[Path]
) -> None:
    stage = {"method": "channels", "importance": "magnitude"}
    stages = [{"prune": {**stage, "keep": 64}}, {"prune": {**stage, "latency": 0.96}}]
    found = plan(parse_recipe({"model": str(tiny_model()), "stages": stages}), RunOptions(tmp_path / "out"))
    assert "16 of 64 feed-forward channels stay" in found.notices  # 1016 / 1064 = 0.955, 1024: 0.962


def test_what_cannot_be_reached_is_refused(tiny_model: TinyModel, tmp_path: Path, as_wide: list[Path]) -> None:
    with pytest.raises(UsageError, match="latency 0.5 cannot be reached by feed-forward channels alone") as refused:
        run(recipe_of(tiny_model(), latency=0.5), RunOptions(tmp_path / "out"))
    assert "even 8 of 128 of them take longer" in refused.value.message
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(RecipeError, match="two ways"):
        recipe_of(tiny_model(), latency=0.5, ratio=0.5)
    with pytest.raises(UsageError, match="measured by a run"):
        Channels(latency=0.5).count(Checkpoint.open(tiny_model()))


def test_the_runtime_is_what_is_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    folder = latency._written(Channels(keep=64).after(checkpoint), tmp_path / "written")
    found = latency._seconds(folder, "cpu", rounds=2)
    assert len(found) == 2 and all(0 < seconds < 10 for seconds in found)
    assert Checkpoint.open(folder).tensors.keys() == checkpoint.tensors.keys()
