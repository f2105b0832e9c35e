"""What is refused before any work: sources that do not fit their config, tasks that do not exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, RecipeError, UsageError
from compress.core.events import Event, Notice
from compress.core.recipe import Recipe, parse_recipe
from compress.core.walk import compute_dtype
from compress.pipeline import RunOptions, plan, run


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A folder with a model and a text, in which recipes use relative names."""
    shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("A small boat sailed to the island and a bird sat on its mast. " * 5)
    return tmp_path


def rtn(place: Path, **more: Any) -> Recipe:
    stage = {"quantize": {"method": "rtn", "group_size": 16}}
    return parse_recipe({"model": "model", "stages": [stage], **more}, base_folder=place)


def edit_tensors(place: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(place: Path, changes: dict[str, Any]) -> None:
    file = place / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.down_proj.weight", "is missing"),
        ("model.layers.2.input_layernorm.weight", "is missing"),
        ("model.embed_tokens.weight", "is missing"),
    ],
)
def test_a_source_that_lacks_a_weight_is_refused_by_plan_and_run(place: Path, name: str, words: str) -> None:
    edit_tensors(place, lambda tensors: tensors.pop(name))
    for act in (plan, run):
        with pytest.raises(InputError, match=f"{place / 'model'}: {name}: {words}"):
            act(rtn(place), RunOptions(place / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_with_a_weight_that_is_no_number_is_refused_before_work(place: Path, value: float) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    edit_tensors(place, lambda tensors: tensors[name][3].fill_(value))
    for act in (plan, run):
        with pytest.raises(InputError, match=f"{place / 'model'}: {name}: holds NaN or infinite values"):
            act(rtn(place), RunOptions(place / "out"))
    assert {path.name for path in place.iterdir()} == {"model", "text.txt"}


def test_a_window_longer_than_the_model_is_refused_before_work(place: Path) -> None:
    recipe = rtn(place, evaluate={"perplexity": {"dataset": "text.txt", "window": 100_000}})
    for act in (plan, run):
        with pytest.raises(UsageError, match=r"window 100000 is more than the model's \d+ positions"):
            act(recipe, RunOptions(place / "out"))
    assert not (place / "out.partial").exists()
    plan(recipe, RunOptions(place / "out", evaluate=False))


def test_a_source_with_a_weight_of_another_shape_is_refused_by_plan_and_run(place: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(place, lambda tensors: tensors.update({name: tensors[name][:, :120].contiguous()}))
    for act in (plan, run):
        with pytest.raises(InputError, match=rf"{name}: has shape \[64, 120\], config.json asks for \[64, 128\]"):
            act(rtn(place), RunOptions(place / "out"))


def test_a_task_that_does_not_exist_is_refused_by_plan_and_run(place: Path) -> None:
    (place / "tasks").mkdir()
    (place / "tasks" / "one.yaml").write_text("task: letters\n")
    recipe = rtn(place, evaluate={"tasks": ["letters", "leters"], "task_folder": "tasks"})
    for act in (plan, run):
        with pytest.raises(RecipeError, match=r"no such task: leters, .*the folder has letters") as caught:
            act(recipe, RunOptions(place / "out"))
        assert caught.value.where == "evaluate.tasks"
    plan(recipe, RunOptions(place / "out", evaluate=False))


def test_the_evaluation_says_in_which_dtype_it_was_computed(place: Path) -> None:
    text = {"perplexity": {"dataset": "text.txt", "window": 16}}
    recipe = rtn(place, evaluate=text)
    assert (
        run(recipe, RunOptions(place / "out", dtype="float32")).summary["evaluation"]["protocol"]["dtype"] == "float32"
    )
    automatic = run(recipe, RunOptions(place / "out", fresh=True)).summary["evaluation"]["protocol"]["dtype"]
    original = Checkpoint.open(place / "model")
    assert f"torch.{automatic}" == str(compute_dtype(original, "auto", "cpu"))


def test_a_tensor_that_the_family_does_not_know_is_noticed_and_carried_over(place: Path) -> None:
    odd = torch.ones(3)
    edit_tensors(place, lambda tensors: tensors.update({"model.layers.0.adapter.scale": odd}))
    planned = plan(rtn(place), RunOptions(place / "out"))
    wanted = "model.layers.0.adapter.scale: not a tensor of llama models, carried over as it is"
    assert wanted in planned.notices
    result = run(rtn(place), RunOptions(place / "out"))
    stored = Checkpoint.open(result.artifact)
    assert torch.equal(stored.tensor("model.layers.0.adapter.scale"), odd)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rms_norm_eps": "x"}, "rms_norm_eps"), ({"hidden_act": "nope"}, "no model can be built from it: 'nope'")],
)
def test_a_config_that_makes_no_model_is_refused_by_plan_and_run(
    place: Path, changes: dict[str, Any], words: str
) -> None:
    edit_config(place, changes)
    for act in (plan, run):
        with pytest.raises(InputError, match=words) as refused:
            act(rtn(place), RunOptions(place / "out"))
        assert refused.value.where == str(place / "model" / "config.json")
    assert not list(place.glob("out*"))


def test_values_that_overflow_are_refused_and_leave_nothing(place: Path) -> None:
    """The weights are finite numbers, but what the first block computes from them is not."""
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(place, lambda tensors: tensors[name].fill_(1e38))
    calibrated = {"calibration": {"dataset": "text.txt", "samples": 2, "length": 8}}
    stage = {"quantize": {"method": "gptq", "group_size": 16}}
    recipe = parse_recipe({"model": "model", "stages": [stage], **calibrated}, base_folder=place)
    for refused in (rtn(place), recipe):
        with pytest.raises(InputError, match=r"model\.layers\.0.*overflow fp32"):
            run(refused, RunOptions(place / "out"))
        assert not list(place.glob("out*"))


def test_a_layer_without_inputs_is_rounded_to_nearest_and_says_why(place: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    edit_tensors(place, lambda tensors: tensors[name].zero_())
    calibration = {"dataset": "text.txt", "samples": 2, "length": 8}
    stage = {"quantize": {"method": "gptq", "group_size": 16}}
    recipe = parse_recipe({"model": "model", "stages": [stage], "calibration": calibration}, base_folder=place)
    said: list[Event] = []
    run(recipe, RunOptions(place / "out"), said.append)
    reason = "rounded to nearest: its inputs were zero for every token of the calibration"
    assert Notice(reason, "model.layers.1.mlp.gate_proj", level="warning") in said
