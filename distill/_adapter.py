"""An adapter on disk, as PEFT writes it: adapter_config.json and adapter_model.safetensors.

y = W x + (lora_alpha / r) · lora_B lora_A x, with lora_A [r, in] and lora_B [out, r] of each layer.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from compress.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from compress.core.passes import Job
from distill._low_rank import Pairs

if TYPE_CHECKING:
    from distill.recover import Recover

_PREFIX = "base_model.model"


def attach_adapter(settings: Recover, job: Job, pairs: Pairs) -> None:
    """Put the pairs beside the weights, in the model's dtype."""
    tensors = {}
    for name, pair in pairs.by_name.items():
        for part, value in (("lora_A", pair.a_RK), ("lora_B", pair.b_OR)):
            tensors[f"{_PREFIX}.{name}.{part}.weight"] = value.detach().to("cpu", job.checkpoint.dtype).contiguous()
    job.sink.attach(ADAPTER_WEIGHTS, tensors)
    job.sink.attach(ADAPTER_CONFIG, json.dumps(_config(settings, job, pairs), indent=2, sort_keys=True) + "\n")


def _config(settings: Recover, job: Job, pairs: Pairs) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": _targets(job, pairs),
    }


def _targets(job: Job, pairs: Pairs) -> list[str]:
    """Last words of names where these stand for the very layers that have pairs, else whole names."""
    words = {name.rpartition(".")[2] for name in pairs.by_name}
    checkpoint = job.checkpoint
    sites = [name for index in range(checkpoint.num_blocks) for name in checkpoint.sites(index)]
    every = {name for name in sites if name.rpartition(".")[2] in words}
    return sorted(words if every == pairs.by_name.keys() else pairs.by_name)
