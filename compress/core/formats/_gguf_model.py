"""A model's config and names as GGUF has them: metadata keys, tensor names, the order of rotary rows.

Keys and names: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py. Families beyond FAMILIES are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.errors import InputError
from compress.core.formats._gguf_container import Value, f32, text, u32
from compress.core.sizes import PER_LAYER_KEY, widths_of


@dataclass(frozen=True, slots=True)
class Family:
    """`name` in GGUF. `pairs`: its rotary turns neighbours (2i, 2i + 1), where transformers turns (i, i + half)."""

    name: str
    pairs: bool


FAMILIES = {
    "llama": Family("llama", pairs=True),
    "mistral": Family("llama", pairs=True),
    "qwen2": Family("qwen2", pairs=False),
    "qwen3": Family("qwen3", pairs=False),
}
ROPE_FACTORS = "rope_freqs.weight"
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAME = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json; InputError names what llama.cpp would compute otherwise."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{kind} models are not written as gguf", where="config.json", hint=f"these are: {known}")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"llama.cpp computes silu, not {config['hidden_act']!r}", where="config.json: hidden_act")
    window = config.get("sliding_window")
    slides = config.get("use_sliding_window", True) if str(kind).startswith("qwen") else True
    if window and slides and window < config.get("max_position_embeddings", math.inf):
        raise InputError(
            f"llama.cpp knows no sliding window of {window} for {kind} models", where="config.json: sliding_window"
        )
    return FAMILIES[kind]


def metadata(config: Mapping[str, Any], name: str, file_type: int) -> dict[str, Value]:
    """Everything but the tokenizer. InputError for a rotary embedding that GGUF cannot express."""
    family = family_of(config).name
    if widths_of(config) is not None:
        raise InputError(
            f"layers differ in width, and llama.cpp reads one width for all layers of {config['model_type']} models",
            where=f"config.json: {PER_LAYER_KEY}",
            hint="compress level pads them",
        )
    rope = _rope(config)
    found = {
        "general.architecture": text(family),
        "general.type": text("model"),
        "general.name": text(name),
        "general.file_type": u32(file_type),
        "general.quantization_version": u32(2),
        f"{family}.block_count": u32(config["num_hidden_layers"]),
        f"{family}.context_length": u32(config["max_position_embeddings"]),
        f"{family}.embedding_length": u32(config["hidden_size"]),
        f"{family}.feed_forward_length": u32(config["intermediate_size"]),
        f"{family}.attention.head_count": u32(config["num_attention_heads"]),
        f"{family}.attention.head_count_kv": u32(_key_heads(config)),
        f"{family}.attention.key_length": u32(head_width(config)),
        f"{family}.attention.value_length": u32(head_width(config)),
        f"{family}.attention.layer_norm_rms_epsilon": f32(config["rms_norm_eps"]),
        f"{family}.rope.dimension_count": u32(head_width(config)),
        f"{family}.rope.freq_base": f32(rope["rope_theta"]),
        f"{family}.vocab_size": u32(config["vocab_size"]),
    }
    if rope["rope_type"] == "linear":
        found[f"{family}.rope.scaling.type"] = text("linear")
        found[f"{family}.rope.scaling.factor"] = f32(rope["factor"])
    return found


def head_width(config: Mapping[str, Any]) -> int:
    """Channels of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _key_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_type and the numbers of the type; older configs have them in two places."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"rotary embeddings of type {kind!r} are not written as gguf", where="config.json")
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**scaling, "rope_type": kind, "rope_theta": theta}


def rope_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """By what llama.cpp divides each rotary frequency, fp32 [head / 2]; None where all are as they are.

    Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    half = head_width(config) // 2
    frequency = rope["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).float()


def tensor_name(name: str) -> str:
    """Name in GGUF of a tensor of the model (a quantized module's weight counts as `module.weight`)."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in _INSIDE:
        raise InputError("has no name in gguf", where=name)
    return f"blk.{match['layer']}.{_INSIDE[match['part']]}.{match['kind']}"


def rotary_rows(name: str, config: Mapping[str, Any]) -> torch.Tensor | None:
    """The rows of the source in the order that llama.cpp wants them in, None where that is the same.

    Heads stay where they are; inside each, halves become pairs: rows 0, half, 1, half + 1 …
    """
    if not family_of(config).pairs or ".self_attn.q_proj." not in name and ".self_attn.k_proj." not in name:
        return None
    heads = config["num_attention_heads"] if ".q_proj." in name else _key_heads(config)
    width = head_width(config)
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)
