"""How long the command line keeps a person waiting: start-up, the first error of a wrong recipe, verify in MB/s.

    python benchmarks/responsiveness.py [--artifact DIR | --make 1b] [--runs 9] [--out FILE]

Every command runs in a fresh process; medians of wall time and of processor time. An artifact is verified with
warm caches, twice: as a command, and in a process that has its imports behind it. The MB/s are of the latter, over all
checks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import tools
from make_models import SHAPES
from measurement import measure

WRONG = "model: demo\nstages:\n  - quantize: {method: gptq, group_sise: 64}\n"
CHECK = """
import json, sys, time
import torch, compress.core.formats.compressed_tensors
from compress.core import _verify_coverage, _verify_shapes, _verify_weights, verify
wall, cpu = time.perf_counter(), time.process_time()
report = verify.verify(sys.argv[1])
took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
contents = next(check.seconds for check in report.checks if check.name == "contents")
if not report.ok:
    sys.exit("the artifact does not pass")
print(json.dumps({**took, "contents_seconds": contents}))
"""
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


def check(artifact: Path, runs: int, environment: dict[str, str]) -> dict[str, object]:
    """The whole command, and the checking alone: timed within a fresh process that has imported all it needs."""
    size = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    whole = wait([*COMPRESS, "verify", str(artifact)], runs, environment)
    command = [sys.executable, "-c", CHECK, str(artifact)]
    outputs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(runs)
    ]
    timed = [json.loads(output) for output in outputs]
    seconds = median(one["seconds"] for one in timed)
    return {
        "bytes": size,
        "command": whole,
        "checks": {
            "seconds": round(seconds, 3),
            "cpu_seconds": round(median(one["cpu_seconds"] for one in timed), 3),
            "contents_seconds": round(median(one["contents_seconds"] for one in timed), 3),
            "mb_per_second": round(size / 1e6 / seconds),
        },
    }


def make_artifact(shape: str, folder: Path, environment: dict[str, str]) -> Path:
    """A random model of this shape, rounded to 4 bits."""
    model, artifact, recipe = folder / "model", folder / "artifact", folder / "rtn.yaml"
    recipe.write_text(f"model: {model}\nstages:\n  - quantize: {{method: rtn, scheme: w4a16, group_size: 64}}\n")
    make = [sys.executable, str(tools.HERE / "make_models.py"), shape, str(model)]
    run = [*COMPRESS, "run", "--quiet", "--recipe", str(recipe), "--output", str(artifact)]
    for command in (make, run):
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    artifacts = parser.add_mutually_exclusive_group()
    artifacts.add_argument("--artifact", type=Path, help="a folder that a run wrote; a large one says more")
    artifacts.add_argument("--make", choices=tuple(SHAPES), help="make one of this shape in a temporary folder")
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
        artifact = make_artifact(asked.make, Path(folder), environment) if asked.make else asked.artifact
        if artifact:
            results["compress verify"] = check(artifact, 5, environment)
    text = json.dumps({"environment": tools.describe_machine(), **results}, indent=2) + "\n"
    asked.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
