"""Tiny random models of every family, built in code and saved as ordinary model folders with a byte-level tokenizer.

The plain form has the usual proportions; the odd one has head_dim ≠ hidden / heads, seven queries to a key-value head,
widths that few group sizes divide and a vocabulary that is no multiple of 64. Sliding windows are shorter than the
token sequences of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LAYERS = 3
WINDOW = 8
PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}
ODD: dict[str, Any] = {
    "hidden_size": 112,
    "intermediate_size": 160,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "vocab_size": 311,
}
COMMON: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
ODD_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "phi3": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    "qwen3_moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": False},
}


def config_of(family: str, odd: bool = False) -> dict[str, Any]:
    """The settings of a tiny model's config."""
    return COMMON | (ODD if odd else PLAIN) | FAMILIES[family] | (ODD_EXTRAS.get(family, {}) if odd else {})


def build(folder: Path, family: str, odd: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save the tiny model of `family` with its tokenizer in `folder`."""
    config = AutoConfig.for_model(family, **config_of(family, odd))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, <s> = 256, </s> = 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that a mistake anywhere shows in the logits; norms and biases differ per channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.2 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
