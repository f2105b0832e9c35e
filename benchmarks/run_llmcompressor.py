"""Quantize with llm-compressor; started by its own interpreter. See runner.py for the command line.

Variants of GPTQ: `default` (static activation order, min-max scales), `mse` (the mse observer chooses the scales),
`imatrix` (the importance-weighted observer of the project's own guide). RTN takes `default` and `mse`. AWQ takes
`default` (symmetric, as the others) and `asymmetric` (its usual scheme). SmoothQuant has the strength 0.8 of the
project's own example, and GPTQ behind it. fp8 is its FP8_DYNAMIC. SparseGPT and Wanda have its defaults.
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
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVERS = {
    "default": "memoryless_minmax",
    "mse": "memoryless_mse",
    "imatrix": "imatrix_mse",
    "asymmetric": "memoryless_minmax",
}
VARIANTS = tuple(OBSERVERS)
IMPORTED_S = runner.process_age_s()

if not torch.cuda.is_available():
    # Pinning memory needs an accelerator and raises without one; the tensors are used where they are.
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def scheme(job: runner.Job) -> QuantizationScheme:
    if job.scheme == "fp8":
        return preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    strategy = "channel" if job.group_size == -1 else "group"
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.variant != "asymmetric",
        strategy=strategy,
        group_size=None if job.group_size == -1 else job.group_size,
        observer=OBSERVERS[job.variant],
    )
    inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    return QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs if job.scheme == "w8a8" else None
    )


def pruning(job: runner.Job) -> dict[str, object]:
    kept, _, among = job.pattern.partition(":")
    if not among:
        return {"sparsity": job.sparsity, "ignore": ["re:.*lm_head"]}
    return {"sparsity": 1 - int(kept) / int(among), "mask_structure": job.pattern, "ignore": ["re:.*lm_head"]}


def recipe(job: runner.Job) -> list[object]:
    match job.method:
        case "sparsegpt":
            return [SparseGPTModifier(**pruning(job))]
        case "wanda":
            return [WandaPruningModifier(**pruning(job))]
    settings = {"config_groups": {"group_0": scheme(job)}, "ignore": ["lm_head"]}
    match job.method:
        case "rtn":
            return [QuantizationModifier(**settings)]
        case "gptq":
            return [GPTQModifier(**settings)]
        case "awq":
            return [AWQModifier(), QuantizationModifier(**settings)]
        case "smoothquant":
            return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**settings)]
    raise ValueError(f"llm-compressor: {job.method} is not compared")


def quantize(job: runner.Job) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = load_file(job.tokens)["input_ids"]
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(rows) if job.method != "rtn" else None,
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
