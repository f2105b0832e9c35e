"""Pruning in steps: the target is met, zeros stay, a stop in the middle changes no byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.core.checkpoint import Checkpoint
from compress.core.errors import RecipeError
from compress.core.events import Event, Progress
from compress.core.recipe import Recipe, load_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from tests.prune.test_pruned_artifacts import Stopped, contents, layers_of, place, recipe_of

__all__ = ["place"]


def steps(place: Path, count: int = 3, **prune: Any) -> Recipe:
    return recipe_of(place, [{"steps": {"count": count, "stages": [{"prune": prune}]}}])


@pytest.mark.parametrize(
    ("asked", "widths"),
    [
        ({"ratio": 0.5}, (104, 80, 64)),
        ({"keep": 64}, (104, 80, 64)),
        ({"keep": 128}, (128, 128, 128)),
        ({"keep": 8}, (48, 16, 8)),
    ],
)
def test_steps_go_by_equal_shares_to_the_target(place: Path, asked: dict[str, Any], widths: tuple[int, ...]) -> None:
    recipe = steps(place, method="channels", importance="magnitude", **asked)
    planned = plan(recipe, RunOptions(place / "out"))
    told = [notice for stage in planned.stages for notice in stage.notices]
    before = (128, *widths)
    for notice, width, there in zip(told, widths, before, strict=False):
        assert notice.startswith(f"{width} of {there} feed-forward channels stay") or width == there == 128


@pytest.mark.parametrize("target", ["parameters", "max_size"])
def test_steps_to_a_size_end_where_one_stage_would(place: Path, target: str) -> None:
    source = Checkpoint.open(place / "model")
    measure = {"parameters": 1, "max_size": 2}[target] * sum(info.bytes // 2 for info in source.tensors.values())
    asked = {"method": "channels", "importance": "activation", target: int(measure * 0.8)}
    result = run(steps(place, **asked), RunOptions(place / "out"))
    config = Checkpoint.open(result.artifact).config
    one = run(steps(place, 1, **asked), RunOptions(place / "one"))
    assert config["intermediate_size"] == Checkpoint.open(one.artifact).config["intermediate_size"] < 128
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]


def test_a_stop_in_the_second_step_changes_no_byte(place: Path) -> None:
    asked = {"method": "sparsegpt", "sparsity": 0.6}
    result = run(steps(place, **asked), RunOptions(place / "out"))
    assert verify(result.artifact, source=place / "model").ok
    zeros = [float((weight == 0).double().mean()) for weight in layers_of(result.artifact).values()]
    assert all(0.58 < share < 0.62 for share in zeros)
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk":
            seen.append(event)
            if len(seen) == 5:
                raise Stopped

    with pytest.raises(Stopped):
        run(steps(place, **asked), RunOptions(place / "stopped"), stop)
    again = run(steps(place, **asked), RunOptions(place / "stopped"))
    assert contents(result.artifact) == contents(again.artifact)


def test_the_recipe_in_the_artifact_gives_the_same_run(place: Path) -> None:
    result = run(steps(place, method="wanda", pattern="2:8"), RunOptions(place / "out"))
    (place / "again.yaml").write_text((result.artifact / "recipe.yaml").read_text())
    again = run(load_recipe(place / "again.yaml"), RunOptions(place / "again"))
    assert contents(result.artifact) == contents(again.artifact)
    for weight in layers_of(result.artifact).values():
        assert bool(((weight.reshape(-1, 8) != 0).sum(1) <= 2).all())


def test_earlier_zeros_stay_zeros(place: Path) -> None:
    result = run(steps(place, method="wanda", sparsity=0.5), RunOptions(place / "out", keep_stages=True))
    folders = sorted((place / "out.stages").iterdir())
    assert len(folders) == 3
    before, *later = [layers_of(folder) for folder in (*folders, result.artifact)]
    for after in later:
        for name, weight in before.items():
            assert bool((after[name][weight == 0] == 0).all())
        before = after


def test_parts_are_of_absolute_targets(place: Path) -> None:
    with pytest.raises(RecipeError, match="parts goes with keep, parameters or max_size"):
        recipe_of(place, [{"prune": {"method": "channels", "parts": 2}}])
