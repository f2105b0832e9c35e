"""How tests of the command line call it: in this process, through the outermost frame."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compress.cli.app import run_command


@dataclass(frozen=True)
class Called:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Standard output of --json: one object per line."""
        return [json.loads(line) for line in self.out.splitlines()]


Call = Callable[..., Called]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call("recipes", "list") -> Called. The terminal has 80 columns and no colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str | Path) -> Called:
        capsys.readouterr()
        code = run_command([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A sound recipe that names a model that is not there."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: no/model\nstages:\n  - quantize: {method: rtn, scheme: w4a16, group_size: 32}\n")
    return path
