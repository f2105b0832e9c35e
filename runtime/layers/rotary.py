"""Rotary position embedding: the angles of each kind. runtime.ops.rotary applies them.

RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864. YaRN: Peng et al. 2023, https://arxiv.org/abs/2309.00071.
LongRoPE: Ding et al. 2024, https://arxiv.org/abs/2402.13753. The blending of Llama 3.1 is that of its reference code.

Shape suffixes: T tokens, R rotated channels of a head, F = R / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from runtime.models.config import Rope


class Rotary(nn.Module):
    """cos and sin, fp32 [T, R], of logical positions: for all layers that share `rope` and `head_dim`. They hold each
    angle twice, once for either half of the rotated channels."""

    frequency_F: Tensor

    def __init__(self, rope: Rope, head_dim: int, device: str) -> None:
        super().__init__()
        self.register_buffer("frequency_F", frequencies(rope, head_dim).to(device), persistent=False)
        self.attention_factor = rope.attention_factor

    def forward(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        angle_TF = position_T[:, None].float() * self.frequency_F
        angle_TR = torch.cat((angle_TF, angle_TF), dim=-1)
        return angle_TR.cos() * self.attention_factor, angle_TR.sin() * self.attention_factor


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position of each pair of channels, fp32 [F], in the order of operations that transformers uses."""
    channels = rope.channels(head_dim)
    exponent_F = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    wave_F = rope.theta**exponent_F
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.factors, dtype=torch.float32) * wave_F)
    plain_F = 1.0 / wave_F
    if rope.kind == "linear":
        return plain_F / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain_F, rope)
    if rope.kind == "yarn":
        return _yarn(wave_F, rope, channels)
    return plain_F


def _llama3(plain_F: Tensor, rope: Rope) -> Tensor:
    """Fast frequencies stay, slow ones are divided by the factor, those between are blended."""
    turns_F = rope.original_length / (2 * math.pi / plain_F)
    blend_F = (turns_F - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend_F = blend_F.clamp(0, 1)
    return (1 - blend_F) * plain_F / rope.factor + blend_F * plain_F


def _yarn(wave_F: Tensor, rope: Rope, channels: int) -> Tensor:
    """Channels that turn often within the original length stay, those that hardly turn are divided by the factor."""
    low, high = (_turning(turns, rope, channels) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001  # a ramp needs some width
    slow_F = ((torch.arange(channels // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return slow_F / (rope.factor * wave_F) + (1 - slow_F) / wave_F


def _turning(turns: float, rope: Rope, channels: int) -> float:
    """The channel pair, as a fraction, that makes so many turns within the original length."""
    return channels * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
