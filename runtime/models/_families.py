"""What the families of compress.core.architectures compute differently from Llama, and what their configs leave out.

Defaults are those of transformers' config classes: files often omit a value that equals the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which layers have a sliding window: all (if there is a window), those from max_window_layers on, every other one
# beginning with the first, all but each sliding_window_pattern-th.
Windows = Literal["none", "all", "from_layer", "alternate", "pattern"]


@dataclass(frozen=True, slots=True)
class ExpertDefaults:
    """`normalised` None reads norm_topk_prob; `own_width` reads moe_intermediate_size."""

    count: int
    active: int
    normalised: bool | None
    own_width: bool


@dataclass(frozen=True, slots=True)
class Family:
    """Differences as data. A field that a family does not read stays unread, and is refused if a file sets it."""

    windows: Windows = "none"
    window: int | None = None
    window_switch: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    bias_setting: bool = False
    qkv_bias: bool = False
    mlp_bias_setting: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    score_softcap: float | None = None
    logit_softcap_setting: bool = False
    logit_softcap: float | None = None
    scales_embedding: bool = False
    query_scalar: int | None = None
    activation_key: str = "hidden_act"
    activation: str = "silu"
    rope_theta: float = 10_000.0
    local_rope: bool = False
    longrope: bool = False
    experts: ExpertDefaults | None = None


_GEMMA2 = Family(
    windows="alternate",
    window=4096,
    kv_heads=4,
    head_dim=256,
    tied=True,
    bias_setting=True,
    sandwich_norms=True,
    score_softcap=50.0,
    logit_softcap_setting=True,
    logit_softcap=30.0,
    scales_embedding=True,
    query_scalar=256,
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(bias_setting=True, mlp_bias_setting=True),
    "mistral": Family(windows="all", window=4096, kv_heads=8),
    "qwen2": Family(windows="from_layer", window=4096, window_switch=True, kv_heads=32, qkv_bias=True),
    "qwen3": Family(
        windows="from_layer",
        window=4096,
        window_switch=True,
        kv_heads=32,
        head_dim=128,
        bias_setting=True,
        qk_norm=True,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": Family(
        windows="pattern",
        window=4096,
        kv_heads=4,
        head_dim=256,
        tied=True,
        bias_setting=True,
        qk_norm=True,
        sandwich_norms=True,
        logit_softcap_setting=True,
        scales_embedding=True,
        query_scalar=256,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        rope_theta=1_000_000.0,
        local_rope=True,
    ),
    "phi3": Family(windows="all", norm_eps=1e-5, longrope=True),
    "mixtral": Family(
        windows="all",
        kv_heads=8,
        norm_eps=1e-5,
        rope_theta=1_000_000.0,
        experts=ExpertDefaults(count=8, active=2, normalised=True, own_width=False),
    ),
    "qwen3_moe": Family(
        windows="all",
        window=4096,
        window_switch=True,
        kv_heads=4,
        bias_setting=True,
        qk_norm=True,
        experts=ExpertDefaults(count=128, active=8, normalised=None, own_width=True),
    ),
}
