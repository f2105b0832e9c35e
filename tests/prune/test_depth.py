"""Depth: which blocks go, what config.json says then, and that the rest computes as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress.core.checkpoint import Checkpoint
from compress.core.errors import RecipeError, UsageError
from compress.core.model_files import MASKED_KEY
from compress.core.recipe import parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, RunResult, run
from runtime.llm import LLM
from tests.conftest import TinyModel
from tests.runtime._reference import reference_greedy

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "
PROMPTS = [list(range(3, 23)), [70, 40, 101]]


def prune(place: Path, *stages: dict[str, Any]) -> RunResult:
    (place / "text.txt").write_text(STORY * 4)
    calibration = {"dataset": "text.txt", "samples": 4, "length": 16}
    data = {"model": "model", "calibration": calibration, "stages": list(stages)}
    number = len(list(place.glob("out*")))
    return run(parse_recipe(data, base_folder=place), RunOptions(place / f"out{number}"))


def depth(**settings: Any) -> dict[str, Any]:
    return {"prune": {"method": "depth", **settings}}


def source(place: Path, folder: Path, *silent: int) -> Path:
    """A copy of a model in which some blocks add nothing."""
    shutil.copytree(folder, place / "model")
    if silent:
        path = place / "model" / "model.safetensors"
        tensors = load_file(path)
        for index in silent:
            for module in ("self_attn.o_proj", "mlp.down_proj"):
                tensors[f"model.layers.{index}.{module}.weight"].zero_()
        save_file(tensors, path, metadata={"format": "pt"})
    return place / "model"


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([PROMPTS[0]])).logits


def kept_blocks(result: RunResult, original: Path) -> list[int]:
    """By a norm of each block, which differs between all of them."""
    name = "model.layers.{}.input_layernorm.weight"
    before, after = Checkpoint.open(original), Checkpoint.open(result.artifact)
    norms = [before.tensor(name.format(index)).tolist() for index in range(before.num_blocks)]
    return [norms.index(after.tensor(name.format(index)).tolist()) for index in range(after.num_blocks)]


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_block_that_adds_nothing_goes_and_no_logit_moves(
    contiguous: bool, tmp_path: Path, tiny_model: TinyModel
) -> None:
    model = source(tmp_path, tiny_model("llama"), 1)
    result = prune(tmp_path, depth(keep=2, importance="influence", contiguous=contiguous))
    assert kept_blocks(result, model) == [0, 2]
    assert float((logits(result.artifact) - logits(model)).abs().max()) < 1e-5


def test_perplexity_takes_the_blocks_that_it_misses_least(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = source(tmp_path, tiny_model("llama"))
    result = prune(tmp_path, depth(keep=2, importance="perplexity"))
    tokens = _calibration(tmp_path)
    losses = {}
    for gone in range(3):
        whole = AutoModelForCausalLM.from_pretrained(model)
        del whole.model.layers[gone]
        whole.config.num_hidden_layers = 2
        with torch.inference_mode():
            losses[gone] = float(whole(tokens, labels=tokens, use_cache=False).loss)
    least = min(losses, key=losses.__getitem__)
    assert kept_blocks(result, model) == [index for index in range(3) if index != least]


def _calibration(place: Path) -> torch.Tensor:
    from compress.core.calibration import load_tokens

    recipe = parse_recipe(
        {
            "model": "model",
            "calibration": {"dataset": "text.txt", "samples": 4, "length": 16},
            "stages": [depth(keep=2)],
        },
        base_folder=place,
    )
    assert recipe.calibration is not None
    return load_tokens(recipe.calibration, Checkpoint.open(place / "model"), place).ids


def test_two_silent_neighbours_go_together(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = source(tmp_path, tiny_model("qwen2"), 0, 1)
    result = prune(tmp_path, depth(keep=1))
    assert kept_blocks(result, model) == [2]
    assert float((logits(result.artifact) - logits(model)).abs().max()) < 1e-5


def test_single_blocks_go_one_by_one(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = source(tmp_path, tiny_model("llama"), 0, 2)
    result = prune(tmp_path, depth(keep=1, contiguous=False, order="one_by_one"))
    assert kept_blocks(result, model) == [1]


def test_removing_nothing_changes_no_bit(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = source(tmp_path, tiny_model("gemma2", dtype="bfloat16"))
    result = prune(tmp_path, depth(keep=3))
    before, after = Checkpoint.open(model), Checkpoint.open(result.artifact)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors)


@pytest.mark.parametrize(("family", "odd"), [("gemma3_text", False), ("gemma2", False), ("qwen2", True)])
def test_windows_stay_with_their_blocks(family: str, odd: bool, tmp_path: Path, tiny_model: TinyModel) -> None:
    """Blocks that are left have another number, and the window that they had."""
    model = source(tmp_path, tiny_model(family, odd))
    config = json.loads((model / "config.json").read_text())
    kinds = AutoModelForCausalLM.from_pretrained(model).config.layer_types
    config |= {"sliding_window_pattern": 2} if family == "gemma3_text" else {}
    config.pop("layer_types") if family == "gemma2" else None
    (model / "config.json").write_text(json.dumps(config))
    result = prune(tmp_path, depth(keep=1 if family == "gemma2" else 2))
    kept = kept_blocks(result, model)
    after = json.loads((result.artifact / "config.json").read_text())
    assert after["layer_types"] == [kinds[index] for index in kept]
    assert after["num_hidden_layers"] == len(kept)
    assert "sliding_window_pattern" not in after and "_sliding_window_pattern" not in after
    if family == "qwen2":
        assert after["max_window_layers"] == [*after["layer_types"], "sliding_attention"].index("sliding_attention")
    found = LLM(result.artifact, numerics="exact").generate(PROMPTS, max_tokens=8, ignore_eos=True)
    assert [list(answer.token_ids) for answer in found] == reference_greedy(result.artifact, PROMPTS, 8)


def test_dense_blocks_of_a_mixture_are_found_under_their_new_numbers(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = source(tmp_path, tiny_model("qwen3_moe", True))
    config = json.loads((model / "config.json").read_text())
    assert config["mlp_only_layers"] == [1]
    result = prune(tmp_path, depth(keep=2))
    after = json.loads((result.artifact / "config.json").read_text())
    kept = kept_blocks(result, model)
    assert after["mlp_only_layers"] == [index for index, block in enumerate(kept) if block == 1]
    _, info = AutoModelForCausalLM.from_pretrained(result.artifact, output_loading_info=True)
    assert not any(info.values())
    report = verify(result.artifact, source=model)
    assert report.ok, report.checks


def test_masked_weights_stay_masked(tmp_path: Path, tiny_model: TinyModel) -> None:
    source(tmp_path, tiny_model("llama"))
    sparse = {"prune": {"method": "magnitude", "pattern": "2:4"}}
    result = prune(tmp_path, sparse, depth(keep=2))
    after = Checkpoint.open(result.artifact)
    assert after.config[MASKED_KEY] is True
    weight = after.tensor("model.layers.1.mlp.up_proj.weight")
    assert bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def test_blocks_of_several_sizes_are_planned_as_the_largest(tmp_path: Path, tiny_model: TinyModel) -> None:
    source(tmp_path, tiny_model("qwen3_moe"))
    result = prune(tmp_path, depth(keep=2, importance="perplexity"))
    assert result.summary["plan"]["bytes"] >= result.summary["measured"]["bytes"]
    assert "blocks differ in size: what stays is at most as large as planned" in result.summary["notices"]


def test_what_cannot_be_asked_for(tmp_path: Path, tiny_model: TinyModel) -> None:
    source(tmp_path, tiny_model("llama"))
    with pytest.raises(UsageError, match="keep 4: there are only 3 blocks"):
        prune(tmp_path, depth(keep=4))
    with pytest.raises(UsageError, match=r"ratio 0.01 of 3 blocks would remove none"):
        prune(tmp_path, depth(ratio=0.01))
    with pytest.raises(RecipeError, match="order one_by_one needs contiguous: false"):
        prune(tmp_path, depth(order="one_by_one"))
