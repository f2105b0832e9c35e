"""Heads and channels: what goes, what is compensated, and what loaders accept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.artifact import open_artifact
from compress.core.checkpoint import Checkpoint
from compress.core.cuts import Cut, cut, widen
from compress.core.errors import UsageError
from compress.core.recipe import load_recipe, parse_recipe
from compress.pipeline import RunOptions, plan, run
from prune.channels import Channels
from prune.heads import Heads
from tests.conftest import TinyModel

STORY = "A small boat sailed to the island and a bird sat on its mast all day, looking at %d fishes. "
IMPORTANCES = ("osscar", "activation", "fluctuation", "magnitude")


def pruned(place: Path, model: Path, **settings: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / "text.txt").write_text("".join(STORY % number for number in range(40)))
    data = {
        "model": str(model),
        "calibration": {"dataset": "text.txt", "samples": 6, "length": 48},
        "stages": [{"prune": settings}],
    }
    return run(parse_recipe(data, base_folder=place), RunOptions(place / "out")).artifact


def changed(model: Path, place: Path, **edits: Any) -> Path:
    """A copy of a model, its tensors edited in place by functions of their names' ends."""
    folder = place / "model"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        for end, edit in edits.items():
            if name.endswith(end.replace("__", ".")):
                edit(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = Checkpoint.open(folder).build_model(torch.float32)
    ids = torch.arange(3, 60).view(1, -1)
    with torch.inference_mode():
        return model(ids).logits


def output_errors(artifact: Path) -> list[float]:
    """Of the blocks, as the run recorded them."""
    (stage,) = open_artifact(artifact).manifest.stages
    return [block["output_error"] for block in stage["blocks"]]


def dead(*index: int) -> Any:
    def edit(tensor: torch.Tensor) -> None:
        tensor[list(index)] = 0

    return edit


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_removing_dead_channels_changes_no_logit(tiny_model: TinyModel, tmp_path: Path, importance: str) -> None:
    gone = dead(*range(0, 128, 2))
    model = changed(tiny_model("llama"), tmp_path, gate_proj__weight=gone, up_proj__weight=gone)
    if importance == "magnitude":  # it looks at weights alone
        tensors = load_file(model / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("down_proj.weight"):
                tensor[:, ::2] = 0
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    smaller = pruned(tmp_path, model, method="channels", keep=64, importance=importance)
    assert Checkpoint.open(smaller).config["intermediate_size"] == 64
    assert float((logits(smaller) - logits(model)).abs().max()) < 1e-5


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("unit", ["groups", "queries"])
def test_removing_dead_heads_changes_no_logit(
    tiny_model: TinyModel, tmp_path: Path, importance: str, unit: str
) -> None:
    def first_head(tensor: torch.Tensor) -> None:  # its outputs are read by nobody
        tensor[:, :16] = 0
        tensor[:, 32:48] = 0
        if unit == "groups":
            tensor[:, 16:32] = 0
            tensor[:, 32:48] = 1e-3

    def no_values(tensor: torch.Tensor) -> None:
        if unit == "groups":
            tensor[:16] = 0

    model = changed(tiny_model("qwen3"), tmp_path, o_proj__weight=first_head, v_proj__weight=no_values)
    keep = 1 if unit == "groups" else 2
    if importance == "activation" and unit == "queries":
        return  # what a head computes is large, though nobody reads it: not what this score can see
    smaller = pruned(tmp_path, model, method="heads", unit=unit, keep=keep, importance=importance)
    config = Checkpoint.open(smaller).config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == ((2, 1) if unit == "groups" else (2, 2))
    assert config["head_dim"] == 16
    assert float((logits(smaller) - logits(model)).abs().max()) < 1e-5


def test_means_of_what_goes_become_biases(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    smaller = pruned(tmp_path, model, method="channels", ratio=0.5, importance="fluctuation")
    checkpoint = Checkpoint.open(smaller)
    assert checkpoint.config["mlp_bias"] is True
    for block in range(checkpoint.num_blocks):
        name = f"model.layers.{block}.mlp"
        assert not checkpoint.tensor(f"{name}.gate_proj.bias").any()
        assert checkpoint.tensor(f"{name}.down_proj.bias").any()
        assert checkpoint.tensor(f"{name}.up_proj.bias").shape == (64,)
    twin = tmp_path / "twin"  # the same weights, in a family that has no biases
    shutil.copytree(model, twin)
    config = json.loads((twin / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": None}
    (twin / "config.json").write_text(json.dumps(config))
    without = pruned(tmp_path / "more", twin, method="channels", ratio=0.5, importance="fluctuation")
    error, worse = (output_errors(folder) for folder in (smaller, without))
    assert all(one < 0.98 * other for one, other in zip(error, worse, strict=True))


def test_families_without_biases_are_not_compensated(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = {
        "model": str(tiny_model("mistral")),
        "calibration": {"dataset": str(tmp_path / "text.txt"), "samples": 4, "length": 16},
        "stages": [{"prune": {"method": "channels", "importance": "fluctuation"}}],
    }
    (tmp_path / "text.txt").write_text(STORY * 20)
    notices = plan(parse_recipe(recipe), RunOptions(tmp_path / "out")).notices
    assert any("mistral models have no bias there" in notice for notice in notices)


def test_heads_that_do_not_divide_the_stream_make_a_llama_a_mistral(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "three"
    shutil.copytree(tiny_model("llama"), model)
    config = json.loads((model / "config.json").read_text()) | {"num_key_value_heads": 4}
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[name] = tensor.repeat(2, 1)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    smaller = pruned(tmp_path, model, method="heads", keep=3, importance="magnitude")
    assert Checkpoint.open(smaller).model_type == "mistral"
    loaded, info = AutoModelForCausalLM.from_pretrained(smaller, output_loading_info=True)
    assert type(loaded).__name__ == "MistralForCausalLM" and not any(info.values())
    notes = Heads(keep=3).notices(Checkpoint.open(model))
    assert any("3 query heads do not divide hidden_size 64" in note for note in notes)


def test_heads_that_no_loader_would_take_are_refused(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("gemma2"))
    assert Heads(keep=1).count(checkpoint) == 1
    odd = Checkpoint.open(tiny_model("gemma2", True))
    with pytest.raises(UsageError, match="with 6 query heads no loader would open this gemma2 model") as refused:
        Heads(keep=6, unit="queries").count(odd)
    assert refused.value.hint == "keep one of 1, 2, 4, 7 query heads"


def test_targets_of_channels(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    assert Channels(ratio=0.3).count(checkpoint) == 88
    assert Channels(ratio=0.3, multiple=32).count(checkpoint) == 96
    with pytest.raises(UsageError, match="keep 90 feed-forward channels does not work: they go in steps of 8"):
        Channels(keep=90).count(checkpoint)
    least = sum(info.bytes for info in Channels(keep=64).after(checkpoint).tensors.values())
    assert Channels(max_size=least).count(checkpoint) == 64
    assert Channels(max_size=least - 1).count(checkpoint) == 56


def test_cuts() -> None:
    tensor = torch.arange(24.0).view(4, 6)
    cuts = [Cut.of(0, [2, 0], 4), Cut.of(1, [5, 1, 3], 6)]
    small = cut(tensor, cuts)
    assert small.tolist() == [[17, 13, 15], [5, 1, 3]]
    back = widen(widen(small, [cuts[1]]), [cuts[0]])
    assert torch.equal(back, tensor * (back != 0)) and int((back != 0).sum()) == 6
    assert cuts[1].removed == (0, 2, 4)
    for wrong in ([], [1, 1], [4], [-1]):
        with pytest.raises(ValueError, match="cannot be kept"):
            Cut.of(0, wrong, 4)


def test_sizes_are_those_of_the_result_though_a_stage_before_kept_fp32(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("mistral", False, "bfloat16")
    source = Checkpoint.open(model)
    limit = sum(info.bytes for info in Heads(keep=1).after(source).tensors.values()) - 5_000
    (tmp_path / "text.txt").write_text("".join(STORY % number for number in range(40)))
    data = {
        "model": str(model),
        "calibration": {"dataset": "text.txt", "samples": 6, "length": 48},
        "stages": [
            {"prune": {"method": "heads", "keep": 1}},
            {"prune": {"method": "channels", "max_size": limit}},
        ],
    }
    result = run(parse_recipe(data, base_folder=tmp_path), RunOptions(tmp_path / "out"))
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"] <= limit
    width = Checkpoint.open(result.artifact).config["intermediate_size"]
    assert f"{width} of 128 feed-forward channels stay" in result.summary["notices"]
    report = (result.report_folder / "report.md").read_text()
    assert f"| feed-forward channels | 128 | {width} |" in report and "| key-value heads | 2 | 1 |" in report


def test_a_target_that_cannot_be_reached_is_shown_where_it_stands(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model()}\nstages:\n  - prune: {{method: channels, importance: magnitude}}\n"
        "  - prune:\n      method: channels\n      importance: magnitude\n      max_size: 1kB\n"
    )
    with pytest.raises(UsageError, match="max_size 1,000 bytes .* cannot be reached by feed-forward") as refused:
        plan(load_recipe(recipe), RunOptions(tmp_path / "out"))
    assert str(refused.value.where).endswith("recipe.yaml:7:17")
    assert "stages[1].prune.max_size" in refused.value.message
    assert refused.value.hint is not None and refused.value.hint.startswith("choose at least that")
