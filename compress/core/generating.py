"""What it costs to let a model complete prompts in the bundled runtime, in exact numerics: from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.core.memory import Cost, groups_of, machine_speed

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.services import Sampling

STEP_EFFICIENCY = 0.25  # of the probed product: few rows read all weights
LAYER_SECONDS = 0.5e-3  # of a layer in a step, beside its products
PAGE_TOKENS = 16  # keys and values are allotted by so many tokens
READ_TOKENS = 512  # of prompts that are read in a step


def generating_cost(checkpoint: Checkpoint, sampling: Sampling, prompts: int) -> Cost:
    """Memory of an fp32 copy of the model, of keys and values for `sampling.at_once` sequences and of a step; minutes
    for `prompts` completions at their longest."""
    config, blocks = checkpoint.config, [groups_of(checkpoint, index) for index in range(checkpoint.num_blocks)]
    numbers = sum(info.bytes for info in checkpoint.tensors.values()) // checkpoint.dtype.itemsize
    used = sum(group.rows * group.width * group.share for groups in blocks for group in groups)
    used += config["hidden_size"] * config["vocab_size"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    longest = sampling.prompt_tokens + sampling.new_tokens
    at_once = min(sampling.at_once, max(prompts, 1))
    pages = sampling.at_once * -(-longest // PAGE_TOKENS)
    pool = pages * PAGE_TOKENS * 2 * heads * head_dim * len(blocks) * 4
    widest = max(sum(group.rows + group.width for group in groups) for groups in blocks)
    step = 4 * (READ_TOKENS * widest + 2 * sampling.at_once * config["vocab_size"])
    products = 2 * used * prompts * longest / STEP_EFFICIENCY / machine_speed().matmul
    steps = -(-prompts // at_once) * sampling.new_tokens
    seconds = products + steps * LAYER_SECONDS * len(blocks)
    return Cost(4 * numbers + pool + step, 0, seconds / 60)
