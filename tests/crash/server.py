"""The fork server of the crash suite: imports once, then forks a run per request, under strace if asked.

Requests and answers are JSON lines on standard input and output. A child that strace is to watch waits on a pipe until
strace is attached, so that the count of its system calls starts at the same place in every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from compress.core import native, stage_writer
from compress.core.errors import CompressError
from compress.core.recipe import Calibration, Evaluation, Perplexity, Recipe, Stage
from compress.pipeline import RunOptions, run
from quantize.gptq import GPTQ
from tests.fake_passes import Shrink

CALLS = "openat,open,creat,write,pwrite64,ftruncate,rename,renameat,renameat2,fsync,fdatasync,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat"  # noqa: E501
_ATTACH_SECONDS = 20

native.identity()  # kernels are compiled, or taken from the cache, before the first fork


def recipe_of(folder: str) -> Recipe:
    """Two stages over a tiny model: a dense one that stays in fp32, then GPTQ; with an evaluation."""
    text, short = str(Path(folder) / "text.txt"), str(Path(folder) / "short.txt")
    return Recipe(
        model=str(Path(folder) / "model"),
        calibration=Calibration(dataset=text, samples=4, length=32),
        stages=(
            Stage(kind="prune", method="shrink", settings=Shrink()),
            Stage(kind="quantize", method="gptq", settings=GPTQ(group_size=16)),
        ),
        evaluate=Evaluation(perplexity=Perplexity(dataset=short, window=32)),
    )


def execute(request: dict[str, Any]) -> int:
    """What the command line does with a run: 0, or the error's exit code."""
    try:
        run(recipe_of(request["folder"]), RunOptions(Path(request["output"]), fresh=request.get("fresh", False)))
    except CompressError as error:
        Path(request["message"]).write_text(str(error))
        return error.exit_code
    return 0


def count_commits(path: Path) -> None:
    """Leave a byte in `path` for each block that is begun to be written."""
    commit = stage_writer.StageWriter.commit

    def counted(self: Any, *arguments: Any) -> None:
        with open(path, "ab") as stream:
            stream.write(b".")
        commit(self, *arguments)

    stage_writer.StageWriter.commit = counted  # type: ignore[method-assign]


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say how the child ended: its exit code, or minus the signal that killed it."""
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(ready, 1)
        child(request)
    os.close(ready)
    tracer = attach(pid, request) if request.get("trace") else None
    os.write(go, b"x")
    os.close(go)
    _, status = os.waitpid(pid, 0)
    if tracer is not None:
        tracer.wait()
    return {"code": os.waitstatus_to_exitcode(status), "pid": pid}


def child(request: dict[str, Any]) -> None:
    """Run and leave without the server's own clean-up."""
    code = 1
    torch.set_num_threads(1)  # makes torch's thread pool anew; threads that find the server's would race for that
    try:
        count_commits(Path(request["commits"]))
        os.environ.update(request.get("environment", {}))
        time.tzset()
        os.chdir(request.get("cwd", "/"))
        code = execute(request)
    except BaseException as error:  # noqa: BLE001 - the outermost frame of a process of its own
        Path(request["message"]).write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def attach(pid: int, request: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = ["strace", "-f", "-y", "-s", "1", "-o", request["trace"], "-e", f"trace={CALLS}"]
    if request.get("only_path"):
        command += ["-P", request["only_path"]]
    if request.get("inject"):
        command += ["-e", f"inject={request['inject']}"]
    tracer = subprocess.Popen([*command, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + _ATTACH_SECONDS
    while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("strace could not attach")
        time.sleep(0.002)
    return tracer


def main() -> None:
    torch.set_num_threads(1)
    # One run here imports whatever is imported late, so that the children only read and write what is theirs.
    warm = json.loads(sys.stdin.readline())
    if execute(warm) != 0:
        raise SystemExit(Path(warm["message"]).read_text())
    print(json.dumps({"code": 0, "pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
