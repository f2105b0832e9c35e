"""4-bit floats by rtn and gptq: every family, resume, one divisor for a common input, and what GPTQ gains."""

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.formats import compressed_tensors
from compress.core.grid import Clip, fit_grid
from compress.core.levels import e2m1_codes, nearest_e2m1, table
from compress.core.scheme import Scheme
from compress.core.solve import factorise
from quantize._sweep import quantize_rows
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run, tokens_for
from tests.contracts.test_passes import settings_of
from tests.tiny import FAMILIES

SCHEMES = ("mxfp4a16", "nvfp4a16")
methods = pytest.mark.parametrize("method", ["rtn", "gptq"])
schemes = pytest.mark.parametrize("scheme", SCHEMES)
CASES = [("gptq", "nvfp4a16", family) for family in FAMILIES]
CASES += [("gptq", "mxfp4a16", "phi3"), ("rtn", "mxfp4a16", "llama"), ("rtn", "nvfp4a16", "mixtral")]
NARROW = ("qwen3_moe",)  # experts of 48 channels, which are no whole groups of 32


@pytest.mark.parametrize(("method", "scheme", "family"), CASES)
def test_every_family_is_quantized_as_planned(tiny_model: TinyModel, method: str, scheme: str, family: str) -> None:
    folder = tiny_model(family)
    checkpoint = Checkpoint.open(folder)
    settings = settings_of(method, scheme=scheme, ignore=["*.experts.*.down_proj"] if family in NARROW else [])
    plan = settings.plan(checkpoint, tokens_for(checkpoint))
    done = run(folder, settings, Shelf()).quantized
    assert {layer.name for layer in plan.layers if layer.scheme} == set(done)
    for layer in (layer for layer in plan.layers if layer.scheme):
        encoded = compressed_tensors.encode(layer.name, done[layer.name])
        assert sum(tensor.nbytes for tensor in encoded.values()) == layer.bytes_out
        weight = checkpoint.weight(layer.name).float()
        error = (done[layer.name].dequantize() - weight).square().mean() / weight.square().mean()
        assert error < 0.05, layer.name


@methods
@schemes
def test_a_resumed_run_gives_the_same_bits(tiny_model: TinyModel, method: str, scheme: str) -> None:
    settings = settings_of(method, scheme=scheme)
    whole = run(tiny_model("llama"), settings, Shelf())
    resumed = run(tiny_model("llama"), settings, Shelf(whole, 1))
    assert whole.records == resumed.records
    ours, theirs = whole.quantized, resumed.quantized
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.packed, theirs[name].packed) and torch.equal(tensor.unit, theirs[name].unit)


@methods
def test_layers_with_a_common_input_share_their_divisor(tiny_model: TinyModel, method: str) -> None:
    overrides = [{"layers": "*.1.self_attn.v_proj", "scheme": "w4a16", "group_size": 16}]
    done = run(tiny_model("llama"), settings_of(method, scheme="nvfp4a16", overrides=overrides), Shelf()).quantized
    checkpoint = Checkpoint.open(tiny_model("llama"))
    for block in range(2):
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):
            modules = [f"model.layers.{block}.self_attn.{name}" for name in names]
            modules = [module for module in modules if done[module].scheme.dtype == "nvfp4"]
            largest = max(float(checkpoint.weight(module).float().abs().max()) for module in modules)
            for module in modules:
                divisor = done[module].divisor
                assert divisor is not None and torch.equal(divisor, torch.full_like(divisor, 448 * 6 / largest))
    assert done["model.layers.1.self_attn.v_proj"].divisor is None


@schemes
def test_other_groups_are_not_made_of_a_width_that_is_no_multiple(tiny_model: TinyModel, scheme: str) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen3_moe", odd=True))
    size = Scheme.parse(scheme).group_size
    for uneven in ("refuse", "channel", "smaller"):
        with pytest.raises(UsageError, match=f"group_size {size} does not divide") as caught:
            settings_of("rtn", scheme=scheme, uneven=uneven).plan(checkpoint, None)
        assert caught.value.hint is not None and f"{scheme} has no others" in caught.value.hint


def problem(rows: int = 48, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn((width, width), generator=generator)
    return torch.randn((rows, width), generator=generator) * 0.02, mixing @ mixing.T


@schemes
def test_the_sweep_gains_on_rounding_to_nearest(scheme: str) -> None:
    weight, hessian = problem()
    grid = fit_grid(weight, Scheme.parse(scheme), scale_dtype=torch.bfloat16, clip=Clip())
    factor = factorise(hessian.clone())
    assert factor is not None
    codes, loss = quantize_rows(weight.clone(), grid, factor)
    unit = grid.unit.repeat_interleave(grid.scheme.group_size, dim=1)
    swept = table(grid.scheme.dtype)[codes.int()] * unit - weight
    nearest = grid.round(weight).dequantize() - weight
    cost = {name: float(((rows @ hessian) * rows).sum()) for name, rows in (("swept", swept), ("nearest", nearest))}
    assert cost["swept"] < 0.75 * cost["nearest"]
    assert float(loss.sum()) == pytest.approx(cost["swept"], rel=0.05)  # damping apart


def test_nearest_levels_and_their_codes() -> None:
    x = torch.linspace(-8, 8, 16001)
    level = nearest_e2m1(x)
    levels = table("mxfp4")
    assert torch.equal((level - x).abs(), (x[:, None] - levels).abs().amin(1))
    assert torch.equal(levels[e2m1_codes(level).int()], level + 0.0)  # no negative zero
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest_e2m1(halfway).tolist() == [0, 1, 1, 2, 2, 4, 4]
