"""The runtime against transformers on one machine: throughput of many requests, one stream, original against W4.

    python benchmarks/throughput.py --work DIR [--shapes 135m 0.5b] [--runs 3] [--out FILE]

Random-weight models of the given shapes and the bundled demo model; greedy, end tokens ignored. Every figure is of a
process of its own that loads, warms up with a few tokens and then measures itself; contestants take turns, medians.

many      64 requests, prompts of 16 to 128 tokens, outputs drawn from an exponential distribution (mean 48, at most
          192): generated tokens a second. transformers pads 16 at a time and goes on until the longest is done.
stream    one request, 32 tokens of prompt and 64 of output: generated tokens a second after the first.
decode-N  N requests in step, 16 tokens of prompt and 48 of output: generated tokens a second.
prefill   one prompt of 512 tokens: prompt tokens a second.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import tools
from make_models import SHAPES, make_model

CONTESTANTS = ("ours/original", "ours/w4", "transformers/float32", "transformers/bfloat16", "transformers/continuous")
WORKLOADS = ("many", "stream", "decode-1", "decode-8", "decode-16", "prefill")
SKIPPED = {  # too slow to be a rival at anything but what the targets name
    ("transformers/continuous", workload) for workload in WORKLOADS if workload != "many"
}


def requests_of(workload: str, vocabulary: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate) of each request; the same for everyone."""
    import numpy as np

    draw = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return draw.integers(3, vocabulary, length).tolist()

    if workload == "many":
        wanted = np.clip(draw.exponential(48, 64).round(), 1, 192).astype(int)
        return [(prompt(int(draw.integers(16, 129))), int(tokens)) for tokens in wanted]
    if workload == "stream":
        return [(prompt(32), 64)]
    if workload == "prefill":
        return [(prompt(512), 1)]
    return [(prompt(16), 48) for _ in range(int(workload.removeprefix("decode-")))]


def run_ours(model: str, workload: str) -> dict[str, float]:
    from runtime.llm import LLM
    from runtime.params import SamplingParams

    llm = LLM(model, max_sequences=64, max_length=512)
    asked = requests_of(workload, llm.config.vocab)
    llm.generate([[5, 6, 7]] * min(16, len(asked)), max_tokens=4, ignore_eos=True)
    if workload != "many":  # the same shapes once, so that nothing is set up inside the measurement
        llm.generate([asked[0][0][::-1]], max_tokens=2, ignore_eos=True)
    params = [SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True) for _, tokens in asked]
    first, started = 0.0, time.perf_counter()
    names = [llm.add(prompt, each) for (prompt, _), each in zip(asked, params, strict=True)]
    left = set(names)
    while left:
        for update in llm.step():
            first = first or time.perf_counter() - started
            if update.finish_reason:
                left.discard(update.request)
    return figures(workload, asked, first, time.perf_counter() - started)


def run_transformers(model: str, workload: str, variant: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    asked = requests_of(workload, loaded.config.vocab_size)
    if variant == "continuous":
        return run_continuous(loaded, workload, asked)

    def generate(batch: list[tuple[list[int], int]]) -> None:
        width, most = max(len(prompt) for prompt, _ in batch), max(tokens for _, tokens in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        settings = GenerationConfig(max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0)
        loaded.generation_config.eos_token_id = None
        loaded.generate(ids, attention_mask=mask, generation_config=settings)

    with torch.inference_mode():
        generate([(asked[0][0][:8], 2)])
        started = time.perf_counter()
        if workload == "stream":
            generate([(asked[0][0], 1)])
        first = time.perf_counter() - started
        started = time.perf_counter()
        for at in range(0, len(asked), 16):
            generate(asked[at : at + 16])
    return figures(workload, asked, first, time.perf_counter() - started)


def run_continuous(loaded: object, workload: str, asked: list[tuple[list[int], int]]) -> dict[str, float]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    loaded.set_attn_implementation("paged|sdpa")
    sizes = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512)
    seconds = 0.0
    for tokens in sorted({tokens for _, tokens in asked}):  # it takes one length a call
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        prompts = [prompt for prompt, wanted in asked if wanted == tokens]
        started = time.perf_counter()
        loaded.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=sizes)
        seconds += time.perf_counter() - started
    return figures(workload, asked, 0.0, seconds)


def figures(workload: str, asked: list[tuple[list[int], int]], first: float, seconds: float) -> dict[str, float]:
    generated, read = sum(tokens for _, tokens in asked), sum(len(prompt) for prompt, _ in asked)
    if workload == "prefill":
        return {"tokens_per_second": read / seconds, "seconds": seconds}
    if workload == "stream":
        return {"tokens_per_second": (generated - 1) / (seconds - first), "seconds": seconds}
    return {"tokens_per_second": generated / seconds, "seconds": seconds}


def worker(model: str, contestant: str, workload: str) -> None:
    tool, variant = contestant.split("/")
    found = run_ours(model, workload) if tool == "ours" else run_transformers(model, workload, variant)
    print(json.dumps(found))


def prepare(shape: str, work: Path) -> dict[str, Path]:
    """The original and its W4 artifact (GPTQ's codes are no faster than rounded ones: rounded to nearest)."""
    original, artifact = work / shape, work / f"{shape}-w4"
    if shape == "demo":
        original = tools.REPOSITORY / "compress" / "demo" / "model"
    elif not (original / "tokenizer_config.json").exists():
        make_model(SHAPES[shape], original, seed=0)
    if not (artifact / "compress.json").exists():
        recipe = work / f"{shape}.yaml"
        recipe.write_text(
            f"model: {json.dumps(str(original))}\nstages: [{{quantize: {{method: rtn, group_size: 64}}}}]\n"
        )
        command = [
            sys.executable,
            "-m",
            "compress",
            "run",
            "-r",
            str(recipe),
            "-o",
            str(artifact),
            "--quiet",
            "--fresh",
        ]
        shutil.rmtree(artifact, ignore_errors=True)
        subprocess.run(command, check=True)
    return {"original": original, "w4": artifact}


def summarize(runs: list[dict[str, object]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median tokens a second by shape, workload and contestant."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        line = found.setdefault(run["shape"], {}).setdefault(run["workload"], {})
        line.setdefault(run["contestant"], []).append(run["tokens_per_second"])
    return {
        shape: {work: {who: median(each) for who, each in line.items()} for work, line in lines.items()}
        for shape, lines in found.items()
    }


def render(results: dict[str, object]) -> str:
    lines = []
    for shape, workloads in results["summary"].items():
        lines += [f"{shape}, tokens a second:", "", f"| | {' | '.join(CONTESTANTS)} |", "|---" * 6 + "|"]
        for workload, line in workloads.items():
            cells = [f"{line[who]:.1f}" if who in line else "" for who in CONTESTANTS]
            lines.append(f"| {workload} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["demo", "135m", "0.5b"])
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "throughput.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(*asked.worker)
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, object]] = []
    for shape in asked.shapes:
        models = prepare(shape, asked.work.resolve())
        for workload in asked.workloads:
            for number in range(asked.runs):
                for contestant in asked.contestants:
                    if (contestant, workload) in SKIPPED:
                        continue
                    model = models["w4" if contestant == "ours/w4" else "original"]
                    command = [sys.executable, __file__, "--worker", str(model), contestant, workload]
                    done = subprocess.run(
                        command, env=tools.quiet_environment(asked.threads), capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        raise SystemExit(
                            f"throughput: {contestant}, {workload} on {shape} failed:\n{done.stderr[-2000:]}"
                        )
                    found = json.loads(done.stdout.strip().splitlines()[-1])
                    runs.append(
                        {"shape": shape, "workload": workload, "contestant": contestant, "run": number, **found}
                    )
                    print(json.dumps(runs[-1]), flush=True)
                    results = {
                        "environment": tools.describe_machine() | {"threads": asked.threads},
                        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
                        "summary": summarize(runs),
                        "runs": runs,
                    }
                    asked.out.write_text(json.dumps(results, indent=2) + "\n")
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
