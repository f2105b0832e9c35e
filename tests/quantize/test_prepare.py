"""Transforms of `prepare`: the function of every family stays as it was, to the rounding of fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import RecipeError, UsageError
from compress.core.folds import folds_of
from compress.core.methods import find_pass
from compress.core.recipe import parse_recipe
from compress.core.statistics import AbsMax, Hessian, Sample, SquaredMean
from compress.core.walk import Preparation, stream_logits, walk
from quantize._settings import WeightQuantization
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run
from tests.contracts.test_passes import same
from tests.tiny import FAMILIES, LAYERS

ROTATED = [family for family in FAMILIES if not family.startswith("gemma")]
PREPARED = {
    "awq_scale": {"scheme": "w4a16", "group_size": 8, "prepare": ({"awq_scale": {"steps": 4}},)},
    "smoothquant": {"scheme": "w8a8", "prepare": ({"smoothquant": {"steps": 4}},)},
    "smoothquant-0.5": {"scheme": "w8a8", "prepare": ({"smoothquant": {"alpha": 0.5}},)},
    "rotate": {"scheme": "w4a16", "group_size": 8, "prepare": ({"rotate": {}},)},
    "rotate+awq_scale": {"scheme": "w4a16", "group_size": 8, "prepare": ({"rotate": {}}, {"awq_scale": {"steps": 4}})},
}


def tokens_of(checkpoint: Checkpoint, samples: int = 4, length: int = 24) -> Tokens:
    generator = torch.Generator().manual_seed(2)
    return Tokens.of(torch.randint(0, checkpoint.config["vocab_size"], (samples, length), generator=generator))


def settings_of(name: str, method: str = "gptq") -> WeightQuantization:
    return find_pass("quantize", method)(**PREPARED[name])


def logits(checkpoint: Checkpoint, tokens: Tokens) -> Tensor:
    return torch.cat(list(stream_logits(checkpoint, tokens, dtype="float32")))


def stretched(count: int) -> Tensor:
    """Scales over two orders of magnitude."""
    return torch.logspace(-1, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(count))]


# ---------------------------------------------------------------------- folds


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_scales_leave_the_block_as_it_was(tiny_model: TinyModel, family: str, odd: bool) -> None:
    checkpoint = Checkpoint.open(tiny_model(family, odd))
    for block in walk(checkpoint, tokens_of(checkpoint), keep={"inputs"}):
        folds = folds_of(block, checkpoint)
        fed = {group.name for fold in folds for group in fold.groups}
        assert fed == {group.name for group in block.groups}
        x_BTD = block.inputs[0]
        with torch.no_grad():
            before = block.forward(x_BTD)
            for fold in folds:
                weights = [site.weight for group in fold.groups for site in group.sites]
                fold.divide_inputs(stretched(fold.count))
                changed = [site.weight for group in fold.groups for site in group.sites]
                assert not any(torch.allclose(a, b) for a, b in zip(weights, changed, strict=True)), fold.name
            after = block.forward(x_BTD)
        scale = float(before.abs().mean())
        torch.testing.assert_close(after, before, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral"])
def test_statistics_follow_what_is_folded(tiny_model: TinyModel, family: str) -> None:
    """Against those gathered anew from the folded block."""
    checkpoint = Checkpoint.open(tiny_model(family))
    tokens = tokens_of(checkpoint)
    kinds = {Hessian, AbsMax, SquaredMean, Sample}

    def statistics(order: str) -> dict[tuple[str, str], Tensor]:
        def fold_all(block: object) -> None:
            for fold in folds_of(block, checkpoint):  # type: ignore[arg-type]
                for group in fold.groups:
                    assert group.tokens and group.gathered
                fold.divide_inputs(stretched(fold.count))

        preparation = Preparation(frozenset(kinds), fold_all)
        block = next(iter(walk(checkpoint, tokens, collect=kinds, order=order, preparation=preparation)))
        return {(group.name, kind.__name__): group.statistics[kind].clone() for group in block.groups for kind in kinds}

    followed, anew = statistics("block"), statistics("groups")
    assert followed.keys() == anew.keys()
    for name in followed:
        torch.testing.assert_close(followed[name], anew[name], atol=1e-5, rtol=1e-3, msg=str(name))


def test_a_norm_stored_in_bf16_is_divided_by_what_it_can_hold(tiny_model: TinyModel) -> None:
    """The columns take up the rounding of the norm, so that nothing is lost."""
    checkpoint = Checkpoint.open(tiny_model("gemma3_text", dtype="bfloat16"))
    block = next(iter(walk(checkpoint, tokens_of(checkpoint), dtype="float32", keep={"inputs"})))
    with torch.no_grad():
        before = block.forward(block.inputs[0])
        for fold in folds_of(block, checkpoint):
            fold.divide_inputs(stretched(fold.count))
        after = block.forward(block.inputs[0])
    torch.testing.assert_close(after, before, atol=2e-5 * float(before.abs().mean()), rtol=1e-4)
    norm = block.replacements()["model.layers.0.input_layernorm.weight"]
    assert isinstance(norm, Tensor) and norm.dtype is torch.bfloat16


# ---------------------------------------------------------------------- rotation


@pytest.mark.parametrize(("odd", "heads"), [(False, False), (True, True)], ids=["plain", "odd-heads"])
@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_says_the_same(tiny_model: TinyModel, family: str, odd: bool, heads: bool) -> None:
    checkpoint = Checkpoint.open(tiny_model(family, odd))
    tokens = tokens_of(checkpoint)
    settings = find_pass("quantize", "rtn")(group_size=8, prepare=({"rotate": {"heads": heads}},))
    view = settings.view(checkpoint)
    for name in view.tensors:
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert (view.tensor(name) == 1).all()
    for site in view.sites(0):
        before, after = checkpoint.weight(site).float(), view.weight(site)
        assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(logits(view, tokens), logits(checkpoint, tokens), atol=1e-4, rtol=0)
    model = view.build_model(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens.ids).logits, logits(checkpoint, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_families_with_norms_behind_their_layers_are_refused_by_name(tiny_model: TinyModel, family: str) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    with pytest.raises(UsageError, match=f"cannot turn {family} models: post_attention_layernorm and post_feedforward"):
        settings_of("rotate").plan(checkpoint, tokens_of(checkpoint))


def test_tied_embeddings_become_two_tensors_and_the_plan_says_so(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    assert checkpoint.tied
    plan = settings_of("rotate").plan(checkpoint, None)
    plain = find_pass("quantize", "gptq")(group_size=8).plan(checkpoint, None)
    added = checkpoint.info("model.embed_tokens.weight").bytes
    assert plan.bytes_out - plain.bytes_out == added
    assert any("embedding and head are two tensors from here on, which adds" in notice for notice in plan.notices)
    view = settings_of("rotate").view(checkpoint)
    assert not view.tied and view.config["tie_word_embeddings"] is False
    assert checkpoint.config.get("tie_word_embeddings") is not False


# ---------------------------------------------------------------------- with methods


@pytest.mark.parametrize(("name", "method"), [("awq_scale", "gptq"), ("smoothquant", "rtn"), ("rotate", "awq")])
@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_models_say_about_the_same(tiny_model: TinyModel, family: str, name: str, method: str) -> None:
    """Through 8 bits: what is stored, put together again, is the model. Some tokens may take other experts."""
    if name == "rotate" and family not in ROTATED:
        name = "awq_scale" if method != "awq" else "plain"
    folder = tiny_model(family, odd=True)
    checkpoint = Checkpoint.open(folder)
    fields = PREPARED.get(name, {"group_size": 8}) | {"scheme": "w8a8" if name == "smoothquant" else "w8a16"}
    fields |= {"steps": 4} if method == "awq" else {}
    settings = find_pass("quantize", method)(**fields)
    shelf = run(folder, settings, Shelf(), tokens_of(checkpoint))
    view = settings.view(checkpoint)
    tensors = {key: view.tensor(key) for key in view.tensors}
    for block in shelf.blocks:
        for stored, value in block.items():
            key = stored if isinstance(value, Tensor) else f"{stored}.weight"
            tensors[key] = value if isinstance(value, Tensor) else value.dequantize()
    model = view.skeleton.load(tensors, torch.float32, "")
    tokens = tokens_of(checkpoint)
    with torch.no_grad():
        found = model(tokens.ids).logits
    expected = logits(checkpoint, tokens)
    error_BT = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error_BT.median()) < 0.1
    assert len(shelf.quantized) == sum(len(checkpoint.sites(index)) for index in range(LAYERS))


@pytest.mark.parametrize("name", ["awq_scale", "smoothquant", "rotate+awq_scale"])
@pytest.mark.parametrize(("family", "method"), [("llama", "rtn"), ("llama", "gptq"), ("qwen3_moe", "gptq")])
def test_a_prepared_run_is_repeated_and_resumed_to_the_bit(
    tiny_model: TinyModel, family: str, name: str, method: str
) -> None:
    """With a layer left alone that scales fold into, in a model stored in bf16."""
    folder = tiny_model(family, dtype="bfloat16")
    settings = find_pass("quantize", method)(**PREPARED[name], ignore=("*.up_proj", "*.k_proj"))
    whole = run(folder, settings, Shelf())
    again = run(folder, settings, Shelf())
    assert same(whole, again) and _equal_dense(whole, again)
    for done in range(1, LAYERS):
        resumed = run(folder, settings, Shelf(whole, done))
        assert same(whole, resumed) and _equal_dense(whole, resumed)
        assert whole.records == resumed.records
    dense = {key: value for block in whole.blocks for key, value in block.items() if isinstance(value, Tensor)}
    assert all(value.dtype is torch.bfloat16 for value in dense.values())
    assert ("model.layers.0.mlp.up_proj.weight" in dense) == (family == "llama")


def _equal_dense(one: Shelf, other: Shelf) -> bool:
    return all(
        left.keys() == right.keys()
        and all(torch.equal(value, right[name]) for name, value in left.items() if isinstance(value, Tensor))
        for left, right in zip(one.blocks, other.blocks, strict=True)
    )


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("prepare", "scheme", "message"),
    [
        ("[{rotat: {}}]", "w4a16", r"recipe:4:\d+: stages\[0\]\.quantize\.prepare\[0\]\.rotat: unknown key"),
        ("[{awq_scale: {step: 3}}]", "w4a16", r"prepare\[0\]\.awq_scale\.step: unknown key"),
        ("[{rotate: {}, awq_scale: {}}]", "w4a16", r"should be one transform with its settings.*awq_scale, rotate"),
        ("[{rotate: {}}, {rotate: {}}]", "w4a16", "rotate stands there twice"),
        ("[{awq_scale: {}}, {rotate: {}}]", "w4a16", "rotate is applied as weights are read: put it first"),
        ("[{awq_scale: {}}, {smoothquant: {}}]", "w8a8", "awq_scale and smoothquant move the same scales: choose one"),
        ("[{smoothquant: {}}]", "w4a16", "smoothquant moves outliers of activations, which w4a16 does not round"),
        ("[{smoothquant: {alpha: 1.5}}]", "w8a8", "takes an alpha from 0 to 1, not 1.5"),
        ("[{awq_scale: {}}]", "w4a16", "needs calibration data"),
    ],
)
def test_mistakes_are_named_with_their_line(prepare: str, scheme: str, message: str) -> None:
    calibration = "" if "calibration data" in message else "calibration: {dataset: text.txt}"
    text = f"model: demo\n{calibration}\nstages:\n  - quantize: {{method: rtn, scheme: {scheme}, prepare: {prepare}}}\n"
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(text)
    assert str(caught.value).startswith("recipe:4:")


def test_awq_refuses_transforms_that_move_its_own_scales() -> None:
    text = (
        "model: demo\ncalibration: {dataset: t.txt}\nstages:\n  - quantize: {method: awq, prepare: [{awq_scale: {}}]}\n"
    )
    with pytest.raises(RecipeError, match="awq_scale moves the scales that awq itself searches"):
        parse_recipe(text)


def test_a_recipe_with_transforms_is_read_back_as_written() -> None:
    data = {
        "model": "demo",
        "calibration": {"dataset": "t.txt"},
        "stages": [{"quantize": {"method": "gptq", "prepare": [{"rotate": {"seed": 3}}, {"awq_scale": {}}]}}],
    }
    recipe = parse_recipe(data)
    dumped = recipe.model_dump(mode="json")
    assert dumped["stages"][0]["quantize"]["prepare"] == [
        {"rotate": {"seed": 3, "heads": True}},
        {"awq_scale": {"steps": 20}},
    ]
    assert parse_recipe(dumped) == recipe


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rotation_needs_no_calibration(tiny_model: TinyModel, method: str) -> None:
    settings = find_pass("quantize", method)(group_size=8, prepare=({"rotate": {}},))
    assert settings.calibrated == (method == "gptq")
