"""The runtime against transformers and llama.cpp on one machine: many requests, one stream, original against W4.

    benchmarks/peers.sh PEERS llamacpp
    python benchmarks/throughput.py --work DIR --peers PEERS [--shapes demo 135m 0.5b] [--runs 3] [--out FILE]

Random-weight models of the given shapes and the bundled demo model; greedy, end tokens ignored. A contestant is a
process that loads, warms up, and does its workloads in turn; contestants take turns; medians over the runs.

many      64 requests at once, prompts of 8 to 48 tokens, outputs of exponential length (mean 24): generated tokens a
          second. transformers pads 16 at a time; it, and its continuous batching, stop when --box seconds are over.
stream    one request, 32 tokens of prompt and 64 of output: generated tokens a second after the first.
decode-N  N requests in step, 16 tokens of prompt and 32 of output: generated tokens a second, prompts included.
prefill   one prompt of 256 tokens: prompt tokens a second.

transformers in bfloat16 reads prompts at an eighth of its fp32 speed on a CPU without bf16 instructions: it takes part
in `stream`, and in the first run's `many` on the smaller shapes. One that fails is in the JSON with its reason.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import tools
from make_models import SHAPES, make_model

HERE = Path(__file__).resolve().parent
OURS = ("many", "stream", "decode-1", "decode-8", "decode-16", "prefill")
CONTESTANTS = {
    "ours/original": OURS,
    "ours/w4": OURS,
    "ours/w4-head8": ("stream", "decode-16"),
    "transformers/float32": ("many", "stream", "prefill"),
    "transformers/bfloat16": ("stream",),
    "transformers/continuous": ("many",),
    "llamacpp/q4_0": ("stream", "prefill"),
}
FIRST_RUN_ONLY = {("transformers/bfloat16", "demo"): ("many",), ("transformers/bfloat16", "135m"): ("many",)}
RECIPE = "model: {model}\nstages: [{{quantize: {{method: rtn, group_size: 64{more}}}}}]\n"
ARTIFACTS = {"w4": "", "w4-head8": ", head: w8a16"}

Line = dict[str, object]


def prepare(shape: str, work: Path, peers: tools.Peers | None) -> dict[str, Path]:
    """The original, its W4 artifacts (GPTQ's codes are no faster than rounded ones), and a GGUF of the original, whose
    head has 8 bits."""
    original, gguf = work / shape, work / f"{shape}-q4_0.gguf"
    if shape == "demo":
        original = tools.REPOSITORY / "compress" / "demo" / "model"
    elif not (original / "tokenizer_config.json").exists():
        make_model(SHAPES[shape], original, seed=0)
    artifacts = {name: work / f"{shape}-{name}" for name in ARTIFACTS}
    for name, artifact in artifacts.items():
        if not (artifact / "compress.json").exists():
            recipe = work / f"{shape}-{name}.yaml"
            recipe.write_text(RECIPE.format(model=json.dumps(str(original)), more=ARTIFACTS[name]))
            shutil.rmtree(artifact, ignore_errors=True)
            asked = ["--recipe", str(recipe), "--output", str(artifact), "--quiet", "--fresh"]
            subprocess.run([sys.executable, "-m", "compress", "run", *asked], check=True, stdout=subprocess.DEVNULL)
    if peers and not gguf.exists():
        partial = gguf.with_suffix(".partial")
        maker = [str(peers.python("llamacpp")), str(HERE / "make_gguf.py"), str(original), str(partial)]
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        partial.rename(gguf)
    return {"original": original, "q4_0": gguf, **artifacts}


def command_of(contestant: str, models: dict[str, Path], peers: tools.Peers | None) -> list[str]:
    tool, variant = contestant.split("/")
    python = peers.python("llamacpp") if tool == "llamacpp" and peers else sys.executable
    model = models.get(variant, models["original"])
    return [str(python), str(HERE / "contestants.py"), str(model), contestant]


def run_once(command: list[str], workloads: tuple[str, ...], box_s: float, threads: int) -> list[Line]:
    """A line for each workload; one with `failed` for why there are no more."""
    load = os.getloadavg()[0]
    done = subprocess.run(
        [*command, *workloads, "--box", str(box_s), "--threads", str(threads)],
        env=tools.quiet_environment(threads) | {"PYTHONPATH": str(tools.REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        lines.append({"workload": workloads[len(lines) % len(workloads)], "failed": said[-1]})
    return [line | {"load_before": load} for line in lines]


def workloads_of(contestant: str, shape: str, run: int) -> tuple[str, ...]:
    extra = FIRST_RUN_ONLY.get((contestant, shape), ()) if run == 0 else ()
    return CONTESTANTS[contestant] + extra


def summarize(runs: list[Line]) -> dict[str, dict[str, dict[str, float]]]:
    """Median tokens a second by shape, workload and contestant."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        if "failed" not in run:
            line = found.setdefault(run["shape"], {}).setdefault(run["workload"], {})
            line.setdefault(run["contestant"], []).append(run["tokens_per_second"])
    return {
        shape: {work: {who: median(each) for who, each in line.items()} for work, line in lines.items()}
        for shape, lines in found.items()
    }


def ratios(summary: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What was promised: batched throughput 3 x padded `generate` and 1.5 x continuous batching, W4 streams 2 x bf16
    and as fast as llama.cpp, W4 no slower than the original when it decodes."""
    asked = {
        "many: ours / padded": ("many", "ours/original", "transformers/float32"),
        "many: ours / padded bfloat16": ("many", "ours/original", "transformers/bfloat16"),
        "many: ours / continuous": ("many", "ours/original", "transformers/continuous"),
        "many: w4 / original": ("many", "ours/w4", "ours/original"),
        "stream: w4 / transformers bfloat16": ("stream", "ours/w4", "transformers/bfloat16"),
        "stream: w4 / transformers float32": ("stream", "ours/w4", "transformers/float32"),
        "stream: w4 / llama.cpp q4_0": ("stream", "ours/w4", "llamacpp/q4_0"),
        "stream: w4 with an 8-bit head / llama.cpp q4_0": ("stream", "ours/w4-head8", "llamacpp/q4_0"),
        **{f"{work}: w4 / original": (work, "ours/w4", "ours/original") for work in OURS[1:]},
    }
    return {
        shape: {
            name: lines[work][one] / lines[work][other]
            for name, (work, one, other) in asked.items()
            if lines.get(work, {}).keys() >= {one, other}
        }
        for shape, lines in summary.items()
    }


def render(results: dict[str, object]) -> str:
    lines = []
    for shape, workloads in results["summary"].items():
        lines += [f"{shape}, tokens a second:", "", f"| | {' | '.join(CONTESTANTS)} |"]
        lines.append("|---" * (len(CONTESTANTS) + 1) + "|")
        for workload, line in workloads.items():
            cells = [f"{line[who]:.1f}" if who in line else "" for who in CONTESTANTS]
            lines.append(f"| {workload} | {' | '.join(cells)} |")
        lines += ["", *(f"- {name}: {ratio:.2f} ×" for name, ratio in results["ratios"][shape].items()), ""]
    lines += [f"failed: {one['contestant']} on {one['shape']}: {one['failed']}" for one in results["failures"]]
    return "\n".join(lines).strip()


def results_of(runs: list[Line], threads: int) -> dict[str, object]:
    summary = summarize(runs)
    return {
        "environment": tools.describe_machine() | {"threads": threads},
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "summary": summary,
        "ratios": ratios(summary),
        "failures": [run for run in runs if "failed" in run],
        "runs": runs,
    }


def _known(file: Path) -> list[Line]:
    """Runs that the results have already; of other shapes or contestants than asked for now they are kept."""
    return json.loads(file.read_text())["runs"] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for models and artifacts, kept for the next time")
    parser.add_argument("--peers", type=Path, help="the folder of peers.sh; without it llama.cpp takes no part")
    parser.add_argument("--shapes", nargs="+", default=["demo", "135m", "0.5b"])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--box", type=float, default=15.0, help="seconds after which slow contestants stop")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "throughput.json")
    asked = parser.parse_args()
    peers = tools.Peers(asked.peers) if asked.peers else None
    contestants = [one for one in asked.contestants if peers or not one.startswith("llamacpp")]
    asked.work.mkdir(parents=True, exist_ok=True)
    models = {shape: prepare(shape, asked.work.resolve(), peers) for shape in asked.shapes}
    runs = [
        run for run in _known(asked.out) if run["shape"] not in asked.shapes or run["contestant"] not in contestants
    ]
    for shape in asked.shapes:
        for number in range(asked.runs):
            for contestant in contestants:
                command = command_of(contestant, models[shape], peers)
                for line in run_once(command, workloads_of(contestant, shape, number), asked.box, asked.threads):
                    runs.append({"shape": shape, "contestant": contestant, "run": number, **line})
                    print(json.dumps(runs[-1]), flush=True)
            asked.out.write_text(json.dumps(results_of(runs, asked.threads), indent=2) + "\n")
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
