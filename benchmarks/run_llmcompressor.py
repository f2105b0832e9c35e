"""Quantize with llm-compressor; started by its own interpreter. See runner.py for the command line.

Variants of GPTQ: `default` (static activation order, min-max scales), `mse` (the mse observer chooses the scales),
`imatrix` (the importance-weighted observer of the project's own guide). RTN takes `default` and `mse`.
"""

# ruff: noqa: E402, I001  (the memory of the bare imports is taken between two imports)
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import runner

BARE_BYTES = runner.rss_anon_bytes()

import compressed_tensors
import llmcompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

VARIANTS = ("default", "mse", "imatrix")
OBSERVERS = {"default": "memoryless_minmax", "mse": "memoryless_mse", "imatrix": "imatrix_mse"}
IMPORTED_S = runner.process_age_s()

if not torch.cuda.is_available():
    # Pinning memory needs an accelerator and raises without one; the tensors are used where they are.
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def weight_scheme(job: runner.Job) -> QuantizationScheme:
    strategy = "channel" if job.group_size == -1 else "group"
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=True,
        strategy=strategy,
        group_size=None if job.group_size == -1 else job.group_size,
        observer=OBSERVERS[job.variant],
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def recipe(job: runner.Job) -> list[object]:
    groups = {"group_0": weight_scheme(job)}
    if job.method == "rtn":
        return [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]


def quantize(job: runner.Job) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = load_file(job.tokens)["input_ids"]
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(rows) if job.method == "gptq" else None,
        recipe=recipe(job),
        batch_size=job.batch_size,
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job.output, save_compressed=True)
    tokenizer.save_pretrained(job.output)


def main() -> None:
    versions = {
        "llmcompressor": llmcompressor.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    imported = {"bytes_after_bare_imports": BARE_BYTES, "seconds_of_imports": IMPORTED_S}
    runner.run_jobs(runner.parse_jobs(VARIANTS), quantize, imported, versions)


if __name__ == "__main__":
    main()
