"""Inputs in 8 bits: the runtime against transformers with compressed-tensors, which rounds them on its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core._skeleton import StoredLinear
from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.rounded_inputs import rounded_inputs
from compress.core.scheme import Scheme
from compress.evaluate.scorers import RuntimeScorer, TransformersScorer
from runtime.layers.linear import make_linear
from runtime.layers.merged import Merged
from runtime.loader import load
from tests.quantized_folders import quantize_weight, write_quantized

FP8 = Scheme(8, dtype="fp8", activation_bits=8)
BLOCKS = Scheme(8, 32, dtype="fp8", activation_bits=8, blocks=True)
INT8 = Scheme(8, activation_bits=8)
STATIC = [replace(scheme, static_inputs=True) for scheme in (FP8, INT8)]
SCHEMES = {scheme.name: scheme for scheme in (FP8, BLOCKS, INT8, Scheme(4, 32, activation_bits=8), *STATIC)}
IDS = torch.arange(24)[None] + 3


@pytest.mark.peer
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_exact_numerics_give_the_logits_of_transformers(tmp_path: Path, scheme: Scheme) -> None:
    """Another order of sums may push an input over the border between two codes, and what follows in its wake: few
    positions, and by little. The same sums give the same bits."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    write_quantized(tmp_path, scheme)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(tmp_path)
    dense = checkpoint.build_model(torch.float32)
    tokens = Tokens(IDS, None, sha256="", source="drawn")
    [ours] = RuntimeScorer(checkpoint, "cpu", "exact").logits(tokens)
    [streamed] = TransformersScorer(checkpoint, "cpu", "float32").logits(tokens)
    with torch.no_grad():
        theirs = model(IDS).logits
        assert torch.equal(dense(IDS).logits, theirs)
        for layer in dense.modules():
            if isinstance(layer, StoredLinear):
                layer.scheme = None
        plain = dense(IDS).logits
    for found in (ours, streamed):
        apart_T = (found.view_as(theirs) - theirs).abs().amax(-1)
        assert apart_T.median() < 1e-5 and apart_T.max() < 2e-3
    assert (plain - theirs).abs().amax(-1).median() > 1e-4  # they did round


def test_a_group_of_channels_has_its_own_scale() -> None:
    x = torch.ones(2, 64)
    x[0, 0] = 1000.0
    x[1, 40] = 0.0013
    rounded = rounded_inputs(x, BLOCKS)
    assert torch.equal(rounded[0, 32:], x[0, 32:]) and rounded[1, 40] != 0
    assert rounded_inputs(x, FP8)[0, 32:].ne(1).all()  # one scale per token: the outlier coarsens all of them


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("scheme", STATIC, ids=[scheme.name for scheme in STATIC])
def test_fast_layers_round_to_the_stored_scale(scheme: Scheme, compiled: bool) -> None:
    """What lies beyond the largest code is clipped to it."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(32, 64, generator=generator), scheme)
    x = torch.randn(5, 64, generator=generator)
    x[2, 7] = 100.0
    reach = (448 if scheme.dtype == "fp8" else 127) * 0.02
    rounded = rounded_inputs(x, scheme, weight.input_scale)
    assert rounded[2, 7] == pytest.approx(reach) and (rounded - x)[2, :7].abs().max() < reach / 20
    wanted = rounded @ weight.dequantize().T
    exact = make_linear(weight, numerics="exact")(x)
    fast = make_linear(weight, numerics="fast", dtype=torch.float32, compiled=compiled)(x)
    torch.testing.assert_close(exact, wanted)
    assert (fast - wanted).norm() < 0.01 * wanted.norm()


def test_layers_are_joined_where_they_share_a_scale(tmp_path: Path) -> None:
    """q, k and v of our artifacts do, having one input; others' may not, and stay apart."""
    write_quantized(tmp_path, STATIC[1])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.input_scale"] *= 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    merged = [module for module in load(tmp_path, numerics="exact").modules() if isinstance(module, Merged)]
    assert [len(module.linears) for module in merged] == [1, 1, 3, 1]  # q, k, v and gate, up of two blocks
    found = [float(linear.get_buffer("input_scale")) for linear in merged[2].linears]
    assert found == pytest.approx([0.02, 0.04, 0.02])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("scheme", [BLOCKS, Scheme(4, 64, activation_bits=8)], ids=["fp8_block", "w4a8"])
def test_fast_layers_round_inputs(scheme: Scheme, rows: int, compiled: bool) -> None:
    """The last block of output channels has 8 of 32."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(40, 192, generator=generator), scheme)
    x = torch.randn(rows, 192, generator=generator)
    wanted = rounded_inputs(x, scheme) @ weight.dequantize().T
    layer = make_linear(weight, numerics="fast", dtype=torch.float32, compiled=compiled)
    assert (layer(x) - wanted).norm() < 0.01 * wanted.norm()
