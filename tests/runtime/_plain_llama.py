"""A Llama in plain torch, whose attention a test brings along: what a policy for keys and values ought to give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def plain_logits(
    folder: Path, config, ids: list[int], attended: Callable[[int, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Logits [T, V]. `attended(layer, q [T, H, D], k [T, G, D], v [T, G, D])` gives [T, H * D]."""
    w = load_file(folder / "model.safetensors")
    layer = config.layers[0]
    heads, groups, width = layer.heads, layer.kv_heads, layer.head_dim
    frequency = layer.rope.theta ** -(torch.arange(0, width, 2).float() / width)
    angle = torch.arange(len(ids))[:, None] * frequency
    cosine, sine = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt() * w[name]

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-high, low), dim=-1) * sine

    x = w["model.embed_tokens.weight"][ids]
    for index in range(len(config.layers)):
        at = f"model.layers.{index}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (y @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k = rotated(q.view(-1, heads, width)), rotated(k.view(-1, groups, width))
        y = attended(index, q, k, v.view(-1, groups, width))
        x = x + y @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T
