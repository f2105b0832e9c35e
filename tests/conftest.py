"""Fixtures for all tests: tiny models of every family, and the data folder that lies beside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with models and text for tests of quality; absent on most machines."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """tiny_model(family, odd=False, dtype="float32") -> folder, built once per session. Treat it as read-only."""
    built: dict[tuple[str, bool, str], Path] = {}

    def get(family: str = "llama", odd: bool = False, dtype: str = "float32") -> Path:
        import torch

        from tests.tiny import build

        key = family, odd, dtype
        if key not in built:
            folder = tmp_path_factory.mktemp("tiny") / f"{family}-{'odd' if odd else 'plain'}-{dtype}"
            built[key] = build(folder, family, odd, getattr(torch, dtype))
        return built[key]

    return get
