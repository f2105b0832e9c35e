"""The benchmark of layers with zeros measures every form at every number of rows, and its table has a line for each."""

from pathlib import Path

import pytest
import torch

from runtime.native.library import library

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(
    library().loaded is None or not library().loaded.bitmap_served(), reason="no AVX-512 VBMI2 or gcc here"
)
def test_every_form_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sparse_linear

    monkeypatch.setattr(sparse_linear, "MOST_COPIES", 2)
    case = sparse_linear.measure((32, 128), [1, 16], 1, 1, 0)
    assert len(case["layers"]) == 2 + 2 * 5 + 4
    assert all(0 < time < 1e5 for layer in case["layers"].values() for time in layer["ms"].values())
    held = {name: layer["bytes"] / case["dense_bytes"] for name, layer in case["layers"].items()}
    assert 9 / 16 < held["bitmap 2:4, bf16"] < 0.7 and held["csr 50 %"] > 1.5
    for name, layer in case["layers"].items():
        rivals = {inputs: case["layers"][f"dense, {inputs}"]["ms"] for inputs in ("bf16", "fp32")}
        if name.startswith("bitmap"):
            assert layer["against_dense"][1] == pytest.approx(layer["ms"][1] / rivals[name[-4:]][1], rel=0.05)
        elif name.startswith("csr"):
            fastest = min(each[16] for each in rivals.values())
            assert layer["against_dense"][16] == pytest.approx(layer["ms"][16] / fastest, rel=0.05)
    lines = sparse_linear.table({"cases": [case]}).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(case["layers"])


def test_two_of_four_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sparse_linear

    weight = sparse_linear.sparse_weight((64, 96), None, torch.Generator().manual_seed(0))
    assert set((weight != 0).view(-1, 4).sum(1).tolist()) == {2}
