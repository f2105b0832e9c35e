"""`activations: static`: scales from the largest inputs of each layer, by the methods that store them."""

import json
from pathlib import Path

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import RecipeError, UsageError
from compress.core.methods import find_pass
from compress.core.passes import Job
from compress.core.recipe import parse_recipe
from compress.core.tensors import QuantTensor
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for

STATIC = {"scheme": "w8a8", "activations": "static"}


def settings(method: str, **asked: object):
    return find_pass("quantize", method).model_validate_json(json.dumps(asked))


def largest_inputs(folder: Path, tokens: Tokens) -> dict[str, float]:
    """Of every linear layer of the original's first block, by hooks of our own."""
    model = Checkpoint.open(folder).build_model(torch.float32)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.0.") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found.__setitem__(name, float(inputs[0].abs().max()))
            )
    with torch.no_grad():
        model(tokens.ids)
    return found


@pytest.mark.parametrize(
    ("method", "asked", "reach"),
    [
        ("rtn", STATIC, 127.5),
        ("gptq", STATIC | {"order": "block"}, 127.5),
        ("fp8", {"activations": "static"}, 448.0),
    ],
    ids=["rtn", "gptq", "fp8"],
)
def test_scales_reach_to_the_largest_input(tiny_model: TinyModel, method: str, asked: dict, reach: float) -> None:
    folder = tiny_model("llama")
    checkpoint, shelf = Checkpoint.open(folder), Shelf()
    tokens = tokens_for(checkpoint)
    settings(method, **asked).run(Job(checkpoint, tokens, shelf))
    done = shelf.quantized
    for name, largest in largest_inputs(folder, tokens).items():
        scale = done[name].input_scale
        assert scale is not None and scale.dtype is checkpoint.dtype
        assert float(scale) * reach == pytest.approx(largest, rel=0.01)
    assert all(tensor.input_scale is not None for tensor in done.values())


def test_smoothed_inputs_have_the_scales_of_what_is_left_of_them(tiny_model: TinyModel) -> None:
    """The scale follows the fold, in either order of statistics."""
    folder = tiny_model("llama")
    checkpoint = Checkpoint.open(folder)
    found = []
    for order in ("block", "groups"):
        shelf = Shelf()
        asked = STATIC | {"order": order, "prepare": [{"smoothquant": {"alpha": 0.8}}]}
        settings("gptq", **asked).run(Job(checkpoint, tokens_for(checkpoint), shelf))
        block = shelf.blocks[0]
        norm = block["model.layers.0.input_layernorm.weight"]
        query = block["model.layers.0.self_attn.q_proj"]
        assert isinstance(norm, torch.Tensor) and isinstance(query, QuantTensor) and query.input_scale is not None
        found.append(float(query.input_scale))
    plain = Shelf()
    settings("gptq", **STATIC).run(Job(checkpoint, tokens_for(checkpoint), plain))
    before = plain.quantized["model.layers.0.self_attn.q_proj"].input_scale
    assert before is not None and found[0] == pytest.approx(found[1], rel=0.01)
    assert abs(found[0] / float(before) - 1) > 0.05


def test_a_run_writes_scales_for_the_layers_that_round(tmp_path: Path, tiny_model: TinyModel) -> None:
    source = tiny_model("llama")
    (tmp_path / "text.txt").write_text("a story of a few words. " * 400)
    override = {"layers": "*.down_proj", "scheme": "w8a16", "group_size": 16}
    data = {
        "model": str(source),
        "calibration": {"dataset": str(tmp_path / "text.txt"), "samples": 2, "length": 32},
        "stages": [{"quantize": STATIC | {"method": "rtn", "overrides": [override]}}],
    }
    recipe = parse_recipe(data, base_folder=tmp_path)
    planned = plan(recipe, RunOptions(output=tmp_path / "out"))
    run(recipe, RunOptions(output=tmp_path / "out"))
    written = Checkpoint.open(tmp_path / "out")
    assert sum(info.bytes for info in written.tensors.values()) == planned.bytes_out
    assert verify(tmp_path / "out", source=source, library=True).ok
    names = {name.removesuffix(".input_scale") for name in written.tensors if name.endswith(".input_scale")}
    assert names == {name for name in written.schemes if not name.endswith("down_proj")}


def test_a_resumed_run_gives_the_same_scales(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))

    def scales(shelf: Shelf) -> dict[str, float]:
        settings("gptq", **STATIC).run(Job(checkpoint, tokens_for(checkpoint), shelf))
        return {name: float(tensor.input_scale or 0) for name, tensor in shelf.quantized.items()}

    whole = Shelf()
    found = scales(whole)
    assert scales(Shelf(whole, done=1)) == found and min(found.values()) > 0


def test_layers_of_other_schemes_keep_theirs() -> None:
    overrides = [{"layers": "a", "scheme": "w4a8"}, {"layers": "b", "scheme": "w4a16"}]
    found = settings("rtn", **STATIC, overrides=overrides)
    names = [found.scheme_for(name, 256).name for name in "abc"]
    assert names == ["w4a8", "w4a16", "w8a8_static"]


def test_experts_are_refused(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("mixtral"))
    with pytest.raises(UsageError, match="an expert sees too few tokens"):
        settings("rtn", **STATIC).plan(checkpoint, tokens_for(checkpoint))
    settings("rtn", **STATIC, ignore=["*.experts.*"]).plan(checkpoint, tokens_for(checkpoint))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "hqq", **STATIC}, "for rtn, fp8 and gptq"),
        ({"method": "gptq", "activations": "static"}, "for w8a8 and fp8, not w4a16"),
        ({"method": "fp8", "scheme": "fp8a16", "activations": "static"}, "not fp8a16"),
        ({"method": "fp8", "scheme": "fp8_block", "activations": "static"}, "not fp8_block"),
        ({"method": "rtn", "scheme": "w8a8_static"}, "activations: static"),
        ({"method": "rtn", **STATIC}, "needs calibration data"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(asked: dict[str, object], said: str) -> None:
    data = {"model": "m", "stages": [{"quantize": asked}]}
    if "needs" not in said:
        data["calibration"] = {"dataset": "demo"}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(data)
