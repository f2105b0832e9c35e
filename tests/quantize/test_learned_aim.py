"""What the last block's rounding is learned from: the gradient of KL as autograd finds it in the whole, in little
memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.core.checkpoint import Checkpoint
from quantize import _learned_aim
from quantize._learned_aim import Words
from tests.conftest import TinyModel

TOKENS = 23  # no multiple of the parts below


@pytest.fixture
def states_ND() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target_ND = torch.randn(TOKENS, 64)
    return target_ND + 0.3 * torch.randn(TOKENS, 64), target_ND


def words(checkpoint: Checkpoint, dtype: torch.dtype) -> Words:
    return Words(checkpoint.build_head(dtype), dtype, checkpoint.config["vocab_size"])


def test_error_and_gradient_are_those_of_the_divergence_of_all_tokens(
    tiny_model: TinyModel, states_ND: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma-2 caps its logits behind the head."""
    checkpoint = Checkpoint.open(tiny_model("gemma2"))
    vocabulary = checkpoint.config["vocab_size"]
    monkeypatch.setattr(_learned_aim, "LOGITS_BYTES", 4 * vocabulary * 7)
    monkeypatch.setattr(_learned_aim, "_CACHED_BYTES", 4 * vocabulary * 2)
    model = checkpoint.build_model(torch.float32)
    cap = model.config.final_logit_softcapping

    def logits(x_ND: Tensor) -> Tensor:
        return torch.tanh(model.lm_head(model.model.norm(x_ND)) / cap) * cap

    y_ND, target_ND = states_ND
    leaf_ND = y_ND.clone().requires_grad_()
    with torch.no_grad():
        wanted_NV = logits(target_ND).softmax(-1)
    divergence = (wanted_NV * (wanted_NV.log() - logits(leaf_ND).log_softmax(-1))).sum()
    divergence.backward()
    aim = words(checkpoint, torch.float32)
    assert aim.error(y_ND, target_ND) == pytest.approx(float(divergence.detach()), rel=1e-4)
    torch.testing.assert_close(aim.gradient(y_ND, target_ND), leaf_ND.grad, rtol=1e-4, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Rows of the largest matrix of logits that any operation makes, and of the largest one in fp32."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.fp32 = self.every = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        is_weight = func is torch.ops.aten.t.default
        if isinstance(found, Tensor) and found.shape[-1:] == (self.vocabulary,) and not is_weight:
            rows = found.numel() // self.vocabulary
            self.every = max(self.every, rows)
            self.fp32 = max(self.fp32, rows if found.dtype is torch.float32 else 0)
        return found


def test_logits_are_held_in_parts_and_in_fp32_in_smaller_ones(
    tiny_model: TinyModel, states_ND: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    vocabulary = checkpoint.config["vocab_size"]
    monkeypatch.setattr(_learned_aim, "LOGITS_BYTES", 4 * vocabulary * 12)
    monkeypatch.setattr(_learned_aim, "_CACHED_BYTES", 4 * vocabulary * 5)
    aim = words(checkpoint, torch.bfloat16)
    for work in (aim.gradient, aim.error):
        with _Largest(vocabulary) as seen:
            found = work(*states_ND)
        assert (seen.every, seen.fp32) == (12, 5)
        assert math.isfinite(float(torch.as_tensor(found).sum()))
