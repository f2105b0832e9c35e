"""One fork server for the suite, and one uninterrupted run to compare with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest

from compress.core.files import sha256_file
from tests.crash.trace import Call, read_trace

REPOSITORY = Path(__file__).resolve().parents[2]
STORY = (
    "Once upon a time a small fox found a red kite in the tall grass. It flew over the hill and the fox ran after it. "
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code or minus a signal, its error, blocks that it began to write, its system calls."""

    code: int
    message: str
    commits: int
    calls: list[Call] = field(default_factory=list)


class ForkServer:
    """Talks to tests/crash/server.py. Every run gets a folder of its own: `tree(name)`, whose only output is `out`."""

    def __init__(self, folder: Path, name: str, cwd: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.name = name
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        everywhere = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | everywhere | environment,
            cwd=cwd,
        )
        self._ask({**self._files("warm"), "output": str(self.tree("warm") / "out")})

    def tree(self, name: str) -> Path:
        folder = self.folder / "trees" / f"{self.name}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, tree: Path, *, inject: str = "", trace: bool = False, **more: object) -> Outcome:
        """Run with output `tree/out`; `inject` is strace's expression, e.g. rename:signal=KILL:when=3."""
        files = self._files(tree.name)
        for path in (files["message"], files["commits"]):
            Path(path).unlink(missing_ok=True)
        log = self.folder / f"{tree.name}.strace"
        request = {**files, "output": str(tree / "out"), **more}
        if trace or inject:
            request |= {"trace": str(log), "inject": inject}
        answer = self._ask(request)
        message, commits = Path(files["message"]), Path(files["commits"])
        return Outcome(
            answer["code"],
            message.read_text() if message.exists() else "",
            commits.stat().st_size if commits.exists() else 0,
            read_trace(log, answer["pid"], tree) if trace else [],
        )

    def close(self) -> None:
        self._process.communicate()

    def _files(self, name: str) -> dict[str, str]:
        place = self.folder / f"{self.name}-{name}"
        return {"folder": str(self.folder), "message": f"{place}.message", "commits": f"{place}.commits"}

    def _ask(self, request: dict[str, object]) -> dict[str, int]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the fork server has no pipes")
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server died with {self._process.wait()}")
        return json.loads(line)


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """A folder in memory where there is one: kills do not care about the disk, and hundreds of runs fsync a lot."""
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else None) as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="session")
def servers(workplace: Path) -> Iterator[list[ForkServer]]:
    """Two servers for two cores. They differ in all that must not matter: folder, locale, time zone, hash seed."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    from tests import tiny

    folder = workplace
    with patch.dict(tiny.COMMON, num_hidden_layers=2):
        tiny.build(folder / "model", "llama")
    (folder / "text.txt").write_text(STORY * 2)
    (folder / "short.txt").write_text(STORY[:60])
    plain = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
    other = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "4242", "PYTHONUTF8": "0"}
    servers = [ForkServer(folder, "a", REPOSITORY, plain), ForkServer(folder, "b", folder, other)]
    yield servers
    for server in servers:
        server.close()


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its SHA-256."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: its artifact's files, the names in its report, its calls by the name of the server."""

    artifact: dict[str, str]
    report: list[str]
    calls: dict[str, list[Call]]


@pytest.fixture(scope="session")
def reference(servers: list[ForkServer]) -> Reference:
    trees = {server.name: server.tree("reference") for server in servers}
    outcomes = {server.name: server.run(trees[server.name], trace=True) for server in servers}
    for name, tree in trees.items():
        assert outcomes[name].code == 0, outcomes[name].message
        assert sorted(path.name for path in tree.iterdir()) == ["out", "out.report"]
    tree = trees[servers[0].name]
    calls = {name: outcome.calls for name, outcome in outcomes.items()}
    require_same_work(calls, trees)
    return Reference(contents(tree / "out"), sorted(contents(tree / "out.report")), calls)


def require_same_work(calls: dict[str, list[Call]], trees: dict[str, Path]) -> None:
    """The servers change the same files in the same order; only what else they open may differ."""
    first, *others = (
        [(call.name, call.path.relative_to(trees[name])) for call in found] for name, found in calls.items()
    )
    assert all(other == first for other in others)
