"""Prepared models as artifacts: written, verified against their source, the same after a stop, read by transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import open_artifact
from compress.core.checkpoint import Checkpoint
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.recipe import Recipe, parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, run
from tests.conftest import TinyModel

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "
CASES: dict[str, dict[str, Any]] = {
    "rotate": {"method": "gptq", "scheme": "w8a16", "group_size": 16, "prepare": [{"rotate": {}}]},
    "smoothquant": {"method": "rtn", "scheme": "w8a8", "prepare": [{"smoothquant": {"steps": 3}}]},
    "awq": {"method": "awq", "scheme": "w8a16", "group_size": 16, "steps": 3},
    "all": {
        "method": "gptq",
        "scheme": "w8a16",
        "group_size": 16,
        "ignore": ["*.up_proj", "*.0.mlp.down_proj"],
        "prepare": [{"rotate": {}}, {"awq_scale": {"steps": 3}}],
    },
}


class Stopped(Exception):
    pass


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel) -> Path:
    shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(STORY * 4)
    return tmp_path


def recipe_of(name: str, place: Path) -> Recipe:
    calibration = {"dataset": "text.txt", "samples": 4, "length": 16}
    data = {"model": "model", "calibration": calibration, "stages": [{"quantize": CASES[name]}]}
    return parse_recipe(data, base_folder=place)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}


def stop_after_two(event: Event) -> None:
    if isinstance(event, Progress) and event.stage == "walk" and event.done == 2:
        raise Stopped


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_artifact_is_whole_verified_and_the_same_after_a_stop(name: str, place: Path) -> None:
    result = run(recipe_of(name, place), RunOptions(place / "out"))
    report = verify(result.artifact, source=place / "model")
    assert report.ok, report.checks
    assert report.level == "coverage"
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    with pytest.raises(Stopped):
        run(recipe_of(name, place), RunOptions(place / "stopped"), stop_after_two)
    again = run(recipe_of(name, place), RunOptions(place / "stopped"))
    assert contents(result.artifact) == contents(again.artifact)


@pytest.mark.parametrize("name", CASES)
def test_what_became_of_each_tensor_is_told(name: str, place: Path) -> None:
    result = run(recipe_of(name, place), RunOptions(place / "out"))
    fates = {item.tensor: (item.status, item.reason) for item in open_artifact(result.artifact).manifest.coverage}
    status, reason = fates["model.layers.1.self_attn.q_proj.weight"]
    transform = {"awq": "awq_scale", "all": "rotate, awq_scale"}.get(name, name)
    assert (status, reason) == ("quantized", f"{result.summary['stages'][0]['layers'][0]['scheme']} after {transform}")
    assert ("lm_head.weight" in fates) == (name in ("rotate", "all"))
    if "lm_head.weight" in fates:
        assert fates["lm_head.weight"][0] == "added"
        assert fates["model.embed_tokens.weight"] == ("changed", f"after {transform}")
        assert any("embedding and head are two tensors" in notice for notice in result.summary["notices"])
    assert {status for status, _ in fates.values()} <= {"quantized", "kept", "changed", "added"}


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_artifact_says_about_what_the_model_says(name: str, place: Path) -> None:
    artifact = run(recipe_of(name, place), RunOptions(place / "out")).artifact
    ids = torch.arange(32)[None] * 7 % 256
    with torch.no_grad():
        expected = Checkpoint.open(place / "model").build_model(torch.float32)(ids).logits
        found = Checkpoint.open(artifact).build_model(torch.float32)(ids).logits
    error_BT = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error_BT.mean()) < 0.06
    dtypes = {info.dtype for key, info in Checkpoint.open(artifact).tensors.items() if "norm" in key}
    assert dtypes == {"BF16"}


def test_changed_tensors_do_not_hide_a_broken_kept_one(place: Path) -> None:
    """A norm said to be kept must still be the source's."""
    result = run(recipe_of("smoothquant", place), RunOptions(place / "out"))
    other = shutil.copytree(place / "model", place / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = verify(result.artifact, source=other)
    assert [check.name for check in report.checks if not check.ok] == ["lineage", "kept"]
