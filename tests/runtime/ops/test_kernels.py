"""Triton kernels without a GPU: against the references in the interpreter, and compiled for GPUs that are elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EDGE_SHAPES = 30
SHARED_BYTES = 99 * 1024  # what a program can have on every GPU since sm_80

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which the test extra installs")


def lines_of(module: str, *arguments: str, folder: Path, interpret: bool) -> list[dict]:
    """The lines of JSON that a module of this folder prints, in a process whose triton is of one kind."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", f"tests.runtime.ops.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "kernels",
    [("attention",), ("coded",), ("frames",), ("low_bit",), ("sweep",), ("kv_store", "norm", "rotary")],
    ids="-".join,
)
def test_kernels_agree_with_their_references(kernels: tuple[str, ...], tmp_path: Path) -> None:
    lines = lines_of("kernel_cases", *kernels, folder=tmp_path, interpret=True)
    assert [line for line in lines if not line["error"] <= line["bound"]] == []
    for kernel in kernels:
        assert len([line for line in lines if line["kernel"] == kernel]) >= EDGE_SHAPES


def test_pages_past_two_to_the_31_elements(tmp_path: Path) -> None:
    """32-bit offsets would wrap round and read, or write, somewhere else."""
    lines = lines_of("kernel_cases", "far_pages", folder=tmp_path, interpret=True)
    assert [line["case"] for line in lines] == ["attention, 1 segments", "attention, 2 segments", "store"]
    assert [line for line in lines if not line["error"] <= line["bound"]] == []


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path) -> None:
    lines = lines_of("compiled_kernels", str(capability), folder=tmp_path, interpret=False)
    assert len(lines) > 12
    for line in lines:
        assert line["cubin_bytes"] > 0 and line["shared_bytes"] <= SHARED_BYTES, line
        assert bool(line["tensor_cores"]) == line["dots"], line


def test_the_runtime_imports_without_triton() -> None:
    """A machine without a GPU has no triton: its import must be left to the first kernel."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from runtime import graphs
from runtime.ops import attention, kv_store, low_bit, norm, rotary
norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & {"pydantic", "transformers", "datasets", "triton"} - {"triton"}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
