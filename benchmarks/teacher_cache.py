"""Distillation from a cache of the teacher's distributions beside a teacher that is asked at every step.

    python benchmarks/teacher_cache.py --data DIR [--models tinystories-656k] [--steps 100] [--seeds 0 1 2]
    python benchmarks/teacher_cache.py --table      # print the table of what results/teacher-cache.json holds

A quarter of the feed-forward channels go by magnitude, then the student is trained for equal steps on the same rows in
the same order; of the caches only what is kept of a distribution differs. `naive`: the most likely tokens alone, scaled
to 1. Scored on the first stories of another text: cross entropy, and KL divergence to the teacher, in nats a token;
differences to `online` are taken seed by seed. Seconds of a step are medians, and tell little on a busy machine.
DIR holds models/NAME and text/tinystories-{a,b}.txt.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from statistics import mean, median

import tools
import torch
from make_tokens import NOT_A_TOKEN, calibration_ids, evaluation_ids
from safetensors.numpy import save_file

import compress
from compress.core.checkpoint import Checkpoint
from compress.core.events import Event, Metric, Progress, Started

ONLINE = "online"
CASES: dict[str, dict[str, object] | None] = {
    ONLINE: None,
    "sampled, 24 even draws": {"codec": "sampled", "draws": 24},
    "sampled, 50 even draws": {"codec": "sampled", "draws": 50},
    "sampled, 50 random draws": {"codec": "sampled", "draws": 50, "spread": "random"},
    "top 12 and the tail": {"codec": "topk", "k": 12},
    "top 12, naive": {"codec": "topk", "k": 12, "tail": "drop"},
    "top 50 and the tail": {"codec": "topk", "k": 50},
    "top 50, naive": {"codec": "topk", "k": 50, "tail": "drop"},
}
CUT = {"prune": {"method": "channels", "ratio": 0.25, "importance": "magnitude"}}
LENGTH, BATCH = 256, 8
STORIES, STORY_LENGTH = 100, 256


class Clock:
    """Listens to a run: seconds of each step, of writing the cache, and its bytes a token."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.writing = 0.0
        self.token_bytes: float | None = None
        self._since = 0.0

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Metric) and event.name == "cache_bytes_per_token":
            self.token_bytes = event.value
        if isinstance(event, Progress) and event.stage == "train":
            self.steps.append(now - self._since)
        if isinstance(event, Progress) and event.stage == "teacher":
            self.writing += now - self._since
        if isinstance(event, Started | Progress):
            self._since = now


def train(model: Path, tokens: Path, cache: dict[str, object] | None, seed: int, steps: int, output: Path) -> Clock:
    lesson = {"method": "logits", "tokens": steps * BATCH * LENGTH, "batch": BATCH, "learning_rate": 1e-3, "seed": seed}
    if cache is not None:
        lesson["cache"] = cache | ({"seed": seed} if cache["codec"] == "sampled" else {})
    recipe = compress.parse_recipe(
        {"model": str(model), "calibration": {"dataset": str(tokens)}, "stages": [CUT, {"distill": lesson}]}
    )
    clock = Clock()
    compress.run(recipe, compress.RunOptions(output=output, fresh=True), clock)
    return clock


@torch.no_grad()
def score(teacher: torch.nn.Module, student: torch.nn.Module, ids_BT: torch.Tensor) -> dict[str, float]:
    """Both in nats, the mean over all tokens but each row's first."""
    own, kl, count = 0.0, 0.0, 0
    for row in ids_BT:
        ids = row[row != NOT_A_TOKEN][None]
        log_p, log_q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (teacher, student))
        own -= float(log_q.gather(1, ids[0, 1:, None]).sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        count += ids.shape[1] - 1
    return {"cross_entropy": own / count, "kl": kl / count}


def run(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine() | {"threads": asked.threads},
        "training": {"steps": asked.steps, "batch": BATCH, "rows": asked.rows, "length": LENGTH},
        "models": {},
    }
    for name in asked.models:
        model = asked.data.resolve() / "models" / name
        teacher = Checkpoint.open(model).build_model(torch.float32)
        stories = evaluation_ids(model, asked.data / "text" / "tinystories-b.txt", STORIES, STORY_LENGTH)
        held_out = torch.from_numpy(stories)
        found = results["models"].setdefault(name, {"teacher": score(teacher, teacher, held_out), "cases": {}})
        work = asked.work.resolve() / name
        work.mkdir(parents=True, exist_ok=True)
        for seed in asked.seeds:
            tokens = work / f"tokens-{seed}.safetensors"
            ids = calibration_ids(model, asked.data / "text" / "tinystories-a.txt", seed, asked.rows, LENGTH)
            save_file({"input_ids": ids}, tokens)
            for label, cache in CASES.items():
                load = os.getloadavg()[0]
                clock = train(model, tokens, cache, seed, asked.steps, work / "student")
                figures = score(teacher, Checkpoint.open(work / "student").build_model(torch.float32), held_out)
                figures |= {"seed": seed, "load_before": load, "seconds_a_step": median(clock.steps)}
                if cache is not None:
                    figures |= {"bytes_a_token": clock.token_bytes, "seconds_to_write": clock.writing}
                found["cases"].setdefault(label, []).append(figures)
                print(name, label, json.dumps(figures), flush=True)
        shutil.rmtree(work)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    """A table per model: means over seeds."""
    return "\n\n".join(
        "\n".join(_of_model(name, found, results["training"])) for name, found in results["models"].items()
    )


def _of_model(name: str, found: dict[str, object], training: dict[str, int]) -> list[str]:
    cases = found["cases"]
    online = cases[ONLINE]
    loads = [each["load_before"] for figures in cases.values() for each in figures]
    lines = [
        f"**{name}** without a quarter of its channels, {training['steps']} steps of {training['batch']} × "
        f"{training['length']} tokens, mean of {len(online)} seeds (teacher: {found['teacher']['cross_entropy']:.4f} "
        f"nats); load of the machine before a case {min(loads):.1f} to {max(loads):.1f}",
        "",
        "| teacher | cross entropy | to online | KL to the teacher | to online | bytes a token | time of a step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for label, figures in cases.items():
        cells = [label]
        for key in ("cross_entropy", "kl"):
            cells.append(f"{mean(each[key] for each in figures):.4f}")
            away = mean(each[key] - same[key] for each, same in zip(figures, online, strict=True))
            cells.append("" if label == ONLINE else f"{away:+.4f}".replace("-", "−"))
        cells.append("" if label == ONLINE else f"{mean(each['bytes_a_token'] for each in figures):.0f}")
        share = mean(e["seconds_a_step"] / o["seconds_a_step"] for e, o in zip(figures, online, strict=True))
        cells.append(f"{share:.2f} ×")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["tinystories-656k"], choices=["tinystories-656k", "stories-7m"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=400, help="of the text that is trained on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "teacher-cache")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "teacher-cache.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.data is None:
            parser.error("--data is needed")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
