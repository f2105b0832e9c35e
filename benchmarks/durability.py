"""What durability costs: the share of a run spent in hashing the source, fsync, shards, journal, links and renames.

    python benchmarks/durability.py --model FOLDER --tokens IDS.safetensors [--out FILE]

Measured inside one run of GPTQ W4 g64 without evaluation, imports left out, so that a busy machine shifts both alike.
Hashing is counted in full, although it runs beside tokenizing. Writing the shards would be needed without any
durability, too; it is counted all the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import staging
from compress.core.checkpoint import Checkpoint
from compress.core.journal import Journal
from compress.core.recipe import parse_recipe
from compress.core.stage_writer import StageWriter
from compress.facts import environment
from compress.pipeline import RunOptions, run
from compress.workspace import Workspace

PARTS: tuple[tuple[Any, str], ...] = (
    (Checkpoint, "sha256"),
    (Journal, "__init__"),
    (StageWriter, "commit"),
    (StageWriter, "finish"),
    (staging, "export"),
    (Workspace, "publish"),
    (Workspace, "close"),
)


def clocked(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """`function`, adding its time to `seconds[name]`."""

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return timed


def measure(model: Path, tokens: Path) -> dict[str, Any]:
    """Seconds of one run, of each durable part, and their share."""
    seconds: dict[str, float] = {}
    for owner, name in PARTS:
        label = f"{getattr(owner, '__name__', owner)}.{name}"
        setattr(owner, name, clocked(getattr(owner, name), label, seconds))
    stage = {"quantize": {"method": "gptq", "scheme": "w4a16", "group_size": 64}}
    recipe = parse_recipe({"model": str(model), "calibration": {"dataset": str(tokens)}, "stages": [stage]})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = run(recipe, RunOptions(Path(folder) / "out"))
        total = time.perf_counter() - started
    return {
        "model": model.name,
        "total_seconds": round(total, 3),
        "parts_seconds": {name: round(value, 3) for name, value in sorted(seconds.items())},
        "share": round(sum(seconds.values()) / total, 4),
        "blocks": len(result.summary["stages"][0]["blocks"]),
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    text = json.dumps(measure(asked.model.absolute(), asked.tokens.absolute()), indent=1) + "\n"
    if asked.out:
        asked.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
