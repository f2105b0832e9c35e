"""Where there is no GPU, everything here is skipped. `--json FILE` writes what came out."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import pytest

REASON = "no GPU here: `make gpu-test` runs these where there is one"
_started = time.time()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, help="write the outcome of each test to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    target = config.getoption("json", default=None)
    if target is None:
        return
    tests = [
        {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3)}
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    counts = {
        outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")
    }
    result = {"environment": _environment(), "seconds": round(time.time() - _started, 1), **counts, "tests": tests}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _environment() -> dict[str, str | None]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "torch": torch.__version__, "gpu": gpu}
