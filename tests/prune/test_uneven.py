"""Uneven widths: what is shared out, who runs the result, and what levelling it makes of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import open_artifact
from compress.core.checkpoint import Checkpoint
from compress.core.compatibility import preflight
from compress.core.errors import ArtifactError, CompressError, InputError
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.inspect import inspect
from compress.core.recipe import Recipe, parse_recipe
from compress.core.sizes import PER_LAYER_KEY, UNEVEN_NOTICE, sizes_of, width_entries, widths_of
from compress.core.verify import verify
from compress.export_artifact import export_artifact
from compress.level import level
from compress.pipeline import RunOptions, RunResult, plan, run
from prune._uneven import shared_out
from prune.channels import Channels
from runtime.llm import LLM
from tests.conftest import TinyModel
from tests.prune.planted import logits, planted
from tests.runtime._reference import reference_greedy
from tests.tiny import FAMILIES

STORY = "A small boat sailed to the island and a bird sat on its mast all day, looking at %d fishes. "
DENSE = [family for family in FAMILIES if family not in ("mixtral", "qwen3_moe")]
UNEVEN = {"method": "channels", "widths": "uneven", "ratio": 0.5}
CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CONFIG |= {"num_hidden_layers": 3, "vocab_size": 320}


class Stopped(Exception):
    pass


def recipe_of(place: Path, model: Path, *stages: dict[str, Any]) -> Recipe:
    place.mkdir(exist_ok=True)
    (place / "text.txt").write_text("".join(STORY % number for number in range(40)))
    calibration = {"dataset": "text.txt", "samples": 6, "length": 48}
    return parse_recipe({"model": str(model), "calibration": calibration, "stages": list(stages)}, base_folder=place)


def pruned(place: Path, model: Path, *others: dict[str, Any], **settings: Any) -> RunResult:
    return run(recipe_of(place, model, {"prune": UNEVEN | settings}, *others), RunOptions(place / "out"))


def lopsided(source: Path, folder: Path) -> Path:
    """A copy of a dense model whose first block hardly needs half of its channels."""

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.0." in name and name.endswith("down_proj.weight"):
                tensor[:, ::2] *= 1e-3

    return planted(source, folder, plant)


def own_logits(folder: Path) -> torch.Tensor:
    """What the bundled runtime's reference computes for the tokens of planted.logits."""
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return Checkpoint.open(folder).build_model(torch.float32)(ids).logits


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", DENSE)
def test_every_dense_family_is_run_and_levelled(tiny_model: TinyModel, tmp_path: Path, family: str, odd: bool) -> None:
    result = pruned(tmp_path, lopsided(tiny_model(family, odd, "float32"), tmp_path / "model"))
    stored = Checkpoint.open(result.artifact)
    widths = widths_of(stored.config)
    assert widths is not None and len(set(widths)) > 1 and widths[0] == min(widths)
    half = Channels.model_validate({"ratio": 0.5}).count(Checkpoint.open(tmp_path / "model"))
    assert sum(widths) == 3 * half and stored.config["intermediate_size"] == max(widths)
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    assert verify(result.artifact, source=tmp_path / "model").ok
    prompts = [list(range(3, 9)), [40, 41], list(range(60, 81))]
    answers = LLM(result.artifact, numerics="exact").generate(prompts, max_tokens=12, ignore_eos=True)
    done = level(result.artifact, tmp_path / "level")
    report = verify(done.folder, source=tmp_path / "model")
    assert report.ok, report.checks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float((logits(done.folder) - own_logits(result.artifact)).abs().max()) < 1e-5
    assert [list(answer.token_ids) for answer in answers] == reference_greedy(done.folder, prompts, 12)
    levelled = Checkpoint.open(done.folder)
    assert PER_LAYER_KEY not in levelled.config and sizes_of(levelled.config)["ffn"] == max(widths) == done.width
    more = (3 * max(widths) - sum(widths)) * stored.config["hidden_size"] * 3
    biases = 2 * (3 * max(widths) - sum(widths)) if stored.config.get("mlp_bias") else 0
    assert done.parameters - done.parameters_before == more + biases
    with pytest.raises(InputError, match="nothing to level"):
        level(done.folder, tmp_path / "again")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_stay_even(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    with pytest.raises(CompressError, match="mixtures of experts, and these stay equally wide"):
        pruned(tmp_path, tiny_model(family))


@pytest.mark.parametrize("importance", ["osscar", "activation", "fluctuation", "magnitude"])
def test_a_block_that_needs_fewer_channels_keeps_fewer(tiny_model: TinyModel, tmp_path: Path, importance: str) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.1." in name and name.endswith("down_proj.weight"):
                tensor[:, 16:] = 0

    model = planted(tiny_model("qwen2", False, "float32"), tmp_path / "model", plant)
    result = pruned(tmp_path, model, importance=importance, ratio=0.25)
    widths = widths_of(Checkpoint.open(result.artifact).config)
    assert widths is not None and widths[1] == min(widths) < 96 and sum(widths) == 3 * 96


def test_a_stopped_run_ends_in_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = lopsided(tiny_model("llama", False, "bfloat16"), tmp_path / "model")
    whole = pruned(tmp_path / "whole", model).artifact

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and (tmp_path / "cut/out.partial").is_dir():
            shards = list((tmp_path / "cut").rglob("model-00002-of-*.safetensors"))
            if shards:
                raise Stopped

    recipe = recipe_of(tmp_path / "cut", model, {"prune": UNEVEN})
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "cut/out"), stop)
    again = run(recipe, RunOptions(tmp_path / "cut/out")).artifact
    names = [path.name for path in whole.glob("*.safetensors")] + ["config.json"]
    assert {name: sha256_file(whole / name) for name in names} == {name: sha256_file(again / name) for name in names}


def test_a_quantizer_may_follow(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = lopsided(tiny_model("llama", False, "bfloat16"), tmp_path / "model")
    gptq = {"quantize": {"method": "gptq", "scheme": "w4a16", "group_size": 16}}
    with pytest.raises(CompressError, match="sizes that work|do not divide"):
        plan(recipe_of(tmp_path, model, {"prune": UNEVEN}, gptq), RunOptions(tmp_path / "out"))
    result = pruned(tmp_path, model, gptq, multiple=16)
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    report = verify(result.artifact, source=model)
    assert report.ok, report.checks
    prompts = [list(range(3, 9)), [40, 41]]
    answers = LLM(result.artifact, numerics="exact").generate(prompts, max_tokens=8, ignore_eos=True)
    assert [list(answer.token_ids) for answer in answers] == reference_greedy(result.artifact, prompts, 8)
    with pytest.raises(InputError, match="only dense ones are padded"):
        level(result.artifact, tmp_path / "level")
    verdicts = {verdict.engine: verdict.ok for verdict in inspect(result.artifact).engines}
    assert set(verdicts.values()) == {"no", "yes"} and verdicts["compress"] == "yes"


def test_other_structures_may_follow(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = lopsided(tiny_model("qwen3", False, "bfloat16"), tmp_path / "model")
    others = [{"prune": {"method": "depth", "keep": 2}}, {"prune": {"method": "channels", "ratio": 0.25}}]
    result = pruned(tmp_path, model, *others)
    assert verify(result.artifact, source=model).ok
    assert len(widths_of(Checkpoint.open(result.artifact).config) or [0, 0]) == 2


def test_who_opens_it_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = lopsided(tiny_model("llama", False, "float32"), tmp_path / "model")
    planned = plan(recipe_of(tmp_path, model, {"prune": UNEVEN}), RunOptions(tmp_path / "out"))
    assert planned.uneven and UNEVEN_NOTICE in planned.notices
    result = pruned(tmp_path, model)
    card = (result.artifact / "README.md").read_text()
    assert "compress level PATH" in card and "AutoModelForCausalLM" not in card.split("## Recipe")[0]
    assert UNEVEN_NOTICE in inspect(result.artifact).notices
    assert {verdict.ok for verdict in preflight({}, {}, uneven=True) if verdict.engine != "compress"} == {"no"}
    with pytest.raises((ValueError, RuntimeError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(result.artifact)
    with pytest.raises(InputError, match="one width for all layers"):
        export_artifact(result.artifact, tmp_path / "gguf", "gguf")


def test_the_manifest_of_a_levelled_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = pruned(tmp_path, lopsided(tiny_model("llama", False, "float32"), tmp_path / "model"))
    manifest = open_artifact(level(result.artifact, tmp_path / "level").folder).manifest
    assert manifest.lineage["levelled_from"]["config.json"] == sha256_file(result.artifact / "config.json")
    reasons = {item.tensor: item.reason for item in manifest.coverage}
    assert reasons["model.layers.0.mlp.down_proj.weight"] == "after channels, padded with zeros"
    assert reasons["model.embed_tokens.weight"] == ""


def test_widths_are_checked_against_the_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = pruned(tmp_path, lopsided(tiny_model("llama", False, "float32"), tmp_path / "model"))
    config = json.loads((result.artifact / "config.json").read_text())
    config[PER_LAYER_KEY]["0"]["intermediate_size"] += 8
    (result.artifact / "config.json").write_text(json.dumps(config))
    (failed, *_) = [check for check in verify(result.artifact, level="integrity").checks if check.name == "shapes"]
    assert not failed.ok and "model.layers.0.mlp" in failed.detail


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([96, 64, 64], "not a mapping of layer numbers"),
        ({"3": {"intermediate_size": 8}}, "which is no layer of 3"),
        ({"one": {"intermediate_size": 8}}, "which is no layer of 3"),
        ({"1": 8}, "other sizes than intermediate_size"),
        ({"1": {"num_attention_heads": 2}}, "other sizes than intermediate_size"),
        ({"1": {"intermediate_size": 0}}, "intermediate_size is 0, not a positive whole number"),
        ({"1": {"intermediate_size": "8"}}, "intermediate_size is '8', not a positive whole number"),
    ],
)
def test_sizes_of_single_layers_that_make_no_sense(entry: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        sizes_of(CONFIG | {PER_LAYER_KEY: entry})
    assert caught.value.where == "config.json"


def test_the_entry_says_what_differs() -> None:
    assert width_entries([8, 8]) == {"intermediate_size": 8}
    entries = width_entries([8, 16, 24])
    assert entries["intermediate_size"] == 24 and set(entries[PER_LAYER_KEY]) == {"0", "1"}
    assert widths_of(CONFIG | entries) == [8, 16, 24]
    assert [sizes_of(CONFIG | entries, block)["ffn"] for block in range(3)] == [8, 16, 24]
    assert set(width_entries([8, *[16] * 10])[PER_LAYER_KEY]) == {"00"}
    assert widths_of(CONFIG) is None and widths_of(CONFIG | {PER_LAYER_KEY: {}}) is None
    mixture = CONFIG | entries | {"model_type": "mixtral"}
    with pytest.raises(InputError, match="mixture of experts"):
        widths_of(mixture)


def test_channels_are_shared_out_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    for multiple, total in ((8, 64), (8, 200), (8, 8 * 3), (16, 16 * 21), (1, 101)):
        scores = [torch.rand(size, generator=generator) ** power for size, power in ((128, 1), (100, 9), (120, 2))]
        found = shared_out(scores, total, multiple)
        assert sum(found) == total and all(width % multiple == 0 and width >= multiple for width in found)
        assert all(width <= len(score) for width, score in zip(found, scores, strict=True))
    low, high = torch.zeros(64), torch.ones(64)
    assert shared_out([low, high], 64, 8) == [8, 56]
    assert shared_out([low, high], 72, 8) == [8, 64]


def test_an_unreadable_artifact_is_not_levelled(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to level"):
        level(tiny_model("llama"), tmp_path / "level")
    result = pruned(tmp_path, lopsided(tiny_model("llama", False, "float32"), tmp_path / "model"))
    shard = result.artifact / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises((InputError, ArtifactError)):
        level(result.artifact, tmp_path / "level")
    assert not (tmp_path / "level").exists()
