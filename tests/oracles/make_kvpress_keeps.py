"""What kvpress keeps: random keys, values and attention of one layer, and the slots that its presses would keep.

    pip install kvpress==0.5.5
    python tests/oracles/make_kvpress_keeps.py tests/oracles/expected/kvpress-keeps.safetensors

Run it with kvpress installed; the tests read what it wrote and need no kvpress. The layer is transformers' Llama
attention with random weights, so that presses that look into it (expected attention) find what they expect.
"""

import sys

import kvpress
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

HEADS, GROUPS, WIDTH, TOKENS, HIDDEN = 4, 2, 16, 48, 64
WINDOW, SINKS = 6, 4
KEPT = (12, 24, 40)
LAYERS, BETA, SAFE = 4, 3, 0.2  # of pyramidkv and adakv


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=WIDTH,
        num_hidden_layers=1, max_position_embeddings=1024, rope_theta=10000.0, vocab_size=8, intermediate_size=8,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = LlamaAttention(config, 0)
    layer.rotary_emb = LlamaRotaryEmbedding(config)
    for linear in (layer.q_proj, layer.k_proj, layer.v_proj):
        torch.nn.init.normal_(linear.weight, std=0.3)
    hidden = torch.randn(1, TOKENS, HIDDEN) + torch.randn(HIDDEN)  # not centred: means matter
    positions = layer.rotary_emb(hidden, torch.arange(TOKENS)[None])
    with torch.no_grad():
        q, k, v = (
            linear(hidden).view(1, TOKENS, -1, WIDTH).transpose(1, 2)
            for linear in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *positions)
        spread = k.repeat_interleave(HEADS // GROUPS, dim=1)
        score = q @ spread.transpose(2, 3) / WIDTH**0.5
        score += torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
        attention = score.softmax(-1)
        presses = {
            "streaming": kvpress.StreamingLLMPress(n_sink=SINKS),
            "key_norm": kvpress.KnormPress(),
            "keydiff": kvpress.KeyDiffPress(),
            "tova": kvpress.TOVAPress(),
            "snapkv": kvpress.SnapKVPress(window_size=WINDOW),
            "expected_attention": kvpress.ExpectedAttentionPress(n_sink=SINKS),
        }
        stored = {"q": q[0], "k": k[0], "v": v[0], "frequency": layer.rotary_emb.inv_freq}
        for name, press in presses.items():
            for kept in KEPT:
                press.compression_ratio = 1 - (kept + 0.5) / TOKENS
                given = attention if name in ("tova", "snapkv") else None
                scores = press.score(layer, hidden, k, v, given, {"position_embeddings": positions})
                stored[f"{name}.{kept}"] = scores[0].topk(kept, dim=-1).indices.sort(-1).values.to(torch.int32)
        stored |= pyramid(layer, hidden, k, v, attention, positions) | adaptive(
            layer, hidden, k, v, attention, positions
        )
    save_file({key: value.contiguous() for key, value in stored.items()}, sys.argv[1], metadata={"kvpress": "0.5.5"})


def pyramid(layer, hidden, k, v, attention, positions) -> dict[str, torch.Tensor]:
    """What each of LAYERS layers would keep of these inputs."""
    layer.config.num_hidden_layers, found = LAYERS, {}
    for kept in KEPT:
        press = kvpress.PyramidKVPress(1 - kept / TOKENS, window_size=WINDOW, beta=BETA)
        for index in range(LAYERS):
            layer.layer_idx = index
            count = press.get_layer_budget(layer, TOKENS)
            scores = press.score(layer, hidden, k, v, attention, {"position_embeddings": positions})
            found[f"pyramidkv.{kept}.{index}"] = scores[0].topk(count, dim=-1).indices.sort(-1).values.to(torch.int32)
    layer.layer_idx = 0
    return found


def adaptive(layer, hidden, k, v, attention, positions) -> dict[str, torch.Tensor]:
    """Which slots of each head stay, as a mask."""
    found = {}
    for kept in KEPT:
        press = kvpress.AdaKVPress(kvpress.SnapKVPress(1 - (kept + 0.5) / TOKENS, window_size=WINDOW), SAFE)
        layer.config._attn_implementation = "sdpa"  # which the press asks for, and does not use
        press.compress(layer, hidden, k, v, attention, {"position_embeddings": positions})
        _, heads, slots = layer.masked_key_indices
        stays = torch.ones(GROUPS, TOKENS, dtype=torch.uint8)
        stays[heads, slots] = 0
        found[f"adakv.{kept}"] = stays
    return found


if __name__ == "__main__":
    main()
