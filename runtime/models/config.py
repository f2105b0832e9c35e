"""What a decoder-only model looks like, whatever its family. Plain data; runtime.models.reading fills it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Activation", "Experts", "LayerConfig", "ModelConfig", "Rope", "RopeKind"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: `fraction` of a head's channels is rotated with base `theta`; angles are scaled by `kind`.

    Linear, llama3 and yarn divide frequencies by `factor`, the latter two only the slow ones; longrope divides each by
    its own of `factors`. cos and sin are multiplied by `attention_factor`. `original_length` is that of the training.
    """

    theta: float
    fraction: float = 1.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def channels(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: each token goes to `active` of `count`; shares add up to one if `normalised`."""

    count: int
    active: int
    normalised: bool


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer. `scale` multiplies query-key products; `window` None sees all earlier positions; `ffn` is the
    inner width of the feed-forward, that of each expert if there are experts."""

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    scale: float
    window: int | None
    rope: Rope
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model. `max_length` is the most tokens a sequence may have, prompt and answer together."""

    family: str
    hidden: int
    vocab: int
    layers: tuple[LayerConfig, ...]
    max_length: int
    activation: Activation
    norm_eps: float
    tied: bool
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
