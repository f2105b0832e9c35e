"""Bits where the model minds errors: the knapsack, the budget, and what the schemes that were chosen become."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.cli.tables import fate
from compress.core.checkpoint import Checkpoint
from compress.core.compatibility import preflight, unsettled
from compress.core.errors import InputError, UsageError
from compress.core.events import Event, Notice
from compress.inputs import RunOptions
from compress.report import data as report
from quantize._mixed import Item, knapsack
from tests.conftest import TinyModel

options = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(options, min_size=1, max_size=5), st.integers(1, 200))
def test_the_knapsack_is_exact(drawn: list[list[tuple[int, float]]], budget: int) -> None:
    items = [
        Item((str(number),), tuple(size for size, _ in pairs), tuple(loss for _, loss in pairs))
        for number, pairs in enumerate(drawn)
    ]
    every = product(*(range(len(pairs)) for pairs in drawn))
    fitting = [picked for picked in every if _total(items, picked, "bytes") <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="no choice of schemes fits"):
            knapsack(items, budget)
        return
    picked = knapsack(items, budget)
    assert _total(items, picked, "bytes") <= budget
    best = min(_total(items, other, "losses") for other in fitting)
    assert _total(items, picked, "losses") == pytest.approx(best, rel=1e-6, abs=1e-6)


def _total(items: list[Item], picked: Any, field: str) -> float:
    return sum(getattr(item, field)[place] for item, place in zip(items, picked, strict=True))


def recipe(folder: Path | str, tmp_path: Path, stage: dict[str, Any], export: str = "compressed-tensors") -> Any:
    data = {
        "model": str(folder),
        "calibration": {"dataset": "demo", "samples": 8, "length": 32},
        "stages": [{"quantize": {"method": "mixed", "group_size": 16, **stage}}],
        "export": {"format": export},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    return compress.load_recipe(file)


def run(recipe: Any, tmp_path: Path, name: str = "out", **more: Any) -> Checkpoint:
    result = compress.run(recipe, RunOptions(output=tmp_path / name, evaluate=False), **more)
    return Checkpoint.open(result.artifact)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral"])
def test_the_budget_is_kept_and_siblings_agree(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    folder = tiny_model(family, dtype="bfloat16")
    plan = compress.plan(asked := recipe(folder, tmp_path, {"scheme": "w4a16"}), RunOptions(output=tmp_path / "out"))
    artifact = run(asked, tmp_path)
    size = sum(info.bytes for info in artifact.tensors.values())
    assert 0.93 * plan.bytes_out < size <= plan.bytes_out
    assert len({scheme.bits for scheme in artifact.schemes.values()}) > 1
    for index in range(artifact.num_blocks):
        for name, sites in artifact.groups(index):
            if "experts" not in name:
                assert len({artifact.schemes[site] for site in sites}) == 1, name
        experts = {artifact.schemes[site] for site in artifact.sites(index) if site.endswith(("w2", "down_proj"))}
        assert len(experts) == 1


def test_what_is_said_before_and_after(tiny_model: TinyModel, tmp_path: Path) -> None:
    asked = recipe(
        tiny_model("llama", dtype="bfloat16"), tmp_path, {"bits_per_weight": 4.5, "choices": ["w3a16", "w4a16"]}
    )
    plan = compress.plan(asked, RunOptions(output=tmp_path / "out", evaluate=False))
    assert {fate(layer) for layer in plan.layers} == {"one of w3a16, w4a16"}
    summary = compress.run(asked, RunOptions(output=tmp_path / "out", evaluate=False)).summary
    assert report.summary(summary).startswith("mixed 4.5 bits")
    assert {layer["scheme"] for layer in summary["stages"][0]["layers"]} == {"w3a16", "w4a16"}


def test_bits_per_weight_and_size_are_budgets(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", dtype="bfloat16")
    artifact = run(recipe(folder, tmp_path, {"bits_per_weight": 4.5}), tmp_path)
    parts = (name for module in artifact.schemes for name in artifact.stored_names(module))
    names = [name for name in parts if not name.endswith("weight_shape")]
    weights = sum(rows * width for rows, width in map(artifact.matrix_shape, artifact.schemes))
    assert 4.2 < 8 * sum(artifact.tensors[name].bytes for name in names) / weights <= 4.5
    bound = sum(info.bytes for info in artifact.tensors.values()) + 200
    again = run(recipe(folder, tmp_path, {"size": f"{bound}B"}), tmp_path, "sized")
    assert 0.95 * bound < sum(info.bytes for info in again.tensors.values()) <= bound


def test_embedding_and_head_may_be_chosen(tiny_model: TinyModel, tmp_path: Path) -> None:
    stage = {"vocabulary": True, "bits_per_weight": 4.0}
    artifact = run(recipe(tiny_model("llama", dtype="bfloat16"), tmp_path, stage), tmp_path)
    assert {"lm_head", "model.embed_tokens"} & artifact.schemes.keys()
    assert artifact.config["tie_word_embeddings"] is False


def test_what_is_fixed_stays_fixed(tiny_model: TinyModel, tmp_path: Path) -> None:
    stage = {"ignore": ["*.o_proj"], "overrides": [{"layers": "*.v_proj", "scheme": "w8a16"}], "scheme": "w3a16"}
    artifact = run(recipe(tiny_model("llama", dtype="bfloat16"), tmp_path, stage), tmp_path)
    assert not any(name.endswith("o_proj") for name in artifact.schemes)
    assert {scheme.bits for name, scheme in artifact.schemes.items() if name.endswith("v_proj")} == {8}


def test_a_budget_of_more_than_the_largest_choice_is_that(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, options = tiny_model("llama", dtype="bfloat16"), RunOptions(output=tmp_path / "out", evaluate=False)
    plans = [compress.plan(recipe(folder, tmp_path, {"size": size}), options) for size in ("1GB", "100GB")]
    assert plans[0].bytes_out == plans[1].bytes_out < plans[0].bytes_in


def test_engines_are_asked_about_what_may_be_chosen(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, options = tiny_model("llama", dtype="bfloat16"), RunOptions(output=tmp_path / "out", evaluate=False)
    asked = recipe(folder, tmp_path, {"bits_per_weight": 5.0, "choices": ["w2a16", "w8a16"]})
    plan = compress.plan(asked, options)
    ways = plan.possible_schemes()
    assert [{scheme.bits for scheme in way.values()} for way in ways] == [{2}, {8}, {2, 8}]
    shapes = {layer.name: layer.shape for layer in plan.layers}
    found = {verdict.engine: verdict for verdict in unsettled([preflight(way, shapes) for way in ways])}
    alone = {verdict.engine: verdict.ok for verdict in preflight(ways[1], shapes)}
    assert (alone["transformers"], found["transformers"].ok) == ("yes", "with-conditions")
    assert found["transformers"].sentence.startswith("it depends on what is chosen; at worst, transformers")
    assert "layers differ in bits" in found["transformers"].sentence
    assert found["llama.cpp"].ok == "no" and "depends" not in found["llama.cpp"].sentence
    settled = compress.plan(recipe(folder, tmp_path, {"bits_per_weight": 9.0, "choices": ["w8a16"]}), options)
    assert [{scheme.bits for scheme in way.values()} for way in settled.possible_schemes()] == [{8}, {8}]


def test_what_cannot_be_is_refused_before_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", dtype="bfloat16")
    for stage, said in (
        ({"bits_per_weight": 2.9}, "cannot be kept: the smallest choice takes"),
        ({"bits_per_weight": 4.0, "size": "1MB"}, "two budgets"),
        ({"size": "1kB"}, "1,000 bytes with .* cannot be kept: the smallest choice takes"),
        ({"choices": ["w4a16", "w8a8"]}, "w8a8"),
        ({"scheme": "w4a8"}, "w4a8 rounds inputs"),
        ({"vocabulary": True, "head": "w8a16"}, "leave out"),
    ):
        with pytest.raises((UsageError, InputError), match=said):
            compress.plan(recipe(folder, tmp_path, stage), RunOptions(output=tmp_path / "out", evaluate=False))
    with pytest.raises(InputError, match="awq does not hold w2a16"):
        asked = recipe(folder, tmp_path, {"scheme": "w4a16"}, export="awq")
        compress.plan(asked, RunOptions(output=tmp_path / "out", evaluate=False))


def test_a_resumed_run_does_not_measure_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop_after_the_choice(event: Event) -> None:
        if isinstance(event, Notice) and "chose" in event.message:
            stop_after_the_choice.seen = True  # type: ignore[attr-defined]
        elif getattr(stop_after_the_choice, "seen", False) and "block" in repr(event):
            raise Stopped

    folder = tiny_model("llama", dtype="bfloat16")
    asked = recipe(folder, tmp_path, {"scheme": "w4a16"})
    with pytest.raises(Stopped):
        run(asked, tmp_path, events=stop_after_the_choice)
    said: list[Event] = []
    artifact = run(asked, tmp_path, events=said.append)
    assert not any(isinstance(event, Notice) and "chose" in event.message for event in said)
    whole = run(asked, tmp_path, "whole")
    for name, info in whole.tensors.items():
        assert torch.equal(whole.tensor(name), artifact.tensor(name)), info


def test_it_is_better_than_one_scheme_for_all(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "compress" / "demo" / "model"
    model = Checkpoint.open(folder).build_model(torch.float32)
    ids = torch.randint(0, 2048, (4, 128), generator=torch.Generator().manual_seed(2))
    before = model(ids).logits.log_softmax(-1)
    found = {}
    for method in ("mixed", "gptq"):
        stage = {"method": method, "scheme": "w3a16", "group_size": 64}
        asked = recipe("demo", tmp_path, stage)
        artifact = run(asked, tmp_path, method)
        after = artifact.build_model(torch.float32)(ids).logits.log_softmax(-1)
        size = sum(info.bytes for info in artifact.tensors.values())
        found[method] = float((before.exp() * (before - after)).sum(-1).mean()), size
    assert found["mixed"][1] <= found["gptq"][1]
    assert found["mixed"][0] < found["gptq"][0]
