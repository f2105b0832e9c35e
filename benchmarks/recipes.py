"""Every shipped recipe on the bundled model: size, quality, and what the plan said against what it took.

    python benchmarks/recipes.py --work DIR [--only NAME ...] [--out FILE]

Calibration and evaluation are the bundled stories, so that no recipe needs the hub; all else is as shipped. Minutes
and memory are those of the stages, without start-up and evaluation, as in the plan. Recipes that are not asked for keep
the figures that they have in FILE.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tools

from compress.cli.shipped import shipped_recipes

STORIES = ["calibration.dataset=demo", "calibration.samples=32", "calibration.length=256"]
UNFIT = (
    "experts-25",  # the bundled model has none
    "hidden-12",  # an eighth of its 256 channels is less than the recipe's step of 64
    "vocabulary-25",  # perplexities of other tokens say nothing
    *("channels-distill", "prune-distill-quantize", "gradual", "distill-into-smaller"),  # too little text to train on
)
EVALUATED = [
    "evaluate.perplexity.dataset=demo",
    "evaluate.perplexity.window=256",
    "evaluate.perplexity.stride=null",
    "evaluate.perplexity.documents=true",
]


def measure(
    name: str, work: Path, threads: int, *, model: str = "demo", settings: Sequence[str] = (), label: str = ""
) -> dict[str, object]:
    """One recipe's figures, calibrated and scored on the bundled stories; `settings` change it."""
    output = work / (label or name)
    for leftover in (output, Path(f"{output}.report"), Path(f"{output}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    changes = [*EVALUATED, *settings]
    if "\ncalibration:" in shipped_recipes()[name].read_text():
        changes += STORIES
    command = [sys.executable, "-m", "compress", "run", "--recipe", name, "--model", model, "--output", str(output)]
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


def _all() -> list[str]:
    return [name for name in shipped_recipes() if name not in UNFIT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=_all())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "recipes.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(asked.out.read_text())["recipes"] if asked.out.exists() else []
    found = {entry["recipe"]: entry for entry in known if entry["recipe"] in shipped_recipes()}
    environment = tools.describe_machine() | {"threads": asked.threads}
    for name in asked.only:
        found[name] = measure(name, asked.work.resolve(), asked.threads)
        print(json.dumps(found[name]), flush=True)
        results = {"environment": environment, "model": "demo", "recipes": [found[key] for key in sorted(found)]}
        asked.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
