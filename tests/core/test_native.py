"""The C kernels of the solvers against their twins in torch."""

from collections.abc import Iterator

import pytest
import torch

from compress.core import native
from compress.core.grid import Clip, Grid, fit_grid
from compress.core.scheme import Scheme
from compress.core.solve import factorise
from quantize._sweep import quantize_rows

SCHEMES = [Scheme(4, 32), Scheme(3, 64, symmetric=False), Scheme(2, -1), Scheme(8, 16, symmetric=False), Scheme(8, 48)]
SCHEMES += [Scheme(4, 32, dtype="mxfp4"), Scheme(4, 16, dtype="nvfp4")]
NF4 = Scheme(4, 64, dtype="nf4")

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


@pytest.fixture(params=["C", "torch"])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    yield request.param


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


def weights(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def hessian(width: int) -> torch.Tensor:
    x_NK = weights(3 * width, width, seed=1) @ (torch.eye(width) + weights(width, width, seed=2) * 4)
    return x_NK.T @ x_NK


def plain_grid(weight: torch.Tensor, scheme: Scheme) -> Grid:
    return fit_grid(weight, scheme, scale_dtype=torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 31, 32, 200])
@pytest.mark.parametrize("keep_zeros", [False, True])
def test_the_sweep_is_that_of_torch(
    scheme: Scheme, rows: int, keep_zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 192 if scheme.group_size != 48 else 144
    factor = factorise(hessian(width))
    assert factor is not None
    zero = weights(rows, width, seed=4) > 0
    ours, theirs = (weights(rows, width).masked_fill(zero, 0) for _ in range(2))
    grid = plain_grid(ours, scheme)
    codes, loss = quantize_rows(ours, grid, factor, keep_zeros=keep_zeros)
    assert bool((ours[zero] == 0).all()) is (keep_zeros or not bool(zero.any()))
    in_torch(monkeypatch)
    expected_codes, expected_loss = quantize_rows(theirs, grid, factor, keep_zeros=keep_zeros)
    # a target half-way between two codes may fall either way, and moves what follows in its row
    same = (codes == expected_codes).all(1)
    assert same.float().mean() >= 0.97
    torch.testing.assert_close(ours[same], theirs[same], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss[same], expected_loss[same], rtol=1e-4, atol=1e-9)


def test_threads_change_no_bit() -> None:
    factor = factorise(hessian(256))
    assert factor is not None
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weight = weights(700, 256)
            scale = torch.full((700, 8), 0.01)
            error = native.rounding_error(weight.view(700, 8, 32), scale, None, None, (-8, 7), cubed=False)
            grid = plain_grid(weight, SCHEMES[0])
            columns = torch.arange(128)
            blank = torch.zeros(128, 700)
            codes, loss = torch.zeros((256, 700), dtype=torch.int8), torch.zeros(700)
            native.sweep_block(
                target_BR=weight.t()[:128].contiguous(),
                original_BR=weight.t()[:128].contiguous(),
                feedback_BB=factor.feedback_KK[:128, :128].t().contiguous(),
                scale_GR=grid.scale.t().contiguous(),
                zero_GR=None,
                group_B=columns // 32,
                channel_B=columns,
                cost_B=factor.diagonal_K[:128].square(),
                levels=(-8, 7),
                error_BR=blank,
                codes_KR=codes,
                loss_R=loss,
                keep_zeros=False,
            )
            found.append((error, blank, codes, loss))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("scheme", [*SCHEMES, NF4], ids=str)
@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("cubed", [False, True])
def test_the_grid_search_is_that_of_torch(
    scheme: Scheme, important: bool, cubed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 192 if scheme.group_size != 48 else 130  # not a multiple: the last group is padded
    weight, importance = weights(50, width), weights(1, width, seed=3)[0].square() if important else None
    clip = Clip(cubed=cubed)
    found = fit_grid(weight, scheme, scale_dtype=torch.bfloat16, clip=clip, importance_K=importance)
    in_torch(monkeypatch)
    expected = fit_grid(weight, scheme, scale_dtype=torch.bfloat16, clip=clip, importance_K=importance)
    assert (found.scale == expected.scale).float().mean() > 0.99  # but for ties between two spans
    if found.zero is not None and expected.zero is not None:
        assert (found.zero == expected.zero).float().mean() > 0.99


def test_identity_is_a_digest_or_torch(twin: str) -> None:
    assert (native.identity() == "torch") == (twin == "torch")
    assert len(native.identity()) in (5, 24)
