"""Which layers of a masked model are packed, on a CPU by rule and on a GPU by measurement, and that they say so."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core.errors import UsageError
from compress.core.model_files import MASKED_KEY
from compress.core.zeros import in_two_of_four
from runtime.layers import dense, sparse
from runtime.layers.base import LinearLayer
from runtime.layers.bitmap import BitmapLinear
from runtime.layers.dense import DenseLinear
from runtime.layers.linear import make_linear
from runtime.layers.sparse import ROWS, Packer, choice, measured
from runtime.llm import LLM
from runtime.loader import load
from runtime.native.library import library
from tests.conftest import TinyModel
from tests.runtime._folders import edited, rewritten

needs_kernels = pytest.mark.skipif(
    library().loaded is None or not library().loaded.bitmap_served(), reason="no AVX-512 VBMI2 or gcc here"
)


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest of any four neighbours."""
    fours = weight.view(-1, 4)
    return (
        torch.zeros_like(fours).scatter(1, (at := fours.abs().topk(2, 1).indices), fours.gather(1, at)).view_as(weight)
    )


def test_every_pattern_of_four_and_of_eight() -> None:
    for bits in product((0, 1), repeat=8):
        weight = torch.tensor([bits], dtype=torch.bfloat16)
        assert in_two_of_four(weight) == (sum(bits[:4]) <= 2 and sum(bits[4:]) <= 2)
    assert not in_two_of_four(torch.zeros(2, 6))


# On a CPU


@pytest.fixture
def pruned(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama with all matrices of its blocks in 2:4 but one, half of which is zero somewhere."""
    monkeypatch.setattr(sparse, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(dense, "_FEW_WEIGHTS", 0)

    def prune(state: dict[str, Tensor]) -> None:
        for name, weight in state.items():
            if "_proj" in name:
                state[name] = two_of_four(weight)
        state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"].roll(1, 1)

    return rewritten(tiny_model("llama", dtype="bfloat16"), tmp_path / "pruned", prune, **{MASKED_KEY: True})


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_with_zeros_are_packed_and_give_the_same(pruned: Path, dtype: torch.dtype) -> None:
    packed, plain = (load(pruned, numerics="fast", dtype=dtype, sparse=asked) for asked in ("auto", "off"))
    kinds = {name: type(module).__name__ for name, module in packed.named_modules() if isinstance(module, LinearLayer)}
    assert list(kinds.values()).count("BitmapLinear") == 3 * 4
    assert kinds["head"] != "BitmapLinear", "the embedding is needed dense anyway"
    assert set(packed.packings) == {name for name, kind in kinds.items() if kind == "BitmapLinear"}
    assert {(each.form, round(each.zeros, 2)) for each in packed.packings.values()} == {("bitmap", 0.5)}
    assert plain.packings == {}
    for (name, ours), (_, theirs) in zip(packed.named_modules(), plain.named_modules(), strict=True):
        if isinstance(ours, BitmapLinear):
            x = torch.randn(5, ours.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
            wanted = theirs(x).float()
            assert float((ours(x).float() - wanted).norm() / wanted.norm()) < (
                1e-5 if dtype is torch.float32 else 1e-2
            ), name


@needs_kernels
def test_the_engine_says_the_same_packed(pruned: Path) -> None:
    """Through whole steps in C, too, which fp32 activations have."""
    prompts = [[5, 17, 200, 3], [9] * 40]
    answers = []
    for asked in ("auto", "off"):
        with LLM(pruned, dtype=torch.float32, sparse=asked) as llm:
            assert llm.engine.runner.whole is not None
            assert bool(llm.engine.runner.model.packings) == (asked == "auto")
            answers.append([one.token_ids for one in llm.generate(prompts, max_tokens=8, ignore_eos=True)])
    assert answers[0] == answers[1]


@needs_kernels
def test_what_stays_dense(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(pruned, numerics="exact").packings == {}
    plain = edited(pruned, tmp_path / "plain", {}, drop=[MASKED_KEY])
    assert load(plain, numerics="fast").packings == {}, "nobody says that its zeros were chosen"
    monkeypatch.setattr(sparse, "_LEAST_WEIGHTS", 1 << 30)
    found = load(pruned, numerics="fast").packings.values()
    assert {(each.form, each.reason) for each in found} == {("", "it is small")}
    few = torch.randn(64, 64).bfloat16()
    few[:, :20] = 0
    for weight, reason in ((few, "less than 45% of it are zeros"), (two_of_four(torch.randn(64, 64)), "no CPU kernel")):
        layer = Packer().pack(DenseLinear(weight, None, weight.dtype))
        assert isinstance(layer, DenseLinear) and layer.packing is not None
        assert layer.packing.form == "" and reason in layer.packing.reason
    assert Packer().pack(DenseLinear(torch.ones(64, 64), None, torch.bfloat16)).packing is None


def test_another_word_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="sparse is auto or off, not 'on'"):
        LLM(tiny_model("llama"), sparse="on")  # type: ignore[arg-type]


# On a GPU: what is decided there, with stand-ins for the GPU


class Stand(DenseLinear):
    """In place of the packed layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias, weight.dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time of a packed layer by its rows, in units of the dense one's."""
    times = dict.fromkeys(map(str, ROWS), 0.8) | {"measured": 0}

    def milliseconds(layer: torch.nn.Module, x: Tensor) -> float:
        times["measured"] += 1
        return times[str(len(x))] if isinstance(layer, Stand) else 1.0

    monkeypatch.setattr(sparse, "SemiStructuredLinear", Stand)
    monkeypatch.setattr(sparse, "has_sparse_cores", lambda device: True)
    monkeypatch.setattr(sparse, "layer_milliseconds", milliseconds)
    return times


def dense_layer(rows: int = 32, packs: bool = True) -> DenseLinear:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return make_linear(two_of_four(weight) if packs else weight, numerics="fast", dtype=torch.bfloat16)


def test_a_gpu_packs_what_is_faster_and_measures_each_shape_once(gpu: dict[str, float]) -> None:
    packer = Packer()
    for rows, measurements in ((32, 6), (32, 6), (64, 12)):
        packed, packing = packer._on_gpu(dense_layer(rows), 0.5)
        assert isinstance(packed, Stand) and packing.form == "2:4"
        assert packing.against_dense == dict.fromkeys(ROWS, 0.8)
        assert gpu["measured"] == measurements


def test_a_gpu_keeps_dense_what_is_not_faster_on_the_whole(gpu: dict[str, float]) -> None:
    gpu |= {"1": 1.4, "16": 1.1, "512": 0.7}  # mean 1.025
    layer = dense_layer()
    found, packing = Packer()._on_gpu(layer, 0.5)
    assert found is layer and packing.form == ""
    assert "packed takes 1.03 of the dense time" in packing.reason and packing.against_dense[512] == 0.7
    assert choice({1: 1.2, 16: 0.9, 512: 0.6}).form == "2:4"


def test_a_gpu_packs_nothing_that_is_wrong_or_unknown(gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, other = dense_layer(), dense_layer(packs=False)
    assert Packer()._on_gpu(other, 0.4)[1].reason == "zeros do not lie in 2:4"
    assert measured(layer, other).reason.startswith("packed it gives other outputs at 1 rows")

    def refused(*_: object) -> None:
        raise RuntimeError("cuSPARSELt not supported on your machine.\nmore")

    monkeypatch.setattr(sparse, "SemiStructuredLinear", refused)
    found, packing = Packer()._on_gpu(layer, 0.5)
    assert found is layer and packing.reason == "torch cannot pack it: cuSPARSELt not supported on your machine."
    monkeypatch.setattr(sparse, "has_sparse_cores", lambda device: False)
    assert "below compute capability 8.0" in Packer()._on_gpu(layer, 0.5)[1].reason
