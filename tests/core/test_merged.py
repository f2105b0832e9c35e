"""An adapter that is given with the source: merged as the formula says, streamed, resumed, and refused where it does
not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.checkpoint import Checkpoint
from compress.core.errors import CompressError, InputError, UsageError
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.recipe import Recipe, load_recipe, parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from tests.conftest import TinyModel

RANK = 4
LAYERS = ("self_attn.q_proj", "mlp.down_proj")


class Stopped(Exception):
    pass


def make_adapter(place: Path, model: Path, layers: tuple[str, ...] = LAYERS, **settings: Any) -> Path:
    """A PEFT folder with random pairs for these layers of every block."""
    place.mkdir()
    generator = torch.Generator().manual_seed(7)
    checkpoint, tensors = Checkpoint.open(model), {}
    for index in range(checkpoint.num_blocks):
        for layer in layers:
            name = f"model.layers.{index}.{layer}"
            rows, width = checkpoint.matrix_shape(name)
            for part, shape in (("A", (RANK, width)), ("B", (rows, RANK))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator) / 8
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "init_lora_weights": True}
    config |= {"base_model_name_or_path": model.name, "modules_to_save": None, "use_dora": False}
    (place / "adapter_config.json").write_text(json.dumps(config | settings))
    return place


def recipe_of(model: Path, adapter: Path | None, **stage: Any) -> Recipe:
    settings = {"method": "magnitude", "sparsity": 0.5} | stage
    return parse_recipe(
        {"model": str(model), "stages": [{"prune": settings}]} | ({"adapter": str(adapter)} if adapter else {})
    )


def nothing_but_merged(model: Path, adapter: Path) -> Recipe:
    """A stage that leaves all weights alone."""
    return recipe_of(model, adapter, sparsity=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, lambda name: 6 / RANK),
        ({"use_rslora": True}, lambda name: 6 / RANK**0.5),
        ({"alpha_pattern": {"1.mlp.down_proj": 2}}, lambda name: (2 if "1.mlp.down" in name else 6) / RANK),
    ],
    ids=["plain", "rslora", "alphas"],
)
def test_weights_are_those_of_the_formula(
    tiny_model: TinyModel, tmp_path: Path, settings: dict[str, Any], scale: Any, dtype: str
) -> None:
    model = tiny_model("llama", False, dtype)
    adapter = make_adapter(tmp_path / "adapter", model, **settings)
    artifact = run(nothing_but_merged(model, adapter), RunOptions(tmp_path / "out")).artifact
    pairs, found = load_file(adapter / "adapter_model.safetensors"), Checkpoint.open(artifact)
    changed = 0
    for name, before in load_file(model / "model.safetensors").items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_%s.weight"
        wanted = before
        if key % "A" in pairs:
            update = scale(name) * (pairs[key % "B"].double() @ pairs[key % "A"].double())
            wanted = (before.double() + update).to(before.dtype)
            changed += 1
        bound = {"atol": 1e-6, "rtol": 0.0} if dtype == "float32" else {"atol": 0.0, "rtol": 2**-7}
        assert torch.allclose(found.tensor(name).double(), wanted.double(), **bound), name
    assert changed == 2 * found.num_blocks
    manifest = json.loads((artifact / "compress.json").read_text())
    written = {name: sha256_file(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert manifest["lineage"]["adapter"] == {"source": "adapter", "revision": None, "sha256": written}
    assert manifest["lineage"]["sha256"]["model.safetensors"] == sha256_file(model / "model.safetensors")
    assert not (artifact / "adapter_config.json").exists()
    assert load_recipe(artifact / "recipe.yaml").adapter == str(adapter)
    assert verify(artifact, source=model).ok
    assert not (tmp_path / "out.partial").exists()


def test_a_stopped_merge_goes_on_and_ends_with_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    recipe = recipe_of(model, make_adapter(tmp_path / "adapter", model))
    whole = run(recipe, RunOptions(tmp_path / "whole")).artifact
    heard: list[int] = []

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "merge":
            heard.append(event.done)
            if event.done == 2 and len(heard) == 2:
                raise Stopped

    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "out"), stop)
    merged = tmp_path / "out.partial" / "merged"
    ready = {path: path.stat().st_mtime_ns for path in merged.glob("*.safetensors")}
    assert len(ready) == 2

    def look(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "merge":
            assert {path: path.stat().st_mtime_ns for path in ready} == ready  # not written again

    again = run(recipe, RunOptions(tmp_path / "out"), look).artifact
    same = [{p.name: sha256_file(p) for p in folder.iterdir()} for folder in (whole, again)]
    assert same[0] == same[1]


def test_another_adapter_does_not_go_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    adapter = make_adapter(tmp_path / "adapter", model)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "merge":
            raise Stopped

    with pytest.raises(Stopped):
        run(recipe_of(model, adapter), RunOptions(tmp_path / "out"), stop)
    shutil.rmtree(adapter)
    make_adapter(adapter, model, lora_alpha=7)
    with pytest.raises(UsageError, match=r"cannot be resumed: source.sha256.adapter: adapter_config.json"):
        run(recipe_of(model, adapter), RunOptions(tmp_path / "out"))


def test_what_comes_later_sees_the_merged_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A student of `teacher: original` that nothing has changed yet has nothing to learn."""
    model = tiny_model()
    adapter = make_adapter(tmp_path / "adapter", model)
    (tmp_path / "text.txt").write_text("A small boat sailed to the island. " * 40)
    lesson = {"method": "logits", "tokens": 128, "batch": 4, "rows_at_once": 4}
    text = {"dataset": "text.txt", "samples": 4, "length": 32}
    data = {"model": str(model), "adapter": str(adapter), "calibration": text, "stages": [{"distill": lesson}]}
    result = run(parse_recipe(data, base_folder=tmp_path), RunOptions(tmp_path / "out"))
    assert result.summary["stages"][0]["losses"] == [pytest.approx(0.0, abs=1e-6)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "of the type IA3"),
        ({"use_dora": True}, "with use_dora"),
        ({"fan_in_fan_out": True}, "with fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save"),
        ({"bias": "all"}, "with bias: all"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ],
)
def test_other_kinds_are_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    model = tiny_model()
    adapter = make_adapter(tmp_path / "adapter", model, **settings)
    with pytest.raises(InputError, match=said):
        plan(recipe_of(model, adapter), RunOptions(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_what_does_not_fit_is_refused_in_a_sentence(tiny_model: TinyModel, tmp_path: Path) -> None:
    def refusal(adapter: Path, model: Path) -> str:
        with pytest.raises(CompressError) as refused:
            plan(recipe_of(model, adapter), RunOptions(tmp_path / "out"))
        return refused.value.message

    model = tiny_model()
    adapter = make_adapter(tmp_path / "adapter", model)
    assert "has no such layer; it was made for llama-plain-float32" in refusal(adapter, tiny_model("phi3"))
    assert "times [4, 128], and the model's weight [112, 160]" in refusal(adapter, tiny_model("qwen2", odd=True))
    assert "not an adapter" in refusal(model, model)
    head = make_adapter(tmp_path / "head", model, ("self_attn.v_proj",))
    tensors = load_file(head / "adapter_model.safetensors")
    tied = {name.replace("model.layers.0.self_attn.v_proj", "lm_head"): value for name, value in tensors.items()}
    save_file(tied, head / "adapter_model.safetensors")
    assert "whose head is its embedding" in refusal(head, model)
    half = {name: value for name, value in tensors.items() if "lora_A" in name}
    save_file(half, head / "adapter_model.safetensors")
    assert "one matrix of its pair and not the other" in refusal(head, model)
    save_file({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, head / "adapter_model.safetensors")
    assert "lm_head.weight is no matrix of a LoRA pair" in refusal(head, model)
    (head / "adapter_model.safetensors").unlink()
    (head / "adapter_model.bin").touch()
    assert "pickled" in refusal(head, model)


def test_an_adapter_in_place_of_a_model_or_in_its_folder_is_asked_about(tiny_model: TinyModel, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model())
    with pytest.raises(InputError, match="an adapter and no model") as refused:
        plan(recipe_of(adapter, None), RunOptions(tmp_path / "out"))
    assert refused.value.hint == "model: llama-plain-float32, and adapter: with this folder"
    both = tmp_path / "both"
    shutil.copytree(tiny_model(), both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, both)
    with pytest.raises(InputError, match="an adapter lies in the model's folder"):
        plan(recipe_of(both, None), RunOptions(tmp_path / "out"))
    planned = plan(recipe_of(both, both), RunOptions(tmp_path / "out"))
    assert planned.notices[0] == (
        "the adapter says that it was made for llama-plain-float32, and it is merged into both"
    )
    assert planned.disk_bytes - plan(recipe_of(tiny_model(), None), RunOptions(tmp_path / "out")).disk_bytes == (
        planned.bytes_in
    )


def test_the_command_line_names_it_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: elsewhere/model\nstages:\n  - quantize: {method: rtn, scheme: w8a16}\n")
    adapter = make_adapter(tmp_path / "adapter", tiny_model())
    recipe = load_recipe(file, model=str(tiny_model()), adapter=str(adapter))
    assert recipe.adapter == "adapter" and recipe.located().adapter == str(adapter)
    assert json.loads(parse_recipe(recipe.model_dump(mode="json")).model_dump_json())["adapter"] == "adapter"


def test_masked_weights_keep_their_zeros(tiny_model: TinyModel, tmp_path: Path) -> None:
    pruned = run(recipe_of(tiny_model(), None), RunOptions(tmp_path / "pruned")).artifact
    with pytest.raises(InputError, match="merged into dense weights, and pruned is masked"):
        plan(recipe_of(pruned, make_adapter(tmp_path / "adapter", tiny_model())), RunOptions(tmp_path / "out"))
