"""Write a small Llama folder that copies over any distance, its weights set by hand: to test recall of long contexts.

    python benchmarks/make_induction_model.py DIR [--context 131072] [--heads 4] [--kv-heads 2] [--dtype float32]

The model looks for the place where the last 12 bytes stood before and gives the byte that followed there (induction
heads: Olsson et al. 2022, https://arxiv.org/abs/2209.11895). `… the code of amber is 5821. … the code of amber is` goes
on with ` 5821.`, whatever lies between. It has learned nothing: text that repeats nothing is noise to it.

How: a byte is eight channels of ±1. Four layers copy what they know of the token 1, 2, 4, 8 places before, so that each
position knows its last 12 predecessors; the fifth compares these with the keys of all positions and copies the best
match. Distances are told by the fast channels of the rotary embedding, bytes are compared in channels so slow that they
hardly turn in a million tokens (theta 2^64). Every query head does the same, with a share of the output.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from make_models import write_tokenizer

if TYPE_CHECKING:
    import torch

BITS = 8  # channels of a byte
MATCHED_BITS = 7  # all but the highest: tokens 128 apart look alike
WINDOW = 12  # bytes that are compared
SHIFTS = (1, 2, 4, 8)
HIDDEN, HEAD_DIM, FFN, VOCABULARY = 128, 128, 32, 258
FOUND = BITS * (WINDOW + 1)  # first channel of what was found; before it lie the token and its predecessors
CONSTANT = FOUND + BITS
CONSTANT_SIZE = 16.0  # large beside the rest, so that norms hardly depend on the text
PAIRS = HEAD_DIM // 2
FAST, SLOW = 18, 22  # pair i turns by 2^-i a token: those below FAST tell distances, those from SLOW on hold bytes
SHIFT_SCORE = 32.0  # of each fast pair at its distance: one place off is worth 0.62 of it
MATCH_SCORE = 6.0  # of each equal bit: an unequal one costs twice as much
CERTAINTY = 3.0  # logit of each bit: σ(6)^8 = 98 % for a byte found
EPSILON = 1e-6


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int


def config(heads: Heads, context_tokens: int, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": context_tokens,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads.queries,
        "num_hidden_layers": len(SHIFTS) + 1,
        "num_key_value_heads": heads.keys,
        "rms_norm_eps": EPSILON,
        "rope_theta": 2.0**PAIRS,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": VOCABULARY,
    }


def place(slot: int, bit: int) -> int:
    """Channel of a bit of the token (slot 0) or of the one `slot` places before it."""
    return BITS * slot + bit


def after_norm(slots: int) -> float:
    """What RMSNorm makes of a 1 in a text of many tokens, where so many groups of eight channels are filled."""
    return 1 / math.sqrt((BITS * slots + CONSTANT_SIZE**2) / HIDDEN + EPSILON)


def codes() -> "torch.Tensor":
    """[V, 8] ±1; the special tokens are nothing."""
    import torch

    bits = torch.arange(256)[:, None] >> torch.arange(BITS) & 1
    return torch.cat((2.0 * bits - 1, torch.zeros(VOCABULARY - 256, BITS)))


def shift_layer(distance: int, heads: Heads) -> dict[str, "torch.Tensor"]:
    """Copy slots 0 … from the token `distance` places before to slots `distance` …"""
    import torch

    one = after_norm(distance)
    q, k = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
    v, o = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HIDDEN, HEAD_DIM)
    size = math.sqrt(SHIFT_SCORE * math.sqrt(HEAD_DIM)) / (CONSTANT_SIZE * one)
    for pair in range(FAST):
        angle = distance * 2.0**-pair
        k[pair, CONSTANT] = size
        q[pair, CONSTANT], q[pair + PAIRS, CONSTANT] = size * math.cos(angle), -size * math.sin(angle)
    for channel in range(BITS * min(distance, WINDOW + 1 - distance)):
        v[channel, channel] = 1.0
        o[BITS * distance + channel, channel] = 1 / one
    return _attention(q, k, v, o, heads)


def match_layer(heads: Heads) -> dict[str, "torch.Tensor"]:
    """Find where the predecessors are what the last tokens are now, and copy the token there."""
    import torch

    one = after_norm(WINDOW + 1)
    q, k = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
    v, o = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HIDDEN, HEAD_DIM)
    size = math.sqrt(MATCH_SCORE * math.sqrt(HEAD_DIM)) / one
    slow = [*range(SLOW, PAIRS), *range(PAIRS + SLOW, HEAD_DIM)]
    for before in range(WINDOW):
        for bit in range(MATCHED_BITS):
            channel = slow[before * MATCHED_BITS + bit]
            q[channel, place(before, bit)] = size
            k[channel, place(before + 1, bit)] = size
    for bit in range(BITS):
        v[bit, place(0, bit)] = 1.0
        o[FOUND + bit, bit] = 1 / one
    return _attention(q, k, v, o, heads)


def _attention(
    q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", o: "torch.Tensor", heads: Heads
) -> dict[str, "torch.Tensor"]:
    return {
        "self_attn.q_proj": q.repeat(heads.queries, 1),
        "self_attn.k_proj": k.repeat(heads.keys, 1),
        "self_attn.v_proj": v.repeat(heads.keys, 1),
        "self_attn.o_proj": o.repeat(1, heads.queries) / heads.queries,
    }


def tensors(heads: Heads) -> dict[str, "torch.Tensor"]:
    import torch

    embedding = torch.zeros(VOCABULARY, HIDDEN)
    embedding[:, :BITS] = codes()
    embedding[:, CONSTANT] = CONSTANT_SIZE
    head = torch.zeros(VOCABULARY, HIDDEN)
    head[:, FOUND:CONSTANT] = codes() * CERTAINTY / after_norm(WINDOW + 2)
    found = {"model.embed_tokens": embedding, "lm_head": head, "model.norm": torch.ones(HIDDEN)}
    for number, layer in enumerate([*(shift_layer(shift, heads) for shift in SHIFTS), match_layer(heads)]):
        layer |= {"input_layernorm": torch.ones(HIDDEN), "post_attention_layernorm": torch.ones(HIDDEN)}
        layer |= {f"mlp.{name}_proj": torch.zeros(FFN, HIDDEN) for name in ("gate", "up")}
        layer |= {"mlp.down_proj": torch.zeros(HIDDEN, FFN)}
        found |= {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
    return {f"{name}.weight": tensor.contiguous() for name, tensor in found.items()}


def make_model(
    folder: Path, *, heads: int = 4, kv_heads: int = 2, context_tokens: int = 131072, dtype: str = "float32"
) -> None:
    """Write the folder: weights, config, byte-level tokenizer."""
    import torch
    from safetensors.torch import save_file

    if heads % kv_heads:
        raise SystemExit(f"{heads} heads cannot share {kv_heads} key-value heads evenly")
    folder.mkdir(parents=True, exist_ok=True)
    shape = Heads(heads, kv_heads)
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(shape).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(shape, context_tokens, dtype), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}) + "\n")
    write_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    make_model(
        asked.folder, heads=asked.heads, kv_heads=asked.kv_heads, context_tokens=asked.context, dtype=asked.dtype
    )


if __name__ == "__main__":
    main()
