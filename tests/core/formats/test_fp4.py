"""4-bit floats of compressed-tensors, mxfp4 and nvfp4: both decoders, the library, transformers, and whole models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.core.errors import ArtifactError, InputError, RecipeError, UsageError
from compress.core.formats import _reference, reader_for
from compress.core.formats import compressed_tensors as ct
from compress.core.formats._compressed_tensors_config import format_of, weight_arguments
from compress.core.grid import Clip, fit_grid
from compress.core.levels import table
from compress.core.recipe import parse_recipe
from compress.core.safetensors_io import read_header
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from runtime.llm import LLM
from tests.quantized_folders import tiny_llama, write_quantized

MX, NV = Scheme.parse("mxfp4a16"), Scheme.parse("nvfp4a16")
schemes = pytest.mark.parametrize("scheme", [MX, NV], ids=lambda scheme: scheme.name)
LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
GOLDEN = [16, 50, 84, 118, 152, 186, 220, 254]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantized(weight: torch.Tensor, scheme: Scheme, clip: Clip | None = None) -> QuantTensor:
    return fit_grid(weight, scheme, scale_dtype=torch.bfloat16, clip=clip).round(weight)


def equal_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Signs of zeros among them."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def same(left: QuantTensor, right: QuantTensor) -> bool:
    parts = [(each.packed, each.scale.view(torch.uint8), each.unit) for each in (left, right)]
    return left.scheme == right.scheme and all(map(torch.equal, *parts))


def stored_whole(scheme: Scheme, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row for each of some scales as they lie on disk, with every level in it."""
    repeats = scheme.group_size // 16
    octets = torch.tensor(GOLDEN * repeats, dtype=torch.uint8).repeat(len(scale), 1)
    parts = {"m.weight_packed": octets, "m.weight_scale": scale[:, None]}
    return parts | ({"m.weight_global_scale": torch.tensor([3.0])} if scheme is NV else {})


def library_weight(parts: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs.model_validate(weight_arguments(scheme))
    layer = QuantizationScheme(targets=["Linear"], weights=weights)
    stored = {name.removeprefix("m."): part for name, part in parts.items()}
    return BaseCompressor.get_value_from_registry(format_of(scheme)).decompress(stored, layer)["weight"]


@schemes
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 96), (16, 352)], ids=str)
@pytest.mark.parametrize("clip", [None, Clip()], ids=["minmax", "mse"])
def test_what_is_written_is_read_back(
    tmp_path: Path, scheme: Scheme, shape: tuple[int, int], clip: Clip | None
) -> None:
    weight = random(*shape)
    weight[0, :16] = 0
    weight[-1] *= 1e-7
    tensor = quantized(weight, scheme, clip)
    parts = ct.encode("m", tensor)
    assert set(parts) == set(ct.stored_names("m", scheme))
    assert sum(part.nbytes for part in parts.values()) == ct.encoded_bytes(shape, scheme, torch.bfloat16)
    assert same(ct.decode("m", parts.__getitem__, scheme), tensor)
    save_file(parts, tmp_path / "m.safetensors")
    infos = read_header(tmp_path / "m.safetensors")
    reader = reader_for({"quantization_config": ct.quantization_config({"m": scheme}, [])})
    assert reader.modules(infos) == {"m": scheme} and reader.shape_of("m", scheme, infos) == shape
    again = _reference.weights(reader, "m", infos, scheme, np.arange(shape[0]))
    assert equal_bits(torch.from_numpy(again), tensor.dequantize())
    assert equal_bits(library_weight(parts, scheme), tensor.dequantize(torch.bfloat16))


@schemes
def test_all_levels_and_scales_are_read_alike(tmp_path: Path, scheme: Scheme) -> None:
    patterns = torch.arange(253 if scheme is MX else 127, dtype=torch.uint8)
    parts = stored_whole(scheme, patterns if scheme is MX else patterns.view(torch.float8_e4m3fn))
    tensor = ct.decode("m", parts.__getitem__, scheme)
    one = torch.tensor(LEVELS * (scheme.group_size // 16))
    unit = torch.exp2(patterns.double() - 127) if scheme is MX else patterns.view(torch.float8_e4m3fn).float() / 3
    assert equal_bits(tensor.dequantize(), one * unit.float()[:, None])
    save_file(parts, tmp_path / "m.safetensors")
    reader = reader_for({"quantization_config": ct.quantization_config({"m": scheme}, [])})
    infos = read_header(tmp_path / "m.safetensors")
    again = _reference.weights(reader, "m", infos, scheme, np.arange(len(patterns)))
    assert equal_bits(torch.from_numpy(again), tensor.dequantize())
    assert equal_bits(library_weight(parts, scheme), tensor.dequantize(torch.bfloat16))


@schemes
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_codes_are_the_nearest_and_scales_the_best(scheme: Scheme, data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    size = data.draw(st.sampled_from([1e-6, 1e-3, 1.0, 1e4]))
    weight = random(rows, groups * scheme.group_size, seed=data.draw(st.integers(0, 1000))) * size
    searched, reaching = quantized(weight, scheme, Clip()), quantized(weight, scheme)
    wrong = {}
    for name, tensor in (("searched", searched), ("reaching", reaching)):
        exact = weight.view(rows, groups, -1) / tensor.unit[..., None]
        nearest = (exact[..., None] - table(scheme.dtype)).abs().amin(-1)
        found = tensor.dequantize().view(rows, groups, -1) / tensor.unit[..., None]
        torch.testing.assert_close((found - exact).abs(), nearest, rtol=1e-4, atol=1e-5)
        wrong[name] = (tensor.dequantize() - weight).square().view(rows, groups, -1).sum(-1)
    assert bool((wrong["searched"] <= wrong["reaching"] * 1.0001).all())
    highest = reaching.unit * 6
    assert bool((highest >= weight.view(rows, groups, -1).abs().amax(-1) * (1 - 1e-6)).all())
    scales = torch.log2(searched.unit)
    assert scheme is NV or torch.equal(scales, scales.round())


@schemes
def test_a_searched_scale_beats_its_neighbours(scheme: Scheme) -> None:
    weight = random(64, 2 * scheme.group_size)
    best = quantized(weight, scheme, Clip())
    groups = weight.view(64, 2, -1)
    wrong = (best.dequantize() - weight).square().view(64, 2, -1).sum(-1)
    for shift in (-1, 1):
        pattern = (best.scale.view(torch.uint8).to(torch.int16) + shift).clamp(1, 126 if scheme is NV else 254)
        other = replace(best, scale=pattern.to(torch.uint8).view(best.scale.dtype))
        exact = groups / other.unit[..., None]
        nearest = (exact[..., None] - table(scheme.dtype)).abs().amin(-1) * other.unit[..., None]
        assert bool((wrong <= nearest.square().sum(-1) * 1.0001).all())


def test_extreme_weights_keep_finite_scales() -> None:
    for scheme in (MX, NV):
        for size in (0.0, 1e-44, 1e-38, 1e-30, 1e30, 2e38):
            weight = torch.full((2, 32), size)
            weight[1] = 0
            tensor = quantized(weight, scheme, Clip())
            assert bool(tensor.unit.isfinite().all()) and bool(tensor.unit.gt(0).all())
            found = tensor.dequantize()
            assert bool(found.isfinite().all()) and not found[1].any()
            if size > 1e-36:
                assert torch.allclose(found[0], weight[0], rtol=0.25)


def test_rows_of_other_divisors_stack_but_are_not_written() -> None:
    parts = [quantized(random(4, 32, seed=seed) * (seed + 1), NV) for seed in range(2)]
    whole = QuantTensor.stack(parts)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert same(whole.rows(4, 8), parts[1]) and same(whole.at(torch.arange(4)), parts[0])
    with pytest.raises(UsageError, match="differ in their divisor"):
        ct.encode("m", whole)


def test_bytes_that_begin_within_a_word_are_read() -> None:
    parts = ct.encode("m", quantized(random(2, 32), MX))
    octets = parts["m.weight_packed"]
    shifted = torch.zeros(octets.numel() + 1, dtype=torch.uint8)[1:].view(octets.shape).copy_(octets)
    wanted = ct.decode("m", parts.__getitem__, MX)
    assert same(ct.decode("m", (parts | {"m.weight_packed": shifted}).__getitem__, MX), wanted)


@pytest.mark.parametrize(
    ("scheme", "name", "change", "said"),
    [
        (MX, "weight_packed", lambda value: value.to(torch.int32), "uint8"),
        (MX, "weight_packed", lambda value: value[:, :-1], "multiple of 32"),
        (MX, "weight_scale", lambda value: value.float(), "uint8"),
        (MX, "weight_scale", lambda value: value[1:], r"\[4, 2\]"),
        (NV, "weight_scale", lambda value: value.view(torch.uint8), "float8_e4m3fn"),
        (NV, "weight_global_scale", lambda value: value.half(), "float32"),
        (NV, "weight_global_scale", lambda value: value.repeat(2), "float32"),
        (NV, "weight_global_scale", lambda value: -value, "positive"),
        (NV, "weight_global_scale", lambda value: value * float("nan"), "positive"),
    ],
)
def test_tensors_that_do_not_fit_are_named(scheme: Scheme, name: str, change, said: str) -> None:
    parts = ct.encode("m", quantized(random(4, 64), scheme))
    parts[f"m.{name}"] = change(parts[f"m.{name}"])
    with pytest.raises(ArtifactError, match=said) as caught:
        ct.decode("m", parts.__getitem__, scheme)
    assert f"m.{name}" in str(caught.value)


@schemes
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 8}, "num_bits 8"),
        ({"type": "int"}, "type 'int'"),
        ({"group_size": 64}, "group_size 64"),
        ({"strategy": "channel"}, "strategy 'channel'"),
        ({"symmetric": False}, "symmetric False"),
        ({"scale_dtype": "torch.float32"}, "scale_dtype"),
        ({"colour": 1}, "unknown key"),
    ],
    ids=str,
)
def test_configs_that_are_not_read_are_named(scheme: Scheme, weights: dict[str, object], message: str) -> None:
    config = ct.quantization_config({"m": scheme}, [])
    config["config_groups"]["group_0"]["weights"] |= weights
    with pytest.raises(InputError, match=message):
        ct.scheme_of("m", config)


def test_inputs_of_4_bits_are_not_read_and_presets_of_weights_are() -> None:
    config = ct.quantization_config({"m": NV}, [])
    group = config["config_groups"]["group_0"]
    group["input_activations"] = group["weights"] | {"dynamic": "local"}
    with pytest.raises(InputError, match="4-bit inputs"):
        ct.scheme_of("m", config)
    for name, scheme in (("MXFP4A16", MX), ("NVFP4A16", NV)):
        assert ct.scheme_of("m", config | {"config_groups": {name: ["Linear"]}}) == scheme


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "mxfp4"}, "write mxfp4a16"),
        ({"scheme": "nvfp4a16", "group_size": 32}, "nvfp4 weights have groups of 16"),
        ({"scheme": "mxfp4a16", "group_size": -1}, "mxfp4 weights have groups of 32"),
        ({"scheme": "mxfp4a16", "symmetric": False}, "no zero points"),
        ({"method": "hqq", "scheme": "nvfp4a16"}, "methods for nvfp4a16 are rtn and gptq"),
        ({"method": "gptq", "scheme": "nvfp4a16", "refit": 2}, "those of nvfp4a16 cannot"),
    ],
    ids=str,
)
def test_storedthat_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    stage = {"quantize": {"method": "rtn"} | settings}
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"model": "m", "calibration": {"dataset": "demo"}, "stages": [stage]})


def made(folder: Path, scheme: Scheme, **settings: object) -> Path:
    """An artifact of a tiny Llama in bf16."""
    tiny_llama().to(torch.bfloat16).save_pretrained(folder / "model")
    stage = {"quantize": {"method": "rtn", "scheme": scheme.name} | settings}
    recipe = parse_recipe({"model": "model", "stages": [stage]}, base_folder=folder)
    planned = plan(recipe, RunOptions(output=folder / "out"))
    run(recipe, RunOptions(output=folder / "out"))
    files = (folder / "out").glob("*.safetensors")
    assert sum(info.bytes for file in files for info in read_header(file).values()) == planned.bytes_out
    return folder / "out"


@schemes
def test_a_run_writes_what_readers_take(tmp_path: Path, scheme: Scheme) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from compress.core.checkpoint import Checkpoint

    folder = made(tmp_path, scheme)
    report = verify(folder, source=tmp_path / "model", library=True)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert any(check.name == "library" and "agrees" in check.detail for check in report.checks)
    ours = Checkpoint.open(folder).build_model(torch.bfloat16).state_dict()
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    assert all(equal_bits(value, ours[name]) for name, value in dense.state_dict().items())
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dense(ids).logits)
    assert equal_bits(packed.model.layers[0].mlp.up_proj.weight, ours["model.layers.0.mlp.up_proj.weight"])


@schemes
def test_the_runtime_computes_with_the_dequantized_weights(tmp_path: Path, scheme: Scheme) -> None:
    from compress.core.checkpoint import Checkpoint

    folder = made(tmp_path, scheme)
    model = Checkpoint.open(folder).build_model(torch.float32)
    model.config.save_pretrained(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    prompts = [[5, 6, 7], [40, 2, 9, 11]]
    said = {}
    for name, path in (("packed", folder), ("dense", tmp_path / "dense")):
        with LLM(path, numerics="exact") as llm:
            found = llm.generate(prompts, max_tokens=24, ignore_eos=True, logprobs=1)
            said[name] = [(each.token_ids, each.logprobs) for each in found]
    assert said["packed"] == said["dense"]


@pytest.mark.parametrize("broken", ["divisor", "e8m0", "e4m3"])
def test_verification_finds_broken_scales(tmp_path: Path, broken: str) -> None:
    write_quantized(tmp_path, MX if broken == "e8m0" else NV)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    part = "weight_global_scale" if broken == "divisor" else "weight_scale"
    name = f"model.layers.0.mlp.up_proj.{part}"
    if broken == "divisor":
        tensors[name][0] = 0
    else:
        tensors[name].view(torch.uint8)[1, 1] = 0xFF
    save_file(tensors, file, {"format": "pt"})
    said = [check.detail for check in verify(tmp_path).checks if not check.ok]
    assert said == [f"{name}: {'holds a scale that is zero' if broken == 'divisor' else 'holds NaN'}"]
