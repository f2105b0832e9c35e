"""Linear layers: every scheme against its dequantized weight, exact rows, switches and fallbacks."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.core import compiling
from compress.core.errors import UsageError
from compress.core.grid import fit_grid
from compress.core.numerics import runtime_dtype
from compress.core.rounded_inputs import rounded_inputs
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime import native
from runtime.layers.compiled import CompiledLinear
from runtime.layers.gpu import GpuLinear
from runtime.layers.linear import concatenate, make_linear
from runtime.layers.packed import DequantizingLinear
from runtime.native.library import library

INTEGERS = [
    Scheme(2, 32),
    Scheme(3, 32, symmetric=False),
    Scheme(4, 32),
    Scheme(4, 128, symmetric=False),
    Scheme(4),
    Scheme(4, 16),
    Scheme(4, 32, activation_bits=8),
    Scheme(5, 64),
    Scheme(6, symmetric=False),
    Scheme(7, 32, symmetric=False),
    Scheme(8, 32),
    Scheme(8, symmetric=False),
    Scheme(8, activation_bits=8),
    Scheme(8, symmetric=False, activation_bits=8),
]
FLOATS = [
    Scheme(4, 64, dtype="nf4"),
    Scheme(4, 64, dtype="fp4"),
    Scheme(8, dtype="fp8"),
    Scheme(8, dtype="fp8", activation_bits=8),
]
GROUPED_FLOATS = [Scheme(4, 32, dtype="mxfp4"), Scheme(4, 16, dtype="nvfp4")]
KERNELS = Path(native.__file__).parent
SHAPES = [(48, 128), (4, 64), (33, 192), (16, 100), (5, 36), (22, 1280)]  # [out, in]
needs_kernels = pytest.mark.skipif(library().loaded is None, reason="needs gcc and torch with libgomp")


def name_of(value: object) -> str:
    return f"{value.name}-g{value.group_size}-{value.symmetric}" if isinstance(value, Scheme) else str(value)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(scheme: Scheme, shape: tuple[int, int], seed: int = 1) -> QuantTensor:
    """A random weight under a scheme, with the whole range of codes; the last group may be ragged."""
    if scheme.dtype in ("int", "mxfp4", "nvfp4"):
        return fit_grid(random(*shape, seed=seed), scheme, scale_dtype=torch.float32).round(random(*shape, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    codes_OK = torch.randint(0, 1 << scheme.bits, shape, generator=generator).to(torch.uint8)
    if scheme.dtype == "fp8":
        codes_OK[(codes_OK & 0x7F) == 0x7F] = 1  # no NaN; 1 is subnormal
    scale_OG = torch.rand((shape[0], scheme.groups_in(shape[1])), generator=generator) + 0.1
    return QuantTensor.from_stored(codes_OK, scale_OG, None, scheme)


def expected(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """In fp64, inputs rounded as the scheme says."""
    return rounded_inputs(x.float(), weight.scheme).double() @ weight.dequantize().double().T


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------------- right
CASES = [(scheme, shape) for scheme in [*INTEGERS, *FLOATS] for shape in SHAPES]
CASES += [(scheme, shape) for scheme in GROUPED_FLOATS for shape in SHAPES if shape[1] % 32 == 0]


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=name_of)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_every_scheme_computes_with_its_dequantized_weight(scheme, shape, numerics) -> None:
    weight, bias = quantized(scheme, shape), random(shape[0], seed=2)
    layer = make_linear(weight, bias, numerics=numerics)
    for rows in (1, 2, 3, 7, 70):
        x = random(rows, shape[1], seed=rows)
        y = layer(x)
        assert y.dtype == x.dtype
        limit = 2e-6 if numerics == "exact" else 2e-4 if library().loaded else 2e-2
        assert error(y - bias, expected(x, weight)) < limit


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=name_of)
def test_torchs_kernels_give_the_same_to_bf16(scheme, shape) -> None:
    weight = quantized(scheme, shape)
    layer = make_linear(weight, numerics="fast", compiled=False)
    assert not isinstance(layer, CompiledLinear)
    for rows in (1, 70):
        x = random(rows, shape[1], seed=rows)
        assert error(layer(x), expected(x, weight)) < 1.2e-2


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_weights(numerics, dtype) -> None:
    weight, bias, x = random(20, 36), random(20), random(2, 5, 36)
    layer = make_linear(weight.to(dtype), bias, numerics=numerics)
    y = layer(x.to(runtime_dtype(numerics, "cpu")))
    wanted = torch.nn.functional.linear(x, weight.to(dtype).float(), bias)
    assert y.shape == (2, 5, 20)
    limit = 1e-2 if y.dtype is torch.bfloat16 else 1e-6
    assert error(y, wanted.double()) < limit


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(8, activation_bits=8), FLOATS[0]], ids=name_of)
@pytest.mark.parametrize("compiled", [True, False])
def test_bf16_inputs_give_bf16_results(scheme, compiled) -> None:
    weight = quantized(scheme, (48, 128))
    layer = make_linear(weight, numerics="fast", compiled=compiled)
    for rows in (1, 70):
        x = random(rows, 128).bfloat16()
        y = layer(x)
        assert y.dtype is torch.bfloat16
        assert error(y, expected(x, weight)) < 1.2e-2


def test_int8_inputs_are_those_of_compressed_tensors() -> None:
    x = torch.tensor([[127.5, -127.5, 1.0, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0, 0.0]])
    rounded = rounded_inputs(x, Scheme(8, activation_bits=8))
    assert rounded[0].tolist() == [127.0, -128.0, 1.0, 0.0, 1.0]
    assert not rounded[1].any()


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["int", "float"])
def test_rounded_inputs_agree_with_the_library(kind) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    x = random(1, 6, 64)
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity())
    theirs = fake_quantize(x, scale, zero, arguments)
    ours = rounded_inputs(x[0], Scheme(8, activation_bits=8, dtype="int" if kind == "int" else "fp8"))
    torch.testing.assert_close(ours, theirs[0], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- rows do not depend on each other
EXACT = [None, Scheme(4, 32), Scheme(8, symmetric=False), Scheme(8, activation_bits=8), FLOATS[0], FLOATS[3]]


@pytest.mark.parametrize("scheme", EXACT, ids=name_of)
@pytest.mark.parametrize("shape", [(96, 64), (20, 100), (320, 1024), (1536, 576)], ids=str)
def test_exact_rows_have_the_same_bits_in_every_batch(scheme, shape) -> None:
    weight = random(*shape) if scheme is None else quantized(scheme, shape)
    layer = make_linear(weight, random(shape[0], seed=3), numerics="exact")
    x = random(200, shape[1], seed=4)
    whole = layer(x)
    generator = torch.Generator().manual_seed(5)
    for rows in (1, 2, 7, 8, 9, 31, 63, 64, 65, 130):
        chosen = torch.randperm(200, generator=generator)[:rows]
        assert torch.equal(layer(x[chosen]), whole[chosen])
    assert torch.equal(layer(x[17:83]), whole[17:83])


def test_plain_products_are_not_exact() -> None:
    """The reason for padding: were this to fail everywhere, exact mode could be the plain product."""
    weight, x = random(320, 1024), random(64, 1024, seed=1)
    alone = torch.cat([torch.nn.functional.linear(row[None], weight) for row in x])
    if torch.equal(alone, torch.nn.functional.linear(x, weight)):
        pytest.skip("this BLAS gives the same bits for one row as for many")
    assert torch.equal(make_linear(weight, numerics="exact")(x[:1]), make_linear(weight, numerics="exact")(x)[:1])


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("scheme", EXACT, ids=name_of)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_row_of_nan_stays_alone(numerics, scheme, compiled) -> None:
    weight = random(48, 128) if scheme is None else quantized(scheme, (48, 128))
    layer = make_linear(weight, numerics=numerics, compiled=compiled)
    for rows in (4, 70):
        x = random(rows, 128)
        clean = layer(x)
        x[1, 5] = float("nan")
        y = layer(x)
        assert bool(y[1].isnan().all())
        others = torch.arange(rows) != 1
        torch.testing.assert_close(y[others], clean[others], rtol=0, atol=0)


# ---------------------------------------------------------------------- memory, choices, mistakes
@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(8, 128), Scheme(2, 128), Scheme(8), *FLOATS], ids=name_of)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_packed_weights_stay_packed(scheme, numerics) -> None:
    weight = quantized(scheme, (256, 512))
    layer = make_linear(weight, numerics=numerics)
    layer(random(1, 512))
    layer(random(100, 512))
    assert layer.bytes == sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert layer.bytes <= weight.bytes + 64
    assert not list(layer.parameters())


@needs_kernels
@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS], ids=name_of)
def test_no_scheme_is_slow_where_kernels_are_compiled(scheme) -> None:
    layer = make_linear(quantized(scheme, (48, 128)), numerics="fast")
    assert layer.slow_reason == ""


@needs_kernels
def test_a_layer_can_be_copied_and_moved() -> None:
    weight, x = quantized(Scheme(4, 32), (48, 128)), random(3, 128)
    layer = make_linear(weight, numerics="fast")
    wanted = layer(x)
    copied = copy.deepcopy(layer).to("cpu")
    layer.codes.zero_()
    assert torch.equal(copied(x), wanted)
    assert not torch.equal(layer(x), wanted)


@needs_kernels
@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(4, 32), FLOATS[0], FLOATS[2]], ids=name_of)
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_inputs_of_every_size(scheme, size) -> None:
    weight, x = quantized(scheme, (48, 128)), random(3, 128) * size
    assert error(make_linear(weight, numerics="fast")(x), expected(x, weight)) < 2e-4


@needs_kernels
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(2, 32), FLOATS[2]], ids=name_of)
def test_threads_do_not_change_bits(scheme) -> None:
    weight, x = quantized(scheme, (600, 256)), random(5, 256)
    layer, before = make_linear(weight, numerics="fast"), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("scheme", [Scheme(8, 32), Scheme(4, 8), *FLOATS], ids=name_of)
def test_a_layer_without_a_fast_path_says_so(scheme) -> None:
    layer = make_linear(quantized(scheme, (48, 128)), numerics="fast", compiled=False)
    assert isinstance(layer, DequantizingLinear)
    assert "dequantized at each step" in layer.slow_reason
    assert layer.slow_reason in repr(layer)


@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS], ids=name_of)
def test_the_gpus_layer_computes_the_same_here(scheme) -> None:
    weight, x = quantized(scheme, (48, 128)), random(5, 128)
    assert error(GpuLinear(weight, None)(x), expected(x, weight)) < 2e-6


def test_without_a_compiler_torchs_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    library.cache_clear()
    try:
        assert library().reason == "there is no C compiler"
        weight, x = quantized(Scheme(4, 32), (48, 128)), random(2, 128)
        layer = make_linear(weight, numerics="fast")
        assert not isinstance(layer, CompiledLinear)
        assert error(layer(x), expected(x, weight)) < 1e-2
    finally:
        library.cache_clear()


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_FLAGS", ("--no-such-option",))
    library.cache_clear()
    try:
        assert "fails" in library().reason
    finally:
        library.cache_clear()


@needs_kernels
def test_kernels_are_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_FLAGS", ("-O0", *compiling._FLAGS[1:]))  # sooner done
    compiled = []
    compile = compiling._compile
    monkeypatch.setattr(compiling, "_compile", lambda *asked: compiled.append(asked) or compile(*asked))
    for _ in range(2):
        compiling.load(KERNELS)
    assert len(compiled) == 1
    [kept] = (tmp_path / "compress").iterdir()
    assert kept.name.startswith("kernels-")
    assert (tmp_path / "compress").stat().st_mode & 0o077 == 0
    monkeypatch.setattr(compiling, "_FLAGS", (*compiling._FLAGS, "-DOTHER"))
    compiling.load(KERNELS)
    assert len(compiled) == 2


@needs_kernels
def test_without_a_cache_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compiling, "_FLAGS", ("-O0", *compiling._FLAGS[1:]))
    assert compiling._cache_folder() is None
    assert compiling.load(KERNELS).low_bit_product


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), FLOATS[0]], ids=name_of)
def test_layers_become_one(scheme) -> None:
    parts = [quantized(scheme, (rows, 128), seed=rows) for rows in (24, 8, 16)]
    x = random(3, 128)
    one = make_linear(concatenate(parts), numerics="exact")(x)
    each = torch.cat([make_linear(part, numerics="exact")(x) for part in parts], dim=1)
    torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)
    dense = concatenate([part.dequantize() for part in parts])
    assert torch.equal(dense, concatenate(parts).dequantize())


def test_layers_of_different_schemes_do_not() -> None:
    with pytest.raises(UsageError, match="different schemes"):
        concatenate([quantized(Scheme(4, 32), (8, 64)), quantized(Scheme(4, 64), (8, 64))])
    with pytest.raises(UsageError, match="different schemes or widths"):
        concatenate([quantized(Scheme(4, 32), (8, 64)), quantized(Scheme(4, 32), (8, 128))])


def test_unknown_numerics_are_refused() -> None:
    with pytest.raises(UsageError, match="'quick'"):
        make_linear(random(4, 4), numerics="quick")


def test_layers_need_torch_alone() -> None:
    code = (
        "import sys, runtime.layers.linear, compress.core.formats.awq, compress.core.formats.bitsandbytes\n"
        "import compress.core.formats.compressed_tensors, compress.core.formats.gptq\n"
        "print([name for name in ('transformers', 'pydantic', 'datasets', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
