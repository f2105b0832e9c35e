"""Which blocks go, and what config.json says of those that stay.

Shapes: B samples, T positions, D hidden width, V vocabulary; N tokens that are looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.memory import Cost, reading_cost
from compress.core.passes import Job
from compress.core.reshaped import ReshapedCheckpoint, with_blocks

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from prune.depth import Depth

LOOKED_AT = 2048
"""Tokens, evenly spaced over the calibration text, whose hidden states are compared."""

PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")
"""Entries that say the same as layer_types, for whole models only."""


def choose(settings: Depth, job: Job, count: int) -> list[int]:
    """The blocks that stay, ascending."""
    blocks = list(range(job.checkpoint.num_blocks))
    leaving = len(blocks) - count
    if leaving == 0:
        return blocks
    if settings.contiguous:
        first = _least(_scores(settings, job, blocks, leaving))
        return blocks[:first] + blocks[first + leaving :]
    if settings.order == "once":
        scores = _scores(settings, job, blocks, 1)
        gone = sorted(blocks, key=lambda block: scores[block])[:leaving]
        return [block for block in blocks if block not in gone]
    while len(blocks) > count:
        blocks.pop(_least(_scores(settings, job, blocks, 1)))
    return blocks


def _least(scores: Sequence[float]) -> int:
    return min(range(len(scores)), key=scores.__getitem__)


def _scores(settings: Depth, job: Job, blocks: Sequence[int], length: int) -> list[float]:
    """How much is lost without `length` neighbours from the i-th of `blocks` on, in a model of these blocks alone."""
    if settings.importance == "influence":
        return influences(replace(job, checkpoint=without_others(job.checkpoint, blocks)), length)
    starts = range(len(blocks) - length + 1)
    return [_loss(job, [*blocks[:start], *blocks[start + length :]]) for start in starts]


# hidden states


def influences(job: Job, length: int) -> list[float]:
    """How far hidden states turn on their way through `length` blocks, from each block on: the mean of 1 - cos for one
    block (block influence, arXiv:2403.03853), of the angle by π for several (angular distance, arXiv:2403.17887)."""
    tokens = job.calibration
    if tokens is None:
        raise InputError("the importance of blocks is measured on calibration text, and there is none")
    places_N = _places(tokens)
    before: deque[Tensor] = deque(maxlen=length)
    found = []
    for block in job.measure(frozenset(), keep=frozenset({"inputs", "targets"})):
        before.append(_picked(block.inputs, places_N))
        if len(before) == length:
            cosine_N = torch.cosine_similarity(before[0].double(), _picked(block.targets, places_N).double(), dim=-1)
            turned_N = 1 - cosine_N if length == 1 else cosine_N.clamp(-1, 1).arccos() / torch.pi
            found.append(float(turned_N.mean()))
    return found


def _places(tokens: Tokens) -> Tensor:
    """Flat positions of some tokens, none of them padding."""
    places = tokens.counted.flatten().nonzero()[:, 0]
    return places[:: -(-len(places) // LOOKED_AT)]


def _picked(states: Sequence[Tensor], places_N: Tensor) -> Tensor:
    """Hidden states [N, D] at flat positions, of a stream of micro-batches [B, T, D]."""
    rows, start = [], 0
    for x_BTD in states:
        size = x_BTD.shape[0] * x_BTD.shape[1]
        inside = places_N[(places_N >= start) & (places_N < start + size)] - start
        rows.append(x_BTD.reshape(size, -1)[inside])
        start += size
    return torch.cat(rows)


# perplexity


def _loss(job: Job, blocks: Sequence[int]) -> float:
    """Mean negative log-likelihood of the calibration text in the model of these blocks: the log of its perplexity."""
    tokens = job.calibration
    if tokens is None:
        raise InputError("the importance of blocks is measured on calibration text, and there is none")
    lengths = [tokens.ids.shape[1]] * len(tokens.ids) if tokens.lengths is None else tokens.lengths.tolist()
    total, count, row = 0.0, 0, 0
    for logits_BTV in job.logits(without_others(job.checkpoint, blocks)):
        for logits_TV in logits_BTV:
            scored = lengths[row] - 1
            targets = tokens.ids[row, 1 : lengths[row]].to(logits_TV.device)
            loss = torch.nn.functional.cross_entropy(logits_TV[:scored].float(), targets, reduction="sum")
            total, count, row = total + float(loss), count + scored, row + 1
    return total / max(count, 1)


# what stays


def without_others(checkpoint: Checkpoint, blocks: Sequence[int]) -> ReshapedCheckpoint:
    """The checkpoint with these blocks alone, numbered anew, and what its config says per layer as lists of theirs."""
    return with_blocks(checkpoint, blocks, per_layer(checkpoint, blocks), without=PATTERNS)


def per_layer(checkpoint: Checkpoint, blocks: Sequence[int]) -> dict[str, Any]:
    """Entries of config.json that speak of single layers, for these layers. What transformers computes from a layer's
    number is stated, since the numbers change."""
    found: dict[str, Any] = {}
    resolved = getattr(checkpoint.skeleton.config, "layer_types", None)
    if resolved is not None:
        kinds = [resolved[block] for block in blocks]
        found["layer_types"] = kinds
        if "max_window_layers" in checkpoint.config:
            sliding = (index for index, kind in enumerate(kinds) if kind == "sliding_attention")
            found["max_window_layers"] = next(sliding, len(kinds))
    elif "max_window_layers" in checkpoint.config:
        found["max_window_layers"] = min(checkpoint.config["max_window_layers"], len(blocks))
    if checkpoint.model_type == "qwen3_moe":
        dense = [new for new, old in enumerate(blocks) if not checkpoint.expert_count(old)]
        found |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return found


# the plan


def choice_cost(settings: Depth, checkpoint: Checkpoint, tokens: Tokens | None, count: int) -> Cost:
    """Of finding out which blocks go. Perplexity takes a model without some blocks through memory for each choice."""
    total = checkpoint.num_blocks
    leaving = total - count
    one_by_one = not settings.contiguous and settings.order == "one_by_one"
    sizes = range(total, count, -1) if one_by_one else [total] if leaving else []
    length = leaving if settings.contiguous else 1
    if settings.importance == "influence":
        looked_at = 0 if tokens is None else min(LOOKED_AT, tokens.count)
        held = looked_at * checkpoint.config["hidden_size"] * (length * checkpoint.dtype.itemsize + 3 * 8)
        return reading_cost(checkpoint, tokens, blocks=sum(sizes), heads=0, beside_bytes=held)
    choices = [size - length + 1 for size in sizes]
    blocks = sum(choice * (size - length) for choice, size in zip(choices, sizes, strict=True))
    return reading_cost(checkpoint, tokens, blocks=blocks, heads=sum(choices), beside_bytes=0)
