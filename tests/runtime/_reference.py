"""What transformers computes from a model folder, one prompt at a time, and how far from that something is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.core.checkpoint import Checkpoint


def reference_logits(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What transformers computes, one prompt at a time, without a cache."""
    model = Checkpoint.open(folder).build_model(torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def reference_greedy(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    model = Checkpoint.open(folder).build_model(torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        kept = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        answers.append(kept[0, len(prompt) :].tolist())
    return answers


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    assert [part.shape for part in found] == [part.shape for part in wanted]
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
