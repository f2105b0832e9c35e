"""The demo model: a small Llama with grouped queries, and its initial weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512
VOCABULARY = 2048


def build_model(bos_id: int, eos_id: int, pad_id: int, generator: torch.Generator) -> LlamaForCausalLM:
    """The untrained model in float32, its weights drawn from `generator`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    model = LlamaForCausalLM(config)
    for name, param in model.named_parameters():
        if param.ndim == 2:
            writes_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if writes_to_residual else 1.0
            torch.nn.init.normal_(param, std=0.02 * scale, generator=generator)
    return model
