"""`compress export` on the command line."""

from pathlib import Path

import torch

from compress.core.scheme import Scheme
from tests.cli.conftest import Call
from tests.quantized_folders import write_quantized


def source(tmp_path: Path) -> Path:
    return write_quantized(tmp_path / "in", Scheme(4, 32), tied=True, dtype=torch.bfloat16).path


def test_export_says_what_it_wrote_and_who_loads_it(call: Call, tmp_path: Path) -> None:
    folder, output = source(tmp_path), tmp_path / "out"
    shown = call("export", folder, "--format", "gptq", "--output", output, "--dry-run")
    assert shown.code == 0
    assert "nothing was written" in shown.out
    assert not output.exists()
    called = call("export", folder, "--format", "gptq", "--output", output)
    assert called.code == 0
    assert "vLLM" in called.out and f"{output}: gptq" in called.out.replace("\n", "")
    assert call("verify", output).code == 0
    again = call("export", folder, "--format", "awq", "--output", output)
    assert again.code == 2 and "output exists" in again.err


def test_json(call: Call, tmp_path: Path) -> None:
    called = call("export", source(tmp_path), "--format", "gguf", "--output", tmp_path / "out", "--json")
    summary = called.objects[-1]
    assert (summary["command"], summary["exit_code"], summary["format"]) == ("export", 0, "gguf")
    assert summary["bytes"] > 1000
    assert {verdict["engine"]: verdict["ok"] for verdict in summary["preflight"]}["llama.cpp"] == "yes"


def test_refusals(call: Call, tmp_path: Path) -> None:
    folder = source(tmp_path)
    unknown = call("export", folder, "--format", "gptk", "--output", tmp_path / "out")
    assert unknown.code == 2 and "unknown format 'gptk'" in unknown.err
    missing = call("export", tmp_path / "none", "--format", "gptq", "--output", tmp_path / "out")
    assert missing.code == 2 and "no such folder" in missing.err
    held = call("export", folder, "--format", "bitsandbytes", "--output", tmp_path / "out")
    assert held.code == 3 and "only nf4 is written" in held.err.replace("\n", " ")
    shards = call("export", folder, "--format", "gptq", "-o", tmp_path / "out", "--tensor-parallel", "0")
    assert shards.code == 2
