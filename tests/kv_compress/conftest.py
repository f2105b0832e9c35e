"""The machine's dtype, as tests want it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compress.core import numerics

RuntimeHolds = Callable[[str], None]


@pytest.fixture
def runtime_holds(monkeypatch: pytest.MonkeyPatch) -> RuntimeHolds:
    """runtime_holds("float32" or "bfloat16"): what the runtime computes in by itself, as on some CPU, without a GPU."""

    def hold(dtype: str) -> None:
        monkeypatch.setattr(numerics, "fast_on_cpu", lambda _: dtype == "bfloat16")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return hold
