"""Recovery: pairs that end merged, codes that stay codes, adapters beside them; stopped runs go on to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, RecipeError, UsageError
from compress.core.files import sha256_file
from compress.core.passes import Job
from compress.core.recipe import Recipe, parse_recipe
from compress.core.replaced import ReplacedCheckpoint
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from distill._codes import CodedLayers
from distill._compensation import best_pair
from distill._low_rank import Pairs
from distill.logits import Logits
from distill.recover import Recover
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf
from tests.distill.test_logits import CUT, Losses, Stopped, recipe_of

HALF = {"prune": {"method": "wanda", "sparsity": 0.5}}
W3 = {"quantize": {"method": "rtn", "scheme": "w3a16", "group_size": 16}}
Q_PROJ = "model.layers.1.self_attn.q_proj"


def recovery(steps: int = 6, **settings: Any) -> dict[str, Any]:
    asked = {"method": "recover", "tokens": steps * 4 * 32, "batch": 4, "rank": 4, "learning_rate": 0.01}
    return {"distill": {**asked, "save_every": 3, **settings}}


def run_stages(place: Path, recipe: Recipe, heard: Losses | None = None) -> list[Path]:
    """What each stage left, and last the artifact."""
    run(recipe, RunOptions(place / "out", keep_stages=True), heard or Losses())
    return [*sorted((place / "out.stages").iterdir()), place / "out"]


def layers_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    names = [name for index in range(checkpoint.num_blocks) for name in checkpoint.sites(index)]
    return {name: checkpoint.weight(name, torch.float32) for name in names}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pairs_recover_a_pruned_model_and_leave_the_rest(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    model, heard = tiny_model(family, False, "bfloat16"), Losses()
    recipe = recipe_of(tmp_path, model, CUT, recovery(10, layers=["*.layers.1.*"], lora_alpha=8.0))
    before, after, artifact = map(Checkpoint.open, run_stages(tmp_path, recipe, heard))
    assert heard.values[-1] < 0.9 * heard.values[0]
    trained = {f"{name}.weight" for name in before.sites(1)}
    assert len(trained) >= 4
    changed = {name for name in before.tensors if not torch.equal(before.tensor(name), after.tensor(name))}
    assert changed == trained
    name = f"{before.sites(1)[0]}.weight"
    assert torch.equal(artifact.tensor(name), after.tensor(name).bfloat16())
    assert verify(artifact.folder).ok


def test_a_masked_model_is_trained_as_it_will_be_and_keeps_its_zeros(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, heard = tiny_model("llama", False, "bfloat16"), Losses()
    recipe = recipe_of(tmp_path, model, HALF, recovery(12), W3)
    pruned, after, codes, _ = map(layers_of, run_stages(tmp_path, recipe, heard))
    assert heard.values[-1] < 0.9 * heard.values[0]
    for name, weight in pruned.items():
        assert float((weight == 0).double().mean()) == 0.5, name
        assert torch.equal(after[name] == 0, weight == 0), name
        assert not torch.equal(after[name], weight), name
        assert bool((codes[name][weight == 0] == 0).all()), name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_forward_in_training_is_that_of_the_merged_model(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    source = run(recipe_of(tmp_path, tiny_model(family), HALF), RunOptions(tmp_path / "half")).artifact
    checkpoint = Checkpoint.open(source)
    pairs = Pairs(Recover.model_validate({"rank": 4, "lora_alpha": 12.0}), checkpoint)
    model = checkpoint.build_model(torch.float32)
    names = pairs.attach(model)
    generator = torch.Generator().manual_seed(1)
    for value in names.values():
        nn.init.normal_(value, std=0.1, generator=generator)
    merged = pairs.merged()
    weight, a, b = checkpoint.weight(Q_PROJ).float(), names[f"{Q_PROJ}.lora_A"], names[f"{Q_PROJ}.lora_B"]
    assert torch.allclose(merged[f"{Q_PROJ}.weight"], weight + (weight != 0) * 3.0 * (b @ a), atol=1e-6)
    ids = torch.randint(0, 256, (2, 24), generator=generator)
    with torch.no_grad():
        ours = model(ids).logits
        theirs = ReplacedCheckpoint(checkpoint, merged).build_model(torch.float32)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, checkpoint.build_model(torch.float32)(ids).logits, atol=1e-1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_codes_stay_codes_and_lose_less(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    heard, model = Losses(), tiny_model(family, False, "bfloat16")
    some = {"layers": ["*.layers.0.*", "*.layers.2.*"], "rest": "none"}
    recipe = recipe_of(tmp_path, model, W3, recovery(30, code_rate=0.05, **some))
    planned = plan(recipe, RunOptions(tmp_path / "out"))
    before, _, after = map(Checkpoint.open, run_stages(tmp_path, recipe, heard))
    assert heard.values[-1] < 0.7 * heard.values[0]
    assert verify(after.folder, source=model, level="integrity").ok
    assert after.schemes == before.schemes
    assert after.config["quantization_config"] == before.config["quantization_config"]
    assert planned.bytes_out == sum(info.bytes for info in after.tensors.values())
    for index in range(3):
        for name in after.sites(index):
            same = [torch.equal(after.tensor(part), before.tensor(part)) for part in after.stored_names(name)]
            assert all(same) == (index == 1), name
    for name in before.rest_tensors():
        assert torch.equal(after.tensor(name), before.tensor(name))


@pytest.mark.parametrize(
    ("rest", "family", "ends"),
    [
        ("norms", "llama", []),
        ("all", "llama", ["model.embed_tokens"]),
        ("all", "phi3", ["model.embed_tokens", "lm_head"]),
    ],
)
def test_what_is_not_quantized_is_trained_beside_codes(
    tiny_model: TinyModel, tmp_path: Path, rest: str, family: str, ends: list[str]
) -> None:
    heard, model = Losses(), tiny_model(family, False, "bfloat16")
    some = {"layers": ["*.layers.0.*.o_proj"], "scale_rate": 0.0, "code_rate": 1e-6}
    recipe = recipe_of(tmp_path, model, W3, recovery(12, rest=rest, rest_rate=0.02, **some))
    planned = plan(recipe, RunOptions(tmp_path / "out"))
    before, trained, after = map(Checkpoint.open, run_stages(tmp_path, recipe, heard))
    assert heard.values[-1] < 0.9 * heard.values[0]
    assert verify(after.folder, source=model).ok
    assert planned.bytes_out == sum(info.bytes for info in after.tensors.values())
    packed = {part for module in before.schemes for part in before.stored_names(module)}
    changed = {name for name in before.tensors if not torch.equal(after.tensor(name), before.tensor(name))}
    norms = {name for name in before.tensors if name.endswith("norm.weight")}
    assert changed == norms | {f"{end}.weight" for end in ends}
    assert not changed & packed
    for name in changed:
        size = before.tensor(name).float().square().mean().sqrt()
        moved = trained.tensor(name).float() - before.tensor(name).float()
        assert 0 < float(moved.abs().max() / size) < 12 * 0.02, name
        assert torch.equal(after.tensor(name), trained.tensor(name).bfloat16())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_what_is_stored_is_what_the_last_forward_saw(tiny_model: TinyModel, tmp_path: Path, symmetric: bool) -> None:
    stage = {"quantize": W3["quantize"] | {"symmetric": symmetric}}
    folder = run(
        recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), stage), RunOptions(tmp_path / "q")
    ).artifact
    checkpoint = Checkpoint.open(folder)
    original = Checkpoint.open(tiny_model("llama", False, "bfloat16"))
    coded = CodedLayers(Recover.model_validate({}), Job(checkpoint, None, Shelf(), original))
    model = checkpoint.build_model(torch.float32).requires_grad_(False)
    trained = coded.attach(model)
    layer = model.get_submodule(Q_PROJ)
    assert torch.equal(layer.weight, checkpoint.weight(Q_PROJ, torch.float32))
    place, stretch = (
        next(v for n, v in trained.items() if Q_PROJ in n and n.endswith(end)) for end in ("place", "stretch")
    )
    with torch.no_grad():
        place.add_(torch.randn(place.shape, generator=torch.Generator().manual_seed(0)) * 1.5)
        stretch.add_(0.03)
    weight = layer.weight
    assert torch.equal(coded.packed()[Q_PROJ].dequantize(), weight)
    up = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (weight * up).sum().backward()
    packed = checkpoint.quant_tensor(Q_PROJ)
    assert packed is not None and place.grad is not None and stretch.grad is not None
    zero = torch.zeros_like(packed.scale) if packed.zero is None else packed.zero
    scale = (packed.scale.float() * 1.03).bfloat16().float()[..., None]
    level = place.detach().view(64, 4, 16).round().clamp(-4, 3) - zero.float()[..., None]
    wanted = up.view(64, 4, 16) * scale
    outside = ((place > 3) & (wanted.view(64, 64) < 0)) | ((place < -4) & (wanted.view(64, 64) > 0))
    assert bool(outside.any())
    assert torch.allclose(place.grad, torch.where(outside, 0.0, wanted.view(64, 64)))
    slope = (up.view(64, 4, 16) * level).sum(-1, keepdim=True) * packed.scale.float()[..., None]
    assert torch.allclose(stretch.grad, slope, atol=1e-6)


def test_zeros_of_a_quantized_masked_model_stay(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", False, "bfloat16")
    recipe = recipe_of(tmp_path, model, HALF, W3, recovery(6, code_rate=0.5))
    pruned, before, codes, _ = map(layers_of, run_stages(tmp_path, recipe))
    assert not torch.equal(before[Q_PROJ], codes[Q_PROJ])
    for name, weight in pruned.items():
        assert bool((codes[name][weight == 0] == 0).all()), name


def test_an_adapter_makes_up_for_rounding(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", False, "float32")
    recipe = recipe_of(
        tmp_path, model, W3, recovery(keep="adapter", tokens=0, layers=["*_proj"], rank=8, lora_alpha=16.0)
    )
    before, _, artifact = run_stages(tmp_path, recipe)
    assert verify(artifact).ok
    packed = sorted(path.name for path in before.glob("*.safetensors"))
    assert [sha256_file(artifact / name) for name in packed] == [sha256_file(before / name) for name in packed]
    config = json.loads((artifact / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16.0)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    tensors = load_file(artifact / "adapter" / "adapter_model.safetensors")
    quantized, dense = Checkpoint.open(artifact), Checkpoint.open(model)
    values = {}
    for name in layers_of(model):
        pair = [tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "AB"]
        values[f"{name}.weight"] = quantized.weight(name, torch.float32) + config["lora_alpha"] / config["r"] * (
            pair[1] @ pair[0]
        )
    assert not tensors
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = dense.build_model(torch.float32)(ids).logits
        left = [
            source.build_model(torch.float32)(ids).logits for source in (quantized, ReplacedCheckpoint(dense, values))
        ]
    errors = [float((logits - right).square().mean()) for logits in left]
    assert errors[1] < 0.8 * errors[0]


def test_the_best_pair_leaves_the_smallest_singular_values() -> None:
    """Eckart and Young, 1936: what is left of E L is what the cut singular values are."""
    generator = torch.Generator().manual_seed(0)
    error, inputs = torch.randn(12, 20, generator=generator), torch.randn(200, 20, generator=generator)
    inputs[:, :5] *= 10
    lower = torch.linalg.cholesky(inputs.T @ inputs)
    a, b = best_pair(error, lower, 4, 2.0)
    left = (inputs @ (error - 2.0 * b @ a).T).square().sum()
    values = torch.linalg.svdvals(inputs @ error.T)
    assert float(left) == pytest.approx(float(values[4:].square().sum()), rel=1e-3)


KINDS = {
    "pairs": [CUT, recovery(9)],
    "codes": [W3, recovery(9)],
    "adapter": [W3, recovery(9, keep="adapter")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_with_the_same_losses_and_bytes(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), *KINDS[kind])
    whole, first, second = Losses(), Losses(5), Losses()
    result = run(recipe, RunOptions(tmp_path / "whole"), whole)
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "stopped"), first)
    again = run(recipe, RunOptions(tmp_path / "stopped"), second)
    assert len(set(whole.values)) == 9
    assert second.values == whole.values[3:]
    same = [
        {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
        for folder in (result.artifact, again.artifact)
    ]
    assert same[0] == same[1]


def test_the_optimizer_remembers_pairs_alone(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = Tokens.of(torch.zeros(4, 32, dtype=torch.int64))
    peaks = [Recover.model_validate({"rank": rank}).plan(checkpoint, tokens).peak_memory_bytes for rank in (4, 8)]
    sites = [name for index in range(checkpoint.num_blocks) for name in checkpoint.sites(index)]
    assert peaks[1] - peaks[0] == 16 * 4 * sum(sum(checkpoint.matrix_shape(name)) for name in sites)
    full = Logits.model_validate({}).plan(checkpoint, tokens).peak_memory_bytes
    numbers = sum(value.numel() for value in checkpoint.build_model(torch.float32).parameters())
    one = Recover.model_validate({"rank": 1}).plan(checkpoint, tokens)
    assert full - one.peak_memory_bytes > 6 * numbers
    assert one.peak_memory_bytes > dict(one.leaner)["rows_at_once: 1"]


def test_orders_and_settings_that_cannot_work_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    lessons = {"distill": {"method": "logits"}}
    with pytest.raises(RecipeError, match=r"logits takes dense or masked weights, but those that stages\[0\] leaves"):
        recipe_of(tmp_path, model, W3, lessons)
    with pytest.raises(RecipeError, match="recover takes quantized weights with keep: adapter, but the model's are"):
        recipe_of(tmp_path, model, recovery(keep="adapter"))
    wrong = [
        ([{"quantize": {"method": "fp8"}}, recovery()], "codes of fp8 are not trained"),
        ([W3, recovery(layers=["*.nothing"])], "no layer is trained"),
        ([W3, recovery(tokens=0)], "no token is trained on"),
        ([{"quantize": W3["quantize"] | {"prepare": [{"awq_scale": {}}]}}, recovery(keep="adapter")], "awq_scale"),
    ]
    for stages, message in wrong:
        with pytest.raises(UsageError, match=message):
            plan(recipe_of(tmp_path, model, *stages), RunOptions(tmp_path / "out"))
    quantized = run(recipe_of(tmp_path, model, W3), RunOptions(tmp_path / "w3")).artifact
    with pytest.raises(InputError, match="is quantized itself"):
        run(recipe_of(tmp_path, quantized, recovery()), RunOptions(tmp_path / "out"))


def test_an_artifact_of_another_format_is_recovered(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, heard = tiny_model("llama", False, "bfloat16"), Losses()
    recipe = recipe_of(tmp_path, model, W3).model_dump(mode="json") | {"export": {"format": "gptq"}}
    first = run(parse_recipe(recipe, base_folder=tmp_path), RunOptions(tmp_path / "gptq")).artifact
    second = run(
        recipe_of(tmp_path, first, recovery(6, teacher=str(model), layers=["*.q_proj"], code_rate=0.02)),
        RunOptions(tmp_path / "out"),
        heard,
    ).artifact
    assert heard.values[0] > 0 and len(heard.values) == 6
    before, after = layers_of(first), layers_of(second)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("q_proj")
    }
    assert verify(second).ok
