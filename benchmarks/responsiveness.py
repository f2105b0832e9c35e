"""How long the command line keeps a person waiting: start-up, the first error of a wrong recipe, verify in MB/s.

    python benchmarks/responsiveness.py [--artifact DIR] [--runs 9] [--out FILE]

Every command runs in a fresh process; medians of wall time and of processor time. An artifact is verified with warm
caches; its MB/s are those of the command less the start-up of `compress verify --help` with torch imported.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import tools
from measurement import measure

WRONG = "model: demo\nstages:\n  - quantize: {method: gptq, group_sise: 64}\n"
COMPRESS = [sys.executable, "-m", "compress"]


def wait(command: list[str], runs: int, environment: dict[str, str], wanted_exit: int = 0) -> dict[str, float]:
    """Medians of `runs` after one that warms the caches."""
    with Path(os.devnull).open("wb") as log:
        measured = [measure(command, environment, log) for _ in range(runs + 1)][1:]
    if any(run.exit_code != wanted_exit for run in measured):
        raise SystemExit(f"{' '.join(command)} did not end with {wanted_exit}")
    return {
        "seconds": round(median(run.seconds for run in measured), 3),
        "cpu_seconds": round(median(run.cpu_seconds for run in measured), 3),
    }


def verify(artifact: Path, runs: int, environment: dict[str, str]) -> dict[str, float]:
    size = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    whole = wait([*COMPRESS, "verify", str(artifact)], runs, environment)
    imports = wait([sys.executable, "-c", "import torch, compress.core.verify"], runs, environment)
    seconds = whole["seconds"] - imports["seconds"]
    return {"bytes": size, **whole, "seconds_after_imports": seconds, "mb_per_second": round(size / 1e6 / seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="a folder that a run wrote; a large one says more")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "responsiveness.json")
    asked = parser.parse_args()
    environment = tools.quiet_environment(2)
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text(WRONG)
        results: dict[str, object] = {
            "python -c pass": wait([sys.executable, "-c", "pass"], asked.runs, environment),
            "compress --help": wait([*COMPRESS, "--help"], asked.runs, environment),
            "compress recipes list": wait([*COMPRESS, "recipes", "list"], asked.runs, environment),
            "compress recipes validate": wait([*COMPRESS, "recipes", "validate", "demo-w4"], asked.runs, environment),
            "wrong recipe": wait([*COMPRESS, "run", "--recipe", str(wrong)], asked.runs, environment, wanted_exit=2),
        }
    if asked.artifact:
        results["compress verify"] = verify(asked.artifact, 3, environment)
    text = json.dumps({"environment": tools.describe_machine(), **results}, indent=2) + "\n"
    asked.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
