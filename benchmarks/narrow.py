"""Speed of a model that became narrower, or has zeros in 2:4, beside the model as it was.

    python benchmarks/narrow.py --work DIR [--runs 5] [--threads 2]

The 135M shape with random weights; 25 % of the channels go, or those and one of three key-value heads with its queries;
or two of every four weights are zero, which the runtime packs where it has a kernel; transformers does not.
The runtime in `fast` numerics and transformers in the dtype of the weights take turns on the same requests in one
process group; medians. Random token ids; prefill: one prompt of 512 tokens; decode: tokens a second behind a prompt of
128, one request and 16 at a time. The share of the model that is left says what could be won at best.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from statistics import median

import torch
from make_models import SHAPES, make_model
from tools import HERE, REPOSITORY, describe_machine
from transformers import AutoModelForCausalLM

import compress
from compress.core.checkpoint import Checkpoint
from runtime.llm import LLM

CUTS = {
    "channels": [{"prune": {"method": "channels", "ratio": 0.25, "importance": "magnitude", "multiple": 64}}],
}
CUTS["channels and heads"] = [
    {"prune": {"method": "heads", "keep": 2, "importance": "magnitude"}},
    *CUTS["channels"],
]
CUTS["zeros in 2:4"] = [{"prune": {"method": "magnitude", "pattern": "2:4"}}]
PREFILL, PROMPT, DECODED = 512, 128, 32
BATCHES = (1, 16)


def prepare(work: Path) -> dict[str, Path]:
    original = work / "135m"
    if not (original / "tokenizer_config.json").exists():  # written last
        make_model(SHAPES["135m"], original, seed=0)
    folders = {"original": original}
    for name, stages in CUTS.items():
        folders[name] = work / re.sub("[^a-z0-9]+", "-", name)
        if not (folders[name] / "compress.json").exists():
            recipe = compress.parse_recipe({"model": str(original), "stages": stages})
            compress.run(recipe, compress.RunOptions(output=folders[name], fresh=True))
    return folders


def ids(count: int, seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, SHAPES["135m"].vocabulary, (batch, count), generator=torch.Generator().manual_seed(seed))


def in_runtime(folder: Path, seed: int) -> dict[str, float]:
    """Tokens a second of one pass through the runtime."""
    llm = LLM(folder, max_length=1024)
    rows = [row.tolist() for row in ids(16, seed + 1, 16)]
    llm.generate(rows, max_tokens=4, temperature=0.0, ignore_eos=True)
    found = {"prefill": PREFILL / _seconds(lambda: llm.generate([ids(PREFILL, seed)[0].tolist()], max_tokens=1))}
    for batch in BATCHES:
        prompts = [row.tolist() for row in ids(PROMPT, seed + batch, batch)]
        first = _seconds(lambda p=prompts: llm.generate(p, max_tokens=1, temperature=0.0, ignore_eos=True))
        llm.engine.scheduler.pool.forget()
        whole = _seconds(lambda p=prompts: llm.generate(p, max_tokens=DECODED + 1, temperature=0.0, ignore_eos=True))
        llm.engine.scheduler.pool.forget()
        found[f"decode {batch}"] = batch * DECODED / (whole - first)
    return found


@torch.inference_mode()
def in_transformers(folder: Path, seed: int) -> dict[str, float]:
    """The same through transformers' own generate."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids(16, seed), max_new_tokens=2, **settings)
    found = {"prefill": PREFILL / _seconds(lambda: model(ids(PREFILL, seed), logits_to_keep=1))}
    for batch in BATCHES:
        prompts = ids(PROMPT, seed + batch, batch)
        first = _seconds(lambda p=prompts: model.generate(p, max_new_tokens=1, **settings))
        whole = _seconds(lambda p=prompts: model.generate(p, max_new_tokens=DECODED + 1, **settings))
        found[f"decode {batch}"] = batch * DECODED / (whole - first)
    return found


def _seconds(work: object) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parameters(folder: Path) -> dict[str, int]:
    """All of them, and those of the blocks, which is what a prompt goes through."""
    checkpoint = Checkpoint.open(folder)
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.tensors.items()}
    return {
        "all": sum(sizes.values()),
        "blocks": sum(size for name, size in sizes.items() if name.startswith("model.layers.")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".bench" / "narrow")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "narrow.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    folders = prepare(asked.work.resolve())
    runs: list[dict[str, object]] = []
    for number in range(asked.runs):
        order = list(folders.items())
        for name, folder in order if number % 2 == 0 else reversed(order):
            for engine, measure in (("runtime", in_runtime), ("transformers", in_transformers)):
                runs.append({"model": name, "engine": engine, "run": number, **measure(folder, number)})
                print(json.dumps(runs[-1]), flush=True)
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": describe_machine() | {"threads": asked.threads},
        "parameters": {name: parameters(folder) for name, folder in folders.items()},
        "medians": medians(runs, list(folders)),
        "runs": runs,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")
    print(render(results))


def medians(runs: list[dict[str, object]], models: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    names = ("prefill", *(f"decode {batch}" for batch in BATCHES))
    return {
        model: {
            engine: {
                name: median(run[name] for run in runs if (run["model"], run["engine"]) == (model, engine))
                for name in names
            }
            for engine in ("runtime", "transformers")
        }
        for model in models
    }


def render(results: dict[str, object]) -> str:
    """Tokens a second of the original, and how many times as fast the narrower models are."""
    lines = ["| | parameters of the blocks | engine | prefill | decode, 1 | decode, 16 |", "|---|--:|---|--:|--:|--:|"]
    whole = results["parameters"]["original"]["blocks"]
    for model, engines in results["medians"].items():
        share = results["parameters"][model]["blocks"] / whole
        for engine, found in engines.items():
            before = results["medians"]["original"][engine]
            cells = [f"{found[n]:.0f}" if model == "original" else f"{found[n] / before[n]:.2f} ×" for n in found]
            lines.append(f"| {model} | {100 * share:.0f} % | {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
