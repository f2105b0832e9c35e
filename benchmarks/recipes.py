"""Every shipped recipe on the bundled model: size, quality, and what the plan said against what it took.

    python benchmarks/recipes.py --work DIR [--only NAME ...] [--out FILE]

Calibration and evaluation are the bundled stories, so that no recipe needs the hub; all else is as shipped. Minutes and
memory are those of the stages, without start-up and evaluation, as in the plan.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import tools

RECIPES = tools.REPOSITORY / "recipes"
STORIES = ["calibration.dataset=demo", "calibration.samples=32", "calibration.length=256"]
EVALUATED = [
    "evaluate.perplexity.dataset=demo",
    "evaluate.perplexity.window=256",
    "evaluate.perplexity.stride=null",
    "evaluate.perplexity.documents=true",
]


def measure(name: str, work: Path, threads: int) -> dict[str, object]:
    output = work / name
    for leftover in (output, Path(f"{output}.report"), Path(f"{output}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    changes = list(EVALUATED)
    if "\ncalibration:" in (RECIPES / f"{name}.yaml").read_text():
        changes += STORIES
    command = [sys.executable, "-m", "compress", "run", "--recipe", name, "--model", "demo", "--output", str(output)]
    for change in changes:
        command += ["--set", change]
    done = subprocess.run([*command, "--quiet"], env=tools.quiet_environment(threads), check=False)
    if done.returncode not in (0, 5):
        raise SystemExit(f"recipes: {name} ended with {done.returncode}")
    run = json.loads((Path(f"{output}.report") / "run.json").read_text())
    evaluation = run["evaluation"]
    stages = run["stages"]
    return {
        "recipe": name,
        "bytes_in": run["source"]["bytes"],
        "bytes_out": run["artifact"]["bytes"],
        "bits_per_weight": run["artifact"]["bits_per_weight"],
        "perplexity": evaluation["perplexity"],
        "kl": evaluation["kl"]["mean"],
        "planned": {"minutes": run["plan"]["minutes"], "peak_memory_bytes": run["plan"]["peak_memory_bytes"],
                    "bytes": run["plan"]["bytes"]},
        "measured": {"minutes": sum(stage["seconds"] for stage in stages) / 60,
                     "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "recipes.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    found = []
    for name in asked.only:
        found.append(measure(name, asked.work.resolve(), asked.threads))
        print(json.dumps(found[-1]), flush=True)
    environment = tools.describe_machine() | {"threads": asked.threads}
    asked.out.write_text(json.dumps({"environment": environment, "model": "demo", "recipes": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
