"""2:4 weights on a GPU: what torch packs gives the dense layer's outputs, and is taken where it was measured faster."""

from __future__ import annotations

import pytest
import torch

from runtime.layers import sparse
from runtime.layers.dense import DenseLinear
from runtime.layers.gpu_timing import layer_milliseconds
from runtime.layers.semi_structured import SemiStructuredLinear, has_sparse_cores
from runtime.layers.sparse import FASTER, ROWS, Packer, measured

BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(BF16)


def two_of_four(outputs: int, inputs: int) -> torch.Tensor:
    fours = random(outputs, inputs).view(-1, 4)
    return fours.scatter(1, fours.abs().topk(2, 1, largest=False).indices, 0).view(outputs, inputs)


@pytest.fixture(autouse=True)
def cores() -> None:
    if not has_sparse_cores("cuda"):
        pytest.skip("this GPU has no sparse tensor cores")


def layers(outputs: int, inputs: int, bias: bool = False) -> tuple[DenseLinear, SemiStructuredLinear]:
    weight, added = two_of_four(outputs, inputs), random(outputs, seed=1) if bias else None
    dense = DenseLinear(weight, added, BF16)
    try:
        return dense, SemiStructuredLinear(weight, added)
    except RuntimeError as error:
        pytest.skip(f"this torch cannot pack 2:4 weights: {str(error).splitlines()[0]}")


@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(512, 256, False), (4096, 4096, True), (2048, 8192, False)])
@torch.inference_mode()
def test_packed_outputs_are_the_dense_ones(outputs: int, inputs: int, bias: bool) -> None:
    dense, packed = layers(outputs, inputs, bias)
    for rows in (1, 3, 8, 17, 300):
        x = random(rows, inputs, seed=rows)
        wanted = x.double() @ dense.weight.double().T + (dense.bias.double() if bias else 0)
        found = packed(x)
        assert found.shape == (rows, outputs) and found.dtype == BF16
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-2
        torch.testing.assert_close(packed(x.view(1, rows, inputs))[0], found)


def test_the_dense_weight_is_not_kept() -> None:
    dense, packed = layers(4096, 4096)
    assert packed.bytes <= 0.6 * dense.bytes
    assert all(buffer.data_ptr() != dense.weight.data_ptr() for buffer in packed.buffers())


@torch.inference_mode()
def test_a_captured_product_is_that_of_a_call() -> None:
    _, packed = layers(1024, 1024)
    x, stream = random(8, 1024), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        packed(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed(x)
    x.copy_(random(8, 1024, seed=5))
    graph.replay()
    torch.testing.assert_close(found, packed(x))


def test_times_are_times() -> None:
    dense, _ = layers(8192, 8192)
    few, many = layer_milliseconds(dense, random(1, 8192)), layer_milliseconds(dense, random(8192, 8192))
    assert 0 < few < many


def test_the_choice_is_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, packed = layers(4096, 4096)
    found = measured(dense, packed)
    assert set(found.against_dense) == set(ROWS) and all(ratio > 0 for ratio in found.against_dense.values())
    mean = torch.tensor(list(found.against_dense.values())).log().mean().exp().item()
    assert (found.form == "2:4") == (mean <= FASTER)
    for limit, kind in ((1e9, SemiStructuredLinear), (0.0, DenseLinear)):
        monkeypatch.setattr(sparse, "FASTER", limit)
        layer = Packer().pack(DenseLinear(dense.weight, None, BF16))
        assert type(layer) is kind
        assert layer.packing is not None and bool(layer.packing.form) == (kind is SemiStructuredLinear)


def test_other_patterns_stay_dense() -> None:
    weight = two_of_four(512, 512).roll(1, 1)
    layer = Packer().pack(DenseLinear(weight, None, BF16))
    assert type(layer) is DenseLinear
    assert layer.packing is not None and layer.packing.reason == "zeros do not lie in 2:4"
