"""Quantize with AutoRound; started by its own interpreter. See runner.py for the command line.

Its published settings: 200 steps of 8 samples, symmetric, rounding and clip ranges learned, compiled kernels off (they
need a compiler and as long as the work itself on small models). Written as GPTQ, which it packs for every width.
"""

# ruff: noqa: E402, I001  (the memory of the bare imports is taken between two imports)
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import runner

BARE_BYTES = runner.rss_anon_bytes()

import auto_round
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

VARIANTS = ("default",)
BATCH = 8
IMPORTED_S = runner.process_age_s()


def quantize(job: runner.Job) -> None:
    if (job.method, job.scheme) != ("autoround", "weights"):
        raise ValueError("AutoRound: only its own method, of weights, is compared")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = load_file(job.tokens)["input_ids"].long()
    samples, length = ids.shape
    tool = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size,
        sym=True,
        iters=job.steps,
        nsamples=samples,
        seqlen=length,
        batch_size=BATCH,
        dataset=[ids[start : start + BATCH] for start in range(0, samples, BATCH)],
        device_map="cpu",
        enable_torch_compile=False,
        seed=0,
    )
    tool.quantize_and_save(job.output, format="auto_gptq")
    lift(Path(job.output))


def lift(folder: Path) -> None:
    """It writes into a folder of its own naming below the one that was asked for."""
    [inner] = [path for path in folder.iterdir() if path.is_dir()]
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def main() -> None:
    versions = {
        "auto-round": auto_round.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    imported = {"bytes_after_bare_imports": BARE_BYTES, "seconds_of_imports": IMPORTED_S}
    runner.run_jobs(runner.parse_jobs(VARIANTS), quantize, imported, versions)


if __name__ == "__main__":
    main()
