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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the skips that count as failures where everything a test can need is promised to be there."""
    for reason in _broken_promises(terminalreporter):
        terminalreporter.write_line(f"skipped although COMPRESS_NO_SKIPS is set: {reason}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _broken_promises(reporter) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _broken_promises(reporter: pytest.TerminalReporter) -> list[str]:
    """Reasons of skipped tests that miss something ("needs …"), if COMPRESS_NO_SKIPS forbids such skips."""
    if not os.environ.get("COMPRESS_NO_SKIPS"):
        return []
    reasons = [str(report.longrepr[2]) for report in reporter.stats.get("skipped", [])]
    return [reason for reason in reasons if "needs" in reason]
