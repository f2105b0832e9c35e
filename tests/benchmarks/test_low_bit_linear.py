"""The benchmark of linear layers measures every scheme that a shape takes, and its table has a line for each."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_layer_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import low_bit_linear

    monkeypatch.setattr(low_bit_linear, "MOST_COPIES", 2)
    case = low_bit_linear.measure((16, 128), 1, 1, torch.Generator().manual_seed(0))
    assert len(case["layers"]) == 2 + 2 * len(low_bit_linear.SCHEMES)
    assert all(0 < time < 1e5 for layer in case["layers"].values() for time in layer["ms"].values())
    lines = low_bit_linear.table({"cases": [case]}).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(case["layers"])
