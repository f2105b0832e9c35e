"""Features: the formulas, what they read of a model, which layers they pair, and runs that stop and go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distill._features
from compress.core.checkpoint import Checkpoint
from compress.core.errors import CompressError, UsageError
from compress.pipeline import RunOptions, run
from distill._batches import Batch
from distill._features import Inside, features_loss, layer_pairs, projection
from distill._states import distance, relation_divergence
from distill.features import Features
from tests.conftest import TinyModel
from tests.distill.test_logits import FAMILIES, lessons, recipe_of, require_the_same_after_a_stop

COUNTED = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])


def states(seed: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(2, 5, width, generator=generator, dtype=torch.float64)


def naive_relations(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Position by position, head by head, by probabilities."""
    total = []
    for row, position in COUNTED.nonzero().tolist():
        for head in range(heads):
            dists = []
            for x in (teacher, student):
                d = x.shape[-1] // heads
                cut = x[row, :, head * d : (head + 1) * d]
                scores = torch.stack([cut[position] @ cut[j] / math.sqrt(d) for j in range(position + 1)])
                dists.append(scores.exp() / scores.exp().sum())
            total.append((dists[0] * (dists[0] / dists[1]).log()).sum())
    return torch.stack(total).mean()


def naive_distance(student: Tensor, teacher: Tensor, measure: str) -> Tensor:
    total = []
    for row, position in COUNTED.nonzero().tolist():
        s, t = student[row, position], teacher[row, position]
        far = (s - t) @ (s - t) / (t @ t) if measure == "mse" else 1 - (s @ t) / (s.norm() * t.norm())
        total.append(far)
    return torch.stack(total).mean()


@pytest.mark.parametrize("measure", ["relations", "mse", "cosine"])
def test_values_and_gradients_are_those_of_the_formula(measure: Any) -> None:
    mine, wanted_mine = (states(1, 12).requires_grad_() for _ in range(2))
    teacher = states(2, 20 if measure == "relations" else 12)
    if measure == "relations":
        found, wanted = relation_divergence(mine, teacher, COUNTED, 4), naive_relations(wanted_mine, teacher, 4)
    else:
        found, wanted = distance(mine, teacher, COUNTED, measure), naive_distance(wanted_mine, teacher, measure)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    found.backward()
    wanted.backward()
    assert torch.allclose(mine.grad, wanted_mine.grad, rtol=1e-4, atol=1e-6)
    assert bool((mine.grad[1, 2:] == 0).all())  # nothing counts there, and nobody looks back from there


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_relations_are_what_the_model_computes_with(tiny_model: TinyModel, family: str) -> None:
    model = Checkpoint.open(tiny_model(family, family != "gemma3_text")).build_model(torch.float32)
    inside, ids = Inside.of(model), torch.arange(2 * 11).view(2, 11)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(keep(f"block {index}"))
        for name, module in block.self_attn.named_children():
            module.register_forward_hook(keep(f"{index} {name}"))
    model.model.norm.register_forward_hook(keep("norm"))
    with torch.no_grad():
        found = inside.states(ids)
        before = dict(seen)
        assert len(found) == inside.blocks + 1
        assert torch.equal(found[-1], before["norm"])
        assert all(torch.equal(found[index], before[f"block {index - 1}"]) for index in range(1, inside.blocks))
        for index in range(inside.blocks):
            names = ["qkv_proj"] if f"{index} qkv_proj" in before else ["q_proj", "k_proj", "v_proj"]
            wanted = torch.cat([before[f"{index} {name}"] for name in names], dim=-1)
            parts = inside.attention_inputs(index, found[index])
            assert [part.shape[-1] for part in parts] == inside.widths
            assert torch.allclose(torch.cat(list(parts), dim=-1), wanted, atol=1e-5)


def test_what_stands_in_padding_changes_nothing(tiny_model: TinyModel) -> None:
    inside = Inside.of(Checkpoint.open(tiny_model()).build_model(torch.float32))
    teacher = Inside.of(Checkpoint.open(tiny_model("llama", False, "bfloat16")).build_model(torch.bfloat16))
    settings = Features(attention=1.0, relations="all", layers={0: 1, 2: 2})
    projections = {layer: projection(64, 64, 0, "cpu") for layer in (0, 2)}
    loss = features_loss(settings, inside, teacher, {0: 1, 2: 2}, projections)
    ids, target = torch.arange(12).view(2, 6), torch.arange(12).view(2, 6) + 1
    target[1, 3:] = -100
    other = ids.clone()
    other[1, 4:] = 200
    with torch.no_grad():
        assert float(loss(Batch(ids, target))) == pytest.approx(float(loss(Batch(other, target))), rel=1e-6)
        assert float(loss(Batch(ids, target))) > 0


def test_layers_are_paired() -> None:
    assert layer_pairs(None, 6, 8, [0, 1, 2, 5, 6, 7]) == {0: 0, 1: 1, 2: 2, 3: 5, 4: 6, 5: 7}
    assert layer_pairs(None, 4, 12, None) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert layer_pairs(None, 3, 3, None) == {0: 0, 1: 1, 2: 2}
    assert layer_pairs({2: 1}, 3, 3, [0, 1, 2]) == {2: 1}
    with pytest.raises(UsageError, match="the teacher has no layer 3: its layers are 0 to 2"):
        layer_pairs({0: 3}, 2, 3, None)


def test_a_run_knows_which_layers_stayed(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def listening(*args: Any) -> dict[int, int]:
        heard.append(args)
        return layer_pairs(*args)

    monkeypatch.setattr(distill._features, "layer_pairs", listening)
    cut = {"prune": {"method": "depth", "keep": 2, "contiguous": False}}
    settings = lessons(2, method="features", attention=0.5, layers={1: 2})
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), cut, settings)
    run(recipe, RunOptions(tmp_path / "out", keep_stages=True))
    left = Checkpoint.open(tmp_path / "out.stages" / "00-prune")
    source = Checkpoint.open(tiny_model("llama", False, "bfloat16"))
    norm = "model.layers.{}.input_layernorm.weight"
    kept = [
        next(
            k
            for k in range(3)
            if torch.equal(left.tensor(norm.format(i)).float(), source.tensor(norm.format(k)).float())
        )
        for i in range(2)
    ]
    assert heard == [({1: 2}, 2, 3, tuple(kept))]


def test_a_stopped_run_of_another_width_ends_with_the_same_losses_and_bytes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    cut = {"prune": {"method": "hidden", "keep": 48}}
    settings = lessons(7, method="features", hidden=1.0, attention=0.5, distance="cosine")
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), cut, settings)
    require_the_same_after_a_stop(recipe, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": {5: 1}}, "the student has no layer 5: its layers are 0 to 2"),
        ({"hidden": 0.0}, "neither hidden states nor attention are compared"),
        ({"attention": 1.0, "relation_heads": 5}, "relation_heads 5 does not divide a width of 64"),
    ],
)
def test_settings_that_cannot_work(
    tiny_model: TinyModel, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    recipe = recipe_of(tmp_path, tiny_model(), lessons(2, method="features", **settings))
    with pytest.raises(CompressError, match=message):
        run(recipe, RunOptions(tmp_path / "out"))
