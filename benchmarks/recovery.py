"""What recovery wins back of what 3-bit weights lost: codes, scales and all that is not quantized are trained together.

    python benchmarks/recovery.py --data DIR [--models tinystories-656k stories-7m] [--threads 2]
    python benchmarks/recovery.py --table       # print the table of what results/recovery.json holds

GPTQ with 3 bits in groups of 64, by 128 rows of texts a and c, alone and with `recover` behind it, which reads all
rows; its settings are the default ones, but for small batches. Scored are the artifacts as they are deployed, decoded
by decode.py, on the first 200 stories of text b, as in quality.py: perplexity, and KL divergence to the original in
nats a token. Minutes are those of the stage that trains, beside other work where the load says so. All texts are
training text of stories-7m.
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
from training_text import LOOKED_AT, training_text

W3 = {"quantize": {"method": "gptq", "scheme": "w3a16", "group_size": 64, "samples": LOOKED_AT}}
RECOVER = {"method": "recover", "batch": 2, "save_every": 1000}
TOKENS = {"tinystories-656k": 1_600_000, "stories-7m": 400_000}
CASES = ("quantized", "recovered")


def measure(model: str, case: str, place: Workplace, tokens: int) -> dict[str, object]:
    from perplexity import score

    output = place.root / model / case
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(Path(f"{output}.report"), ignore_errors=True)
    recover = {"distill": RECOVER | {"tokens": tokens}}
    recipe = {
        "model": str(place.model(model)),
        "calibration": {"dataset": str(training_text(place, model))},
        "stages": [W3, recover] if case == "recovered" else [W3],
    }
    written = Path(f"{output}.json")
    written.write_text(json.dumps(recipe))
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "compress", "run", "--recipe", str(written), "--output", str(output), "--quiet"]
    subprocess.run(command, env=tools.quiet_environment(place.threads), check=True)
    found = score(output, place.model(model), place.evaluation(model))
    run = json.loads((Path(f"{output}.report") / "run.json").read_text())
    minutes = sum(stage["seconds"] / 60 for stage in run["stages"] if stage["kind"] == "distill")
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    figures = {"perplexity": found.perplexity, "kl": found.kl, "minutes": minutes, "bytes": size, "load_before": load}
    return {"model": model, "case": case, "tokens": tokens if case == "recovered" else 0, **figures}


def run(asked: argparse.Namespace) -> None:
    place = Workplace(asked.work.resolve(), asked.data.resolve(), asked.threads)
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {"original": {}, "cases": []}
    results |= {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine() | {"threads": asked.threads},
        "training": RECOVER,
    }
    for model in asked.models:
        place.evaluation(model)
        score_original(model, place)
        results["cases"] = [case for case in results["cases"] if case["model"] != model]
        for case in CASES:
            found = measure(model, case, place, asked.tokens or TOKENS[model])
            print(json.dumps(found), flush=True)
            results["cases"].append(found)
        results["original"][model] = json.loads((place.root / model / "original.json").read_text())["perplexity"]
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    lines = [
        "| model | | perplexity | KL to the original | of the KL before | tokens | size | minutes |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model, original in results["original"].items():
        before, after = ([c for c in results["cases"] if (c["model"], c["case"]) == (model, name)][0] for name in CASES)
        lines.append(f"| {model} | original | {original:.3f} | | | | | |")
        for label, case in (("W3 g64", before), ("with recovery", after)):
            cells = [f"{case['perplexity']:.3f}", f"{case['kl']:.5f}"]
            cells += [f"{case['kl'] / before['kl']:.2f}", f"{case['tokens']:,}"] if case is after else ["", ""]
            cells += [f"{case['bytes'] / 1e6:.2f} MB", f"{case['minutes']:.1f}" if case is after else ""]
            lines.append(f"| | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--models", nargs="+", choices=tuple(TOKENS), default=tuple(TOKENS))
    parser.add_argument("--tokens", type=int, help=f"to train on; else {TOKENS}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "recovery")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "recovery.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.data is None:
            parser.error("--data is needed (benchmarks/README.md says what it holds)")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
