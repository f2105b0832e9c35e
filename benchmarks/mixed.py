"""The curve of mixed precision: bits per weight against KL divergence, beside one scheme for all layers.

    python benchmarks/mixed.py --work DIR [--models demo FOLDER ...] [--out FILE]

GPTQ in groups of 64, calibrated and scored on the bundled stories. The budgets are those of 2, 3 and 4 bits everywhere,
and some between them; with `vocabulary` embedding and head are in the choice, and the size is that of all tensors.
"""

import argparse
import json
from pathlib import Path

import tools

import recipes

GROUP = 64
UNIFORM = (2, 3, 4, 5)
BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.25, 5.25)
KEPT = ("bytes_out", "bits_per_weight", "perplexity", "kl")


def runs() -> dict[str, tuple[str, list[str]]]:
    """Label -> recipe and its changes."""
    stage = "stages[0].quantize"
    size = f"{stage}.group_size={GROUP}"
    found = {
        f"uniform {bits + 16 / GROUP:g}": ("gptq-w3a16-g64", [size, f"{stage}.scheme=w{bits}a16"]) for bits in UNIFORM
    }
    found |= {f"mixed {budget:g}": ("mixed-3.5", [size, f"{stage}.bits_per_weight={budget}"]) for budget in BUDGETS}
    found |= {
        f"vocabulary {budget:g}": (
            "mixed-3.5",
            [size, f"{stage}.bits_per_weight={budget}", f"{stage}.vocabulary=true"],
        )
        for budget in (3.25, 3.75, 4.25, 5.25)
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "mixed.json")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(asked.out.read_text()) if asked.out.exists() else {"models": {}}
    results = {"environment": tools.describe_machine() | {"threads": asked.threads}, "models": known["models"]}
    for model in asked.models:
        entries = results["models"].setdefault(Path(model).name, {})
        for label, (name, settings) in runs().items():
            run = recipes.measure(
                name, asked.work.resolve(), asked.threads, model=model, settings=settings, label=label.replace(" ", "-")
            )
            entries[label] = {key: run[key] for key in KEPT}
            print(model, label, json.dumps(entries[label]), flush=True)
            asked.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
