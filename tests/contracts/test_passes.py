"""What every weight method must do, whatever it is: inherited for free by each file of the method folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.formats import writer_for
from compress.core.methods import available_kinds, find_pass
from compress.core.passes import Pass
from compress.core.scheme import Scheme
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run, tokens_for
from tests.tiny import FAMILIES, LAYERS

METHODS = [(kind, method) for kind, methods in available_kinds().items() for method in methods]
QUANTIZERS = [method for kind, method in METHODS if kind == "quantize"]
methods = pytest.mark.parametrize("method", QUANTIZERS)
CHANNELS_ONLY = ("fp8",)
BLOCKS_ONLY = ("nf4",)
OWN_SCHEMES = (*CHANNELS_ONLY, *BLOCKS_ONLY)
INTEGER_METHODS = [name for name in QUANTIZERS if name not in OWN_SCHEMES]
integer_methods = pytest.mark.parametrize("method", INTEGER_METHODS)
QUICK: dict[str, dict[str, object]] = {"autoround": {"steps": 3, "tokens_per_step": 96}, "awq": {"steps": 3}}


def settings_of(method: str, **asked: object) -> Pass:
    """A quantizer's settings as asked, without the repetitions that only make it better; without scheme and groups
    where it has its own."""
    settings = QUICK.get(method, {}) | asked
    if method == "mixed":  # one choice: what it does with several is in tests/quantize/test_mixed.py
        settings |= {"choices": [settings.get("scheme", "w4a16")]}
    if method in OWN_SCHEMES:
        settings = {name: value for name, value in settings.items() if name not in ("scheme", "group_size")}
    return find_pass("quantize", method).model_validate_json(json.dumps(settings))


def same(left: Shelf, right: Shelf) -> bool:
    ours, theirs = left.quantized, right.quantized
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.packed, theirs[name].packed) and torch.equal(value.scale, theirs[name].scale)
        for name, value in ours.items()
    )


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_settings_are_documented(kind: str, method: str) -> None:
    found = find_pass(kind, method)
    assert found.kind == kind and found.paper and found.__doc__
    assert all(field.description for field in found.model_fields.values())
    assert found.model_json_schema()["additionalProperties"] is False


def test_settings_need_no_torch() -> None:
    script = (
        "import sys\n"
        "from compress.core.methods import available_kinds, find_pass\n"
        "[find_pass(kind, name)() for kind, names in available_kinds().items() for name in names]\n"
        "sys.exit(', '.join({'torch._C', 'transformers.utils', 'numpy.linalg'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@methods
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_as_planned(tiny_model: TinyModel, method: str, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    checkpoint = Checkpoint.open(folder)
    settings = settings_of(method, scheme="w4a16", group_size=8 if odd else 16)
    if method in BLOCKS_ONLY and odd:
        with pytest.raises(UsageError, match="group_size 64 does not divide .*leave these layers as they are: ignore"):
            settings.plan(checkpoint, None)
        return
    plan = settings.plan(checkpoint, tokens_for(checkpoint))
    shelf = run(folder, settings, Shelf())
    done = shelf.quantized
    assert {layer.name for layer in plan.layers if layer.scheme} == set(done)
    for layer in plan.layers:
        encoded = writer_for(settings.formats[0]).encode(layer.name, done[layer.name])
        assert sum(tensor.nbytes for tensor in encoded.values()) == layer.bytes_out
        if settings.transforms:  # the weights were transformed first: tests/quantize/test_prepare.py looks at logits
            continue
        weight = checkpoint.weight(layer.name).float()
        error = (done[layer.name].dequantize() - weight).square().mean() / weight.square().mean()
        assert error < 0.05, layer.name
    assert len(shelf.records) == LAYERS
    assert {site.name for record in shelf.records for site in record.sites} == set(done)
    assert all(site.method for record in shelf.records for site in record.sites)
    assert plan.bytes_out < sum(info.bytes for info in checkpoint.tensors.values())
    assert plan.peak_memory_bytes > 0 and plan.minutes > 0


@integer_methods
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_code(tiny_model: TinyModel, method: str, bits: int, symmetric: bool) -> None:
    settings = settings_of(method, scheme=f"w{bits}a16", group_size=-1, symmetric=symmetric)
    tensors = run(tiny_model("llama"), settings, Shelf()).quantized
    assert all(tensor.scheme == settings.schemes[0] for tensor in tensors.values())  # type: ignore[attr-defined]
    used = torch.cat([tensor.codes().flatten() for tensor in tensors.values()])
    assert int(used.min()) >= -(1 << (bits - 1)) and int(used.max()) <= (1 << (bits - 1)) - 1
    assert len(used.unique()) > (1 << bits) * 0.9


@integer_methods
def test_layers_get_the_schemes_of_their_overrides(tiny_model: TinyModel, method: str) -> None:
    overrides = [
        {"layers": "*.v_proj", "scheme": "w8a16"},
        {"layers": "model.layers.1.*", "scheme": "w3a16", "group_size": 32},
        {"layers": "*.1.mlp.down_proj", "symmetric": False},
    ]
    settings = settings_of(method, scheme="w4a16", group_size=16, overrides=overrides, ignore=["*.0.mlp.down_proj"])
    done = run(tiny_model("llama"), settings, Shelf()).quantized
    assert {name: tensor.scheme for name, tensor in done.items() if "layers.2" not in name or "v_proj" in name} == {
        **{f"model.layers.0.self_attn.{kind}_proj": Scheme(4, 16) for kind in "qko"},
        **{f"model.layers.0.mlp.{kind}_proj": Scheme(4, 16) for kind in ("gate", "up")},
        **{f"model.layers.1.self_attn.{kind}_proj": Scheme(3, 32) for kind in "qkvo"},
        **{f"model.layers.1.mlp.{kind}_proj": Scheme(3, 32) for kind in ("gate", "up")},
        **{f"model.layers.{block}.self_attn.v_proj": Scheme(8, 16) for block in (0, 2)},
        "model.layers.1.mlp.down_proj": Scheme(4, 16, symmetric=False),
    }


@methods
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_same_run_gives_the_same_bits(tiny_model: TinyModel, method: str, family: str) -> None:
    settings = settings_of(method, group_size=16)
    folder = tiny_model(family)
    before = torch.random.get_rng_state()
    first, second = (run(folder, settings, Shelf()) for _ in range(2))
    assert same(first, second)
    assert first.records == second.records
    assert torch.equal(before, torch.random.get_rng_state())


@methods
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("done", range(1, LAYERS))
def test_a_resumed_run_gives_the_same_bits(tiny_model: TinyModel, method: str, family: str, done: int) -> None:
    settings = settings_of(method, group_size=16)
    whole = run(tiny_model(family), settings, Shelf())
    resumed = run(tiny_model(family), settings, Shelf(whole, done))
    assert same(whole, resumed)
    assert whole.records == resumed.records


@pytest.mark.parametrize("method", INTEGER_METHODS)
def test_a_group_that_does_not_divide_is_refused_or_handled(tiny_model: TinyModel, method: str) -> None:
    folder = tiny_model("llama", odd=True)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(UsageError, match=r"group_size 64 does not divide .*sizes that work: 8, -1"):
        settings_of(method, group_size=64).plan(checkpoint, tokens_for(checkpoint))
    for uneven, expected in (("channel", {-1}), ("smaller", {56, 40})):
        settings = settings_of(method, group_size=64, uneven=uneven)
        plan = settings.plan(checkpoint, tokens_for(checkpoint))
        sizes = {layer.scheme.group_size for layer in plan.layers if layer.scheme}
        assert sizes == expected
        assert all(
            layer.scheme.group_size == -1 or layer.shape[1] % layer.scheme.group_size == 0
            for layer in plan.layers
            if layer.scheme
        )
        tensors = run(folder, settings, Shelf()).quantized
        assert {name: tensor.scheme for name, tensor in tensors.items()} == {
            layer.name: layer.scheme for layer in plan.layers
        }


@methods
def test_ignored_layers_are_left_alone(tiny_model: TinyModel, method: str) -> None:
    settings = settings_of(method, group_size=16, ignore=("*.down_proj", "model.layers.1.*", "*.nothing"))
    checkpoint = Checkpoint.open(tiny_model("llama"))
    plan = settings.plan(checkpoint, tokens_for(checkpoint))
    assert any("*.nothing" in notice for notice in plan.notices)
    names = set(run(tiny_model("llama"), settings, Shelf()).quantized)
    assert names and not any("down_proj" in name or ".layers.1." in name for name in names)


@methods
@pytest.mark.parametrize("trouble", ["dead channels", "zero layer", "huge weight", "one token", "constant input"])
def test_numerics_under_stress(tiny_model: TinyModel, tmp_path: Path, method: str, trouble: str) -> None:
    folder = troubled(tiny_model("llama"), tmp_path / "model", trouble)
    checkpoint = Checkpoint.open(folder)
    tokens = tokens_for(checkpoint, 1, 1) if trouble == "one token" else tokens_for(checkpoint)
    if trouble == "constant input":
        tokens = Tokens(torch.zeros_like(tokens.ids), None, sha256="", source="constant")
    shelf = run(folder, settings_of(method, group_size=16), Shelf(), tokens)
    for tensor in shelf.quantized.values():
        assert bool(tensor.dequantize().isfinite().all())
    assert all(record.output_error is None or record.output_error < 1 for record in shelf.records)


def troubled(source: Path, folder: Path, trouble: str) -> Path:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    if trouble == "dead channels":
        tensors["model.layers.1.post_attention_layernorm.weight"][::3] = 0
    elif trouble == "zero layer":
        weight.zero_()
    elif trouble == "huge weight":
        weight[3, 5] = 1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
