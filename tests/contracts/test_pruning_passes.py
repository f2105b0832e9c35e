"""What every method that sets single weights to zero must do: inherited for free by each such file of `prune`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.methods import available_kinds, find_pass
from prune._settings import WeightPruning
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run, tokens_for
from tests.contracts.test_passes import troubled
from tests.tiny import FAMILIES, LAYERS

PRUNERS = [name for name in available_kinds()["prune"] if issubclass(find_pass("prune", name), WeightPruning)]
methods = pytest.mark.parametrize("method", PRUNERS)
WITH_UPDATE = ("sparsegpt", "alps")
QUICK: dict[str, dict[str, object]] = {"alps": {"iterations": 12}}


def settings_of(method: str, **asked: object) -> WeightPruning:
    found = find_pass("prune", method).model_validate_json(json.dumps(QUICK.get(method, {}) | asked))
    assert isinstance(found, WeightPruning)
    return found


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).double().mean())


@methods
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_as_planned(tiny_model: TinyModel, method: str, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    checkpoint = Checkpoint.open(folder)
    settings = settings_of(method, sparsity=0.6)
    plan = settings.plan(checkpoint, tokens_for(checkpoint))
    shelf = run(folder, settings, Shelf())
    assert {f"{layer.name}.weight" for layer in plan.layers if layer.sparsity == 0.6} == set(shelf.dense)
    for name, weight in shelf.dense.items():
        assert weight.dtype == torch.float32
        assert zeros(weight) == pytest.approx(0.6, abs=1 / weight.shape[1] + 1e-6), name
        if method not in WITH_UPDATE:
            before = checkpoint.tensor(name).float()
            assert torch.equal(weight, before * (weight != 0))
    assert len(shelf.records) == LAYERS
    sites = [site for record in shelf.records for site in record.sites]
    assert {f"{site.name}.weight" for site in sites} == set(shelf.dense)
    assert all(site.method and site.sparsity and site.error is not None and 0 <= site.error < 1 for site in sites)
    assert plan.bytes_out == sum(info.bytes for info in checkpoint.tensors.values())
    assert any("stored like other weights" in notice for notice in plan.notices)
    assert plan.peak_memory_bytes > 0 and plan.minutes > 0


@methods
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:8"])
def test_patterns(tiny_model: TinyModel, method: str, pattern: str) -> None:
    kept, among = map(int, pattern.split(":"))
    for name, weight in run(tiny_model("llama"), settings_of(method, pattern=pattern), Shelf()).dense.items():
        counts = (weight.reshape(-1, among) != 0).sum(1)
        assert bool((counts == kept).all()), name


@methods
def test_a_pattern_that_does_not_fit_is_refused(tiny_model: TinyModel, method: str) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama", odd=True))
    with pytest.raises(UsageError, match=r"pattern 1:48 does not fit .* 48 does not divide its \d+ input channels"):
        settings_of(method, pattern="1:48").plan(checkpoint, tokens_for(checkpoint))


@methods
@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"pattern": "2:4", "sparsity": 0.6}, "has a sparsity of 0.5, not 0.6"),
        ({"pattern": "2:4", "allocation": "owl"}, "needs unstructured"),
        ({"pattern": "4:2"}, "keeps 4 of 2"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_are_refused(method: str, asked: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        settings_of(method, **asked)


@methods
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("asked", [{}, {"allocation": "owl"}, {"pattern": "2:4"}], ids=["plain", "owl", "2:4"])
def test_the_same_run_gives_the_same_bits(
    tiny_model: TinyModel, method: str, family: str, asked: dict[str, object]
) -> None:
    first, second = (run(tiny_model(family), settings_of(method, **asked), Shelf()) for _ in range(2))
    assert first.dense.keys() == second.dense.keys()
    assert all(torch.equal(weight, second.dense[name]) for name, weight in first.dense.items())
    assert first.records == second.records


@methods
@pytest.mark.parametrize("done", range(1, LAYERS))
def test_a_resumed_run_gives_the_same_bits(tiny_model: TinyModel, method: str, done: int) -> None:
    settings = settings_of(method, allocation="owl")
    whole = run(tiny_model("gemma3_text"), settings, Shelf())
    resumed = run(tiny_model("gemma3_text"), settings, Shelf(whole, done))
    assert all(torch.equal(weight, resumed.dense[name]) for name, weight in whole.dense.items())
    assert whole.records == resumed.records


@methods
def test_ignored_layers_are_left_alone(tiny_model: TinyModel, method: str) -> None:
    settings = settings_of(method, ignore=("*.down_proj", "model.layers.1.*", "*.nothing"))
    checkpoint = Checkpoint.open(tiny_model("llama"))
    plan = settings.plan(checkpoint, tokens_for(checkpoint))
    assert any("*.nothing" in notice for notice in plan.notices)
    names = set(run(tiny_model("llama"), settings, Shelf()).dense)
    assert names and not any("down_proj" in name or ".layers.1." in name for name in names)
    with pytest.raises(UsageError, match="nothing to prune"):
        settings_of(method, ignore=("*",)).plan(checkpoint, tokens_for(checkpoint))


@methods
@pytest.mark.parametrize("trouble", ["dead channels", "zero layer", "huge weight", "one token", "constant input"])
def test_numerics_under_stress(tiny_model: TinyModel, tmp_path: Path, method: str, trouble: str) -> None:
    folder = troubled(tiny_model("llama"), tmp_path / "model", trouble)
    checkpoint = Checkpoint.open(folder)
    tokens = tokens_for(checkpoint, 1, 1) if trouble == "one token" else tokens_for(checkpoint)
    if trouble == "constant input":
        tokens.ids.zero_()
    shelf = run(folder, settings_of(method), Shelf(), tokens)
    assert shelf.dense
    for name, weight in shelf.dense.items():
        assert bool(weight.isfinite().all()), name
        assert zeros(weight) >= 0.5 - 1 / weight.shape[1] - 1e-6, name
