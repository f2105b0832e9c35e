"""What distillation wins back of what pruning lost, beside plain fine-tuning on as many tokens.

    python benchmarks/distillation.py --data DIR [--models stories-7m tinystories-656k] [--tokens 2400000] [--threads 2]
    python benchmarks/distillation.py --table       # print the table of what results/distillation.json holds

A quarter of the feed-forward channels go (OSSCAR), then the rest is trained: towards the original (forward KL and
hidden states), on the text alone (cross entropy), or on half of each, with the same settings, the same rows of texts a
and c in the same order. Scored are the first 200 stories of text b, as in quality.py. `won back` is the share of the
bits per byte that pruning lost. Minutes are those of the training stage, beside other work where the load says so. All
texts are training text of stories-7m.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tools
from quality import Workplace, score_original
from training_text import LOOKED_AT, training_text

PRUNE = {"prune": {"method": "channels", "ratio": 0.25, "samples": LOOKED_AT}}
TRAINING = {"batch": 8, "final": 0.0, "precision": "bf16", "save_every": 1000}
LEARNING_RATES = {"stories-7m": 2e-4, "tinystories-656k": 1e-3, "demo": 5e-4}
CASES = {
    "pruned": [PRUNE],
    "fine-tuned": [PRUNE, {"distill": {"method": "logits", "cross_entropy": 1.0, **TRAINING}}],
    "distilled": [PRUNE, {"distill": {"method": "features", **TRAINING}}],
    "half of each": [PRUNE, {"distill": {"method": "features", "cross_entropy": 0.5, **TRAINING}}],
}


def stages(case: str, model: str, tokens: int) -> Iterator[dict[str, object]]:
    training = {"tokens": tokens, "learning_rate": LEARNING_RATES[model]}
    for stage in CASES[case]:
        yield {kind: settings | (training if kind == "distill" else {}) for kind, settings in stage.items()}


def measure(model: str, case: str, place: Workplace, tokens: int) -> dict[str, object]:
    from perplexity import score

    output = place.root / model / case
    for leftover in (output, Path(f"{output}.report"), Path(f"{output}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    recipe = {
        "model": str(place.model(model)),
        "calibration": {"dataset": str(training_text(place, model))},
        "stages": list(stages(case, model, tokens)),
    }
    load = os.getloadavg()[0]
    written = Path(f"{output}.json")
    written.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "compress", "run", "--recipe", str(written), "--output", str(output), "--quiet"]
    subprocess.run(command, env=tools.quiet_environment(place.threads), check=True)
    found = score(output, place.model(model), place.evaluation(model))
    run = json.loads((Path(f"{output}.report") / "run.json").read_text())
    trained = [stage["seconds"] / 60 for stage in run["stages"] if stage["kind"] == "distill"]
    figures = {"perplexity": found.perplexity, "kl": found.kl, "minutes": sum(trained), "load_before": load}
    return {"model": model, "case": case, "tokens": tokens if trained else 0, **figures}


def run(asked: argparse.Namespace) -> None:
    place = Workplace(asked.work.resolve(), asked.data.resolve(), asked.threads)
    found = []
    for model in asked.models:
        place.evaluation(model)
        score_original(model, place)
        for case in CASES:
            found.append(measure(model, case, place, asked.tokens))
            print(json.dumps(found[-1]), flush=True)
    originals = {model: json.loads((place.root / model / "original.json").read_text()) for model in asked.models}
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine() | {"threads": asked.threads},
        "training": TRAINING | {"learning_rate": {model: LEARNING_RATES[model] for model in asked.models}},
        "original": {model: record["perplexity"] for model, record in originals.items()},
        "cases": found,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    lines = ["| model | | tokens | perplexity | KL to the original | won back | minutes (load) |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for model, original in results["original"].items():
        cases = [case for case in results["cases"] if case["model"] == model]
        pruned = next(case["perplexity"] for case in cases if case["case"] == "pruned")
        lines.append(f"| {model} | original | | {original:.2f} | | | |")
        for case in cases:
            won = math.log(pruned / case["perplexity"]) / math.log(pruned / original)
            trained = f"{100 * won:.0f} % | {case['minutes']:.1f} ({case.get('load_before', 0):.0f}) |"
            figures = f"{case['perplexity']:.2f} | {case['kl']:.4f}"
            tokens = f"{case['tokens']:,}" if case["tokens"] else ""
            lines.append(f"| | {case['case']} | {tokens} | {figures} | {trained if case['tokens'] else '| |'}")
    return "\n".join([*lines, *(["", results["remark"]] if "remark" in results else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["stories-7m", "tinystories-656k"], choices=LEARNING_RATES)
    parser.add_argument("--tokens", type=int, default=2_400_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "distillation")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "distillation.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.data is None:
            parser.error("--data is needed (benchmarks/README.md says what it holds)")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
