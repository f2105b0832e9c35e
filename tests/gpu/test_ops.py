"""The kernels on a real GPU: the interpreter's edge shapes once more, bf16 and real shapes on top of them."""

from __future__ import annotations

import pytest
import torch

from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from compress.core.solve import factorise
from compress.core.statistics import Hessian
from compress.core.tensors import QuantTensor
from quantize._sweep import quantize_rows
from runtime.ops.attention import AttentionBatch, paged_attention
from runtime.ops.backend import torch_only, uses_triton
from runtime.ops.low_bit import low_bit_matmul, matmul_reference
from tests.runtime.ops.kernel_cases import CASES, attention, error_of, low_bit

BF16, F32 = torch.bfloat16, torch.float32
SLACK = 4  # the GPU's exp2 is less exact than the CPU's


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def test_tensors_on_a_gpu_go_to_the_kernels() -> None:
    assert uses_triton(torch.zeros(1, device="cuda"))
    with torch_only():
        assert not uses_triton(torch.zeros(1, device="cuda"))


@pytest.mark.parametrize("kernel", CASES)
def test_edge_shapes(kernel: str) -> None:
    bad = []
    for name, result, wanted, bound in CASES[kernel]("cuda"):
        error = error_of(result, wanted)
        if not error <= SLACK * bound:
            bad.append((name, error, bound))
    assert bad == []


@pytest.mark.parametrize("cases", [attention, low_bit])
def test_edge_shapes_in_bf16(cases) -> None:
    found = [(name, error_of(result, wanted), bound) for name, result, wanted, bound in cases("cuda", BF16)]
    assert len(found) >= 30
    assert [(name, error, bound) for name, error, bound in found if not error <= bound] == []


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "window", "softcap"),
    [(32, 8, 128, None, None), (32, 8, 128, 1024, None), (9, 3, 64, None, None), (16, 8, 256, 512, 50.0)],
)
def test_attention_at_real_shapes(
    heads: int, groups: int, width: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    """Long decodes, whole prompts and chunks in one batch, against torch's own attention in fp32."""
    parts = [(4095, 1), (1000, 1), (17, 1), (0, 700), (1500, 300), (3000, 16)]
    stored, new = zip(*parts, strict=True)
    needed = [-(-(before + count) // 16) for before, count in parts]
    pages = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[pages.pop() for _ in range(count)] for count in needed]
    batch = AttentionBatch.build(stored, new, stored, tables, block_size=16, device="cuda")
    pool = random(2, sum(needed), 16, groups, width, dtype=dtype)
    q = random(sum(new), heads, width, dtype=dtype, seed=1)
    settings = {"scale": width**-0.5, "window": window, "softcap": softcap}
    out = paged_attention(q, pool[0], pool[1], batch, **settings)
    wide = pool.float()
    wanted = paged_attention(q.float(), wide[0], wide[1], batch, exact=True, **settings)
    assert error_of(out, wanted) < (2e-2 if dtype == BF16 else 2e-5)


@pytest.mark.parametrize("rows", [1, 8, 40, 300])
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (1000, 14336)])
def test_low_bit_at_real_shapes(rows: int, outputs: int, inputs: int) -> None:
    scheme = Scheme(4, 128)
    generator = torch.Generator("cuda").manual_seed(0)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator, device="cuda", dtype=torch.int8)
    weight = QuantTensor.from_codes(codes, random(outputs, inputs // 128, dtype=BF16).abs(), None, scheme)
    x = random(rows, inputs, dtype=BF16, seed=1)
    wanted = matmul_reference(x.float(), weight)
    assert error_of(low_bit_matmul(x, weight), wanted) < 1e-2 * wanted.abs().max().item()


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(3, 64, symmetric=False), Scheme(4, 16, dtype="nvfp4")])
def test_gptq_on_a_gpu_is_that_of_the_cpu(scheme: Scheme) -> None:
    """Codes may differ where a target lies half-way; the weighted error is the same."""
    found = []
    for device in ("cpu", "cuda"):
        x_NK = random(4096, 1024, dtype=F32).cpu() @ random(1024, 1024, dtype=F32, seed=1).cpu()
        weight = random(600, 1024, dtype=F32, seed=2).to(device)
        factor = factorise((x_NK.T @ x_NK).to(device))
        assert factor is not None
        codes, loss = quantize_rows(weight, fit_grid(weight, scheme, scale_dtype=F32), factor)
        found.append((codes.cpu(), loss.cpu()))
    (ours, loss), (theirs, other) = found
    assert (ours == theirs).float().mean() > 0.9
    torch.testing.assert_close(loss.sum(), other.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_hessian_on_a_gpu_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """Neither TF32 nor bf16 sums: both are wrong by 1e-3 or more."""
    hessian, batches = Hessian(700, "cuda"), [random(900, 700, dtype=dtype, seed=seed) for seed in range(3)]
    for x_NK in batches:
        hessian.update(x_NK)
    every_NK = torch.cat(batches).double()
    torch.testing.assert_close(hessian.result().double(), every_NK.T @ every_NK / 2700, rtol=1e-5, atol=1e-5)
