"""What every method that takes structures out must do: inherited for free by each such file of `prune`."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import CompressError, UsageError
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.methods import available_kinds, find_pass
from compress.core.recipe import Recipe, parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, RunResult, run
from prune._structure import StructuredPruning
from runtime.llm import LLM
from tests.conftest import TinyModel
from tests.runtime._reference import reference_greedy
from tests.tiny import FAMILIES

CUTTERS = [name for name in available_kinds()["prune"] if issubclass(find_pass("prune", name), StructuredPruning)]
methods = pytest.mark.parametrize("method", CUTTERS)
STORY = "A small boat sailed to the island and a bird sat on its mast all day, looking at %d fishes. "
HALF: dict[str, dict[str, Any]] = {"heads": {"unit": "queries"}}
MIXTURES = ("mixtral", "qwen3_moe")
"""What a method is asked beside its target, so that it works on every tiny model."""


class Stopped(Exception):
    pass


def half(method: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings that leave about half."""
    asked = HALF.get(method, {})
    if method == "vocabulary":
        return {"keep": 264}  # every byte stays
    settings = settings_of(method, ratio=0.5, **asked)
    total, step = settings.total(checkpoint), settings.step(checkpoint)
    counts = [count for count in range(step, total, step) if count >= total / 2]
    if method == "heads" and checkpoint.architecture.heads_divide:
        counts = [count for count in counts if checkpoint.config["hidden_size"] % count == 0] or [step]
    return {**asked, "keep": counts[0]}


def settings_of(method: str, **asked: Any) -> StructuredPruning:
    found = find_pass("prune", method).model_validate_json(json.dumps(asked))
    assert isinstance(found, StructuredPruning)
    return found


def recipe_of(place: Path, model: Path, stages: list[dict[str, Any]]) -> Recipe:
    (place / "text.txt").write_text("".join(STORY % number for number in range(40)))
    calibration = {"dataset": "text.txt", "samples": 6, "length": 48}
    return parse_recipe({"model": str(model), "calibration": calibration, "stages": stages}, base_folder=place)


def require_plain(result: RunResult) -> None:
    """An ordinary dense folder: verified, opened by transformers without a word, run by the runtime to the same end."""
    from transformers import AutoModelForCausalLM

    folder = result.artifact
    report = verify(folder)
    assert report.ok, report.checks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    stored = Checkpoint.open(folder)
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(i.shape) for i in stored.tensors.values())
    prompts = [list(range(3, 9)), [40, 41], list(range(60, 81))]
    engine = LLM(folder, numerics="exact")
    answers = engine.generate(prompts, max_tokens=12, ignore_eos=True)
    assert [list(answer.token_ids) for answer in answers] == reference_greedy(folder, prompts, 12)


@methods
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_a_plain_smaller_model(
    tiny_model: TinyModel, tmp_path: Path, method: str, family: str, odd: bool
) -> None:
    folder = tiny_model(family, odd, "bfloat16")
    if method == "experts" and family not in MIXTURES:
        with pytest.raises(CompressError, match="no experts"):
            settings_of(method, ratio=0.5).plan(Checkpoint.open(folder), None)
        return
    source = Checkpoint.open(folder)
    stage = {"prune": {"method": method, **half(method, source)}}
    result = run(recipe_of(tmp_path, folder, [stage]), RunOptions(tmp_path / "out"))
    require_plain(result)
    planned_bytes, bytes_out = result.summary["plan"]["bytes"], result.summary["measured"]["bytes"]
    if method == "depth" and family == "qwen3_moe":  # whether dense blocks or mixtures go is found out
        assert planned_bytes >= bytes_out
        return
    assert planned_bytes == bytes_out
    smaller = Checkpoint.open(result.artifact)
    planned = settings_of(method, **half(method, source)).after(source)
    assert {name: info.shape for name, info in smaller.tensors.items()} == {
        name: info.shape for name, info in planned.tensors.items()
    }
    assert smaller.config == planned.config
    assert result.summary["measured"]["bytes"] < sum(info.bytes for info in source.tensors.values())
    assert {info.dtype for info in smaller.tensors.values()} == {info.dtype for info in source.tensors.values()}


@methods
def test_keeping_all_changes_no_bit(tiny_model: TinyModel, tmp_path: Path, method: str) -> None:
    folder = tiny_model("qwen3_moe", False, "bfloat16")
    source = Checkpoint.open(folder)
    keep = settings_of(method).total(source)
    stage = {"prune": {"method": method, **HALF.get(method, {}), "keep": keep if method != "heads" else 4}}
    result = run(recipe_of(tmp_path, folder, [stage]), RunOptions(tmp_path / "out"))
    same = Checkpoint.open(result.artifact)
    assert same.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(same.tensor(name), source.tensor(name)) for name in source.tensors)


@methods
def test_a_stopped_run_ends_with_the_same_bytes(tiny_model: TinyModel, tmp_path: Path, method: str) -> None:
    folder = tiny_model("qwen3_moe", False, "bfloat16")
    stage = {"prune": {"method": method, **half(method, Checkpoint.open(folder))}}
    whole = run(recipe_of(tmp_path, folder, [stage]), RunOptions(tmp_path / "whole"))

    def stop_after_two(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and event.done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(recipe_of(tmp_path, folder, [stage]), RunOptions(tmp_path / "stopped"), stop_after_two)
    again = run(recipe_of(tmp_path, folder, [stage]), RunOptions(tmp_path / "stopped"))
    assert contents(whole.artifact) == contents(again.artifact)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}


@methods
def test_targets(tiny_model: TinyModel, method: str) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen3_moe"))
    extra = HALF.get(method, {})
    total, step = (getattr(settings_of(method, **extra), name)(checkpoint) for name in ("total", "step"))
    everything = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    assert settings_of(method, parameters=everything, **extra).count(checkpoint) == total
    assert settings_of(method, max_size=4 * everything, **extra).count(checkpoint) == total
    fewer = settings_of(method, parameters=everything - 1, **extra)
    assert fewer.count(checkpoint) < total
    sizes = (math.prod(info.shape) for info in fewer.after(checkpoint).tensors.values())
    assert sum(sizes) <= everything - 1
    with pytest.raises(UsageError, match="cannot be reached"):
        settings_of(method, parameters=100, **extra).count(checkpoint)
    with pytest.raises(UsageError, match="would remove all"):
        settings_of(method, ratio=0.9999, **extra).count(checkpoint)
    with pytest.raises(UsageError, match="would remove none"):
        settings_of(method, ratio=0.0001, **extra).count(checkpoint)
    with pytest.raises(UsageError, match="there are only"):
        settings_of(method, keep=total + step, **extra).count(checkpoint)
    with pytest.raises(ValueError, match="two ways"):
        settings_of(method, ratio=0.5, keep=step, **extra)
    if step > 1:
        with pytest.raises(UsageError, match="in steps of"):
            settings_of(method, keep=step + 1, **extra).count(checkpoint)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_methods_follow_each_other_and_a_quantizer_follows_them(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    folder = tiny_model(family, False, "bfloat16")
    source = Checkpoint.open(folder)
    chain = [name for name in CUTTERS if (name != "experts" or family in MIXTURES) and name != "vocabulary"]
    stages: list[dict[str, Any]] = [{"prune": {"method": name, **half(name, source)}} for name in chain]
    stages.append({"quantize": {"method": "gptq", "scheme": "w8a16", "group_size": -1}})
    result = run(recipe_of(tmp_path, folder, stages), RunOptions(tmp_path / "out"))
    planned_bytes, bytes_out = result.summary["plan"]["bytes"], result.summary["measured"]["bytes"]
    assert planned_bytes == bytes_out or (family == "qwen3_moe" and planned_bytes > bytes_out)
    assert verify(result.artifact).ok
    prompt = list(range(3, 20))
    (answer,) = LLM(result.artifact, numerics="exact").generate([prompt], max_tokens=8, ignore_eos=True)
    assert [list(answer.token_ids)] == reference_greedy(result.artifact, [prompt], 8)
