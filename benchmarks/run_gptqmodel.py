"""Quantize with GPTQModel; started by its own interpreter. See runner.py for the command line.

Variants of GPTQ: `default` (its group-aware activation order; per channel the plain one), `mse` (the same, scales by
its error search with the norm that its documentation names). Its RTN is not compared.
"""

# ruff: noqa: E402, I001  (the memory of the bare imports is taken between two imports)
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer its thread pools refuse to start

import torch
import transformers

import runner

BARE_BYTES = runner.rss_anon_bytes()

import gptqmodel
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from safetensors.torch import load_file

VARIANTS = ("default", "mse")
MSE_NORMS = {"default": 0.0, "mse": 2.4}
IMPORTED_S = runner.process_age_s()


def quantize(job: runner.Job) -> None:
    if (job.method, job.scheme) != ("gptq", "weights"):
        raise ValueError("GPTQModel: only gptq of weights is compared")
    torch.manual_seed(0)
    settings = GPTQConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=True,
        mse=MSE_NORMS[job.variant],
        # One group per channel: its group-aware order has nothing to order and refuses; the plain order costs nothing.
        desc_act=job.group_size == -1,
        act_group_aware=job.group_size != -1,
        offload_to_disk=job.offload,
    )
    model = GPTQModel.load(job.model, settings, dtype=torch.float32 if job.dtype == "float32" else "auto")
    ids = load_file(job.tokens)["input_ids"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(rows, batch_size=job.batch_size)
    model.save(job.output)


def main() -> None:
    versions = {
        "gptqmodel": gptqmodel.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    imported = {"bytes_after_bare_imports": BARE_BYTES, "seconds_of_imports": IMPORTED_S}
    runner.run_jobs(runner.parse_jobs(VARIANTS), quantize, imported, versions)


if __name__ == "__main__":
    main()
