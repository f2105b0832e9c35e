"""Sparsities by sensitivity: the share is kept, what the model minds is spared, it is measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.events import Event, Notice, Progress
from compress.core.files import sha256_file
from compress.core.methods import find_pass
from compress.core.recipe import parse_recipe
from compress.pipeline import RunOptions, run
from prune._sensitivity import choices, pick
from prune._settings import WeightPruning
from tests.conftest import TinyModel
from tests.contracts.shelf import tokens_for
from tests.prune.test_pruned_artifacts import Stopped, layers_of


def recipe_of(model: Path | str, **settings: Any) -> Any:
    calibration = {"dataset": "demo", "samples": 8, "length": 32}
    stage = {"prune": {"method": "wanda", "allocation": "sensitivity", **settings}}
    return parse_recipe({"model": str(model), "calibration": calibration, "stages": [stage]})


def zeros_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: (int((weight == 0).sum()), weight.numel()) for name, weight in layers_of(folder).items()}


def test_choices_lie_around_the_share_and_inside() -> None:
    assert choices(0.6, 0.2) == (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
    assert choices(0.9, 0.2) == (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert choices(0.123456789123, 0.04)[4] == pytest.approx(0.123456789123)


def test_the_share_is_kept_with_the_least_loss() -> None:
    shares = choices(0.5, 0.2)
    minded = [10 * share**2 for share in shares]
    cheap = [0.01 * share**2 for share in shares]
    assert [shares[place] for place in pick([minded, cheap], [100, 100], shares, 0.5)] == [0.3, 0.7]
    assert [shares[place] for place in pick([minded, cheap], [100, 200], shares, 0.5)] == [0.3, 0.6]
    same = [share**2 for share in shares]
    assert [shares[place] for place in pick([same] * 5, [64] * 5, shares, 0.5)] == [0.5] * 5


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("family", "odd"), [("llama", False), ("phi3", True), ("gemma2", False), ("mixtral", True)])
def test_there_are_as_many_zeros_as_asked_for(
    tiny_model: TinyModel, tmp_path: Path, method: str, family: str, odd: bool
) -> None:
    result = run(recipe_of(tiny_model(family, odd), method=method, sparsity=0.6), RunOptions(tmp_path / "out"))
    zeros = zeros_of(result.artifact)
    shares = {name: round(found / count, 2) for name, (found, count) in zeros.items()}
    assert len(set(shares.values())) > 3
    assert min(shares.values()) >= 0.37 and max(shares.values()) <= 0.81
    found, count = (sum(sizes) for sizes in zip(*zeros.values(), strict=True))
    assert 0.59 < found / count < 0.63
    experts: dict[str, set[float]] = {}
    for name, share in shares.items():
        if ".experts." in name:
            experts.setdefault(f"{name.split('.experts.')[0]}.{name.rpartition('.')[2]}", set()).add(share)
    assert all(len(found) == 1 for found in experts.values())


def test_layers_whose_output_counts_more_are_spared(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = Checkpoint.open(tiny_model("llama")).build_model(torch.float32)
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.down_proj" in name:
            parameter.data *= 0.02  # what this block's feed-forward network says is hardly heard
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((tiny_model("llama") / "tokenizer.json").read_bytes())
    zeros = zeros_of(run(recipe_of(tmp_path / "model"), RunOptions(tmp_path / "out")).artifact)
    quiet = [found / count for name, (found, count) in zeros.items() if ".1.mlp." in name]
    others = [found / count for name, (found, count) in zeros.items() if ".1.mlp." not in name]
    assert min(quiet) > 0.65
    assert sum(others) / len(others) < 0.5


def test_a_resumed_run_does_not_measure_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    said: list[str] = []

    def stop_in_the_walk(event: Event) -> None:
        if isinstance(event, Notice) and "sensitivities ask for" in event.message:
            said.append(event.message)
        if isinstance(event, Progress) and event.stage == "walk" and event.done == 2 and said:
            raise Stopped

    asked = recipe_of(tiny_model("llama"))
    with pytest.raises(Stopped):
        run(asked, RunOptions(tmp_path / "out"), stop_in_the_walk)
    assert len(said) == 1
    events: list[Event] = []
    resumed = run(asked, RunOptions(tmp_path / "out"), events.append)
    assert not any(isinstance(event, Notice) and "sensitivities ask" in event.message for event in events)
    whole = run(asked, RunOptions(tmp_path / "whole"))
    for path in whole.artifact.iterdir():
        assert sha256_file(path) == sha256_file(resumed.artifact / path.name), path.name


def test_measuring_is_planned_and_what_contradicts_is_refused(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    found: dict[str, Any] = {}
    for allocation in ("uniform", "sensitivity"):
        settings = find_pass("prune", "wanda").model_validate({"allocation": allocation})
        assert isinstance(settings, WeightPruning)
        found[allocation] = settings.plan(checkpoint, tokens_for(checkpoint))
    assert found["sensitivity"].minutes > found["uniform"].minutes
    assert found["sensitivity"].peak_memory_bytes > found["uniform"].peak_memory_bytes
    for asked in ({"compare": "global", "allocation": "owl"}, {"pattern": "2:4", "allocation": "sensitivity"}):
        with pytest.raises(ValueError, match="finds the sparsity of each layer itself|needs unstructured"):
            find_pass("prune", "wanda").model_validate(asked)
