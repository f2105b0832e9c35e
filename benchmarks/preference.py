"""What preference recovery does to 3-bit weights: flips, KL divergence and perplexity before and after.

    python benchmarks/preference.py --data DIR [--pairs 256] [--threads 1]
    python benchmarks/preference.py --table      # print the table of what results/preference.json holds

GPTQ of tinystories-656k with 3 bits in groups of 64, by 128 rows of texts a and c, alone and with `preference` (DPO on
codes and scales, by TRL) behind it: both models answer the first 32 tokens of so many rows with up to 48 of the
likeliest tokens, and pairs of unequal answers are trained on. Scored are the artifacts as they are deployed, decoded by
decode.py, on the first 200 stories of text b: the share of positions at which another token is the likeliest than the
original's (flips), mean KL divergence to the original in nats, perplexity. Minutes are those of the stage that trains,
beside other work where the load says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import tools
from quality import Workplace, score_original
from recovery import W3
from training_text import training_text

MODEL = "tinystories-656k"
PREFER = {"method": "preference", "prompt_tokens": 32, "new_tokens": 48, "batch": 8, "save_every": 1000}
CASES: dict[str, dict[str, object] | None] = {
    "W3 g64": None,
    "8 pairs a step": {},
    "2 pairs a step, twice": {"batch": 2, "epochs": 2},
}


def measure(label: str, changes: dict[str, object] | None, place: Workplace, pairs: int) -> dict[str, object]:
    from perplexity import score

    output = place.root / MODEL / label.replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(Path(f"{output}.report"), ignore_errors=True)
    stages = [W3] if changes is None else [W3, {"distill": PREFER | {"pairs": pairs} | changes}]
    recipe = {
        "model": str(place.model(MODEL)),
        "calibration": {"dataset": str(training_text(place, MODEL))},
        "stages": stages,
    }
    written = Path(f"{output}.json")
    written.write_text(json.dumps(recipe))
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "compress", "run", "--recipe", str(written), "--output", str(output), "--quiet"]
    subprocess.run(command, env=tools.quiet_environment(place.threads), check=True)
    found = score(output, place.model(MODEL), place.evaluation(MODEL))
    run = json.loads((Path(f"{output}.report") / "run.json").read_text())
    trained = [stage for stage in run["stages"] if stage["kind"] == "distill"]
    minutes = sum(stage["seconds"] / 60 for stage in trained)
    scores = {"perplexity": found.perplexity, "kl": found.kl, "flips": found.flips}
    return {"case": label, "settings": changes, **scores, "minutes": minutes, "load_before": load}


def run(asked: argparse.Namespace) -> None:
    place = Workplace(asked.work.resolve(), asked.data.resolve(), asked.threads)
    place.evaluation(MODEL)
    score_original(MODEL, place)
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine() | {"threads": asked.threads},
        "training": PREFER | {"pairs": asked.pairs},
        "original": json.loads((place.root / MODEL / "original.json").read_text())["perplexity"],
        "cases": [],
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if earlier.get("training") == results["training"]:
        results["cases"] = [case for case in earlier["cases"] if case["case"] in CASES]
    for label, changes in CASES.items():
        if label in [case["case"] for case in results["cases"]]:
            continue
        results["cases"].append(measure(label, changes, place, asked.pairs))
        print(json.dumps(results["cases"][-1]), flush=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    pairs = results["training"]["pairs"]
    lines = [
        f"| {MODEL}, {pairs} prompts | flips | KL to the original | perplexity | minutes |",
        "|---|--:|--:|--:|--:|",
        f"| original | | | {results['original']:.3f} | |",
    ]
    for case in results["cases"]:
        label = case["case"] if case["settings"] is None else f"with preference, {case['case']}"
        cells = [f"{100 * case['flips']:.2f} %", f"{case['kl']:.5f}", f"{case['perplexity']:.3f}"]
        cells.append("" if case["settings"] is None else f"{case['minutes']:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--pairs", type=int, default=256, help="prompts that are answered")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "preference")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "preference.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.data is None:
            parser.error("--data is needed (benchmarks/README.md says what it holds)")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
