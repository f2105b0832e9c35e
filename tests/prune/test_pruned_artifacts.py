"""Pruned models as artifacts: whole, verified against their source, the same after a stop, opened by transformers."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import open_artifact
from compress.core.checkpoint import Checkpoint
from compress.core.errors import RecipeError
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.model_files import MASKED_KEY
from compress.core.recipe import Recipe, parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from tests.conftest import TinyModel

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "
PRUNED = {"prune": {"method": "sparsegpt", "pattern": "2:4"}}
STAGES: dict[str, list[dict[str, Any]]] = {
    "dense": [PRUNED],
    "owl": [{"prune": {"method": "wanda", "allocation": "owl", "sparsity": 0.5}}],
    "twice": [{"prune": {"method": "alps", "sparsity": 0.3, "iterations": 20}}, {"prune": {"method": "wanda"}}],
    "quantized": [PRUNED, {"quantize": {"method": "gptq", "scheme": "w3a16", "group_size": 16}}],
    "learned": [PRUNED, {"quantize": {"method": "autoround", "scheme": "w2a16", "group_size": 16, "steps": 3}}],
}


class Stopped(Exception):
    pass


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel) -> Path:
    shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(STORY * 4)
    return tmp_path


def recipe_of(place: Path, stages: list[dict[str, Any]]) -> Recipe:
    calibration = {"dataset": "text.txt", "samples": 4, "length": 16}
    return parse_recipe({"model": "model", "calibration": calibration, "stages": stages}, base_folder=place)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}


def layers_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    names = (name for index in range(checkpoint.num_blocks) for name in checkpoint.sites(index))
    return {name: checkpoint.weight(name, torch.float32) for name in names}


@pytest.mark.parametrize("name", STAGES)
def test_an_artifact_is_whole_and_the_same_after_a_stop(name: str, place: Path) -> None:
    result = run(recipe_of(place, STAGES[name]), RunOptions(place / "out"))
    report = verify(result.artifact, source=place / "model")
    assert report.ok, report.checks
    assert report.level == "coverage"
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    for layer, weight in layers_of(result.artifact).items():
        zeros = float((weight == 0).double().mean())
        assert zeros > 0.49 or name == "owl", layer
        assert zeros < 0.51 or name not in ("dense", "twice"), layer

    def stop_after_two(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and event.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(recipe_of(place, STAGES[name]), RunOptions(place / "stopped"), stop_after_two)
    again = run(recipe_of(place, STAGES[name]), RunOptions(place / "stopped"))
    assert contents(result.artifact) == contents(again.artifact)


@pytest.mark.parametrize("name", ["quantized", "learned"])
def test_the_pattern_reaches_the_quantized_artifact(name: str, place: Path) -> None:
    result = run(recipe_of(place, STAGES[name]), RunOptions(place / "out"))
    for layer, weight in layers_of(result.artifact).items():
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()), layer


def test_transformers_opens_it_without_a_word(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = run(recipe_of(place, STAGES["dense"]), RunOptions(place / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(result.artifact, output_loading_info=True)
    assert not any(info.values())
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.bfloat16
    assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_what_is_told_of_it(place: Path) -> None:
    result = run(recipe_of(place, STAGES["dense"]), RunOptions(place / "out"))
    fates = {item.tensor: (item.status, item.reason) for item in open_artifact(result.artifact).manifest.coverage}
    assert fates["model.layers.1.self_attn.q_proj.weight"] == ("changed", "after sparsegpt")
    assert fates["model.embed_tokens.weight"][0] == "kept"
    card = (result.artifact / "README.md").read_text()
    assert "with dense weights" in card and "compressed-tensors" not in card.split("## Recipe")[0]
    assert "zeros are stored like other weights" in card
    report = (result.report_folder / "report.html").read_text()
    assert "50.0 % zeros" in report
    assert "| zeros in the pruned layers | – | 50" in (result.report_folder / "report.md").read_text()


def test_a_masked_model_may_be_the_source(place: Path) -> None:
    first = run(recipe_of(place, STAGES["dense"]), RunOptions(place / "out"))
    assert Checkpoint.open(first.artifact).config[MASKED_KEY] is True
    data = {"model": str(first.artifact), "stages": [{"quantize": {"method": "rtn", "group_size": 16}}]}
    second = run(parse_recipe(data, base_folder=place), RunOptions(place / "second"))
    assert MASKED_KEY not in Checkpoint.open(second.artifact).config
    for layer, weight in layers_of(second.artifact).items():
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()), layer


def test_orders_that_cannot_work_are_refused(place: Path) -> None:
    rotated = {"quantize": {"method": "gptq", "group_size": 16, "prepare": [{"rotate": {}}]}}
    with pytest.raises(RecipeError, match="leaves no zero a zero, but those that stages.0. leaves are masked"):
        recipe_of(place, [PRUNED, rotated])
    with pytest.raises(RecipeError, match="sparsegpt takes dense or masked weights, but .* are quantized"):
        recipe_of(place, [{"quantize": {"method": "gptq", "group_size": 16}}, PRUNED])


def test_the_plan_says_how_many_zeros(place: Path) -> None:
    found = plan(recipe_of(place, STAGES["quantized"]), RunOptions(place / "out"))
    assert {layer.sparsity for layer in found.stages[0].layers} == {0.5}
    assert found.bytes_out == found.stages[1].bytes_out < found.bytes_in
