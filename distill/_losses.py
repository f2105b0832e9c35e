"""Losses between the next-token distributions of a student and a teacher: p the teacher's, q the student's.

Everything happens in log space and fp32, one value per token, and over a chunk of tokens at a time: logits [N, V] of
more than one chunk are never held, neither forwards nor backwards.

Shape suffixes: N tokens, V vocabulary, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill._divergences import Divergence

Logits = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Which divergence, at which temperature, and how much of the cross entropy to the text's own tokens is added.

    `mix` is beta of jsd (Agarwal et al., 2024, arXiv:2306.13649: near 0 it acts like the forward KL, near 1 like the
    reverse) and alpha of the skewed ones (Ko et al., 2024, arXiv:2402.03898); `alpha` and `beta` are those of
    alpha_beta (Wang et al., 2025, arXiv:2505.04560).
    """

    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    mix: float = 0.5
    alpha: float = 0.2
    beta: float = 0.7
    cross_entropy: float = 0.0

    def of_tokens(self, student_NV: Tensor, teacher_NV: Tensor, target_N: Tensor) -> Tensor:
        """The loss of each token, fp32 [N], from logits; -100 as a target counts for nothing."""
        log_p_NV, log_q_NV = self._log_softmax(teacher_NV), self._log_softmax(student_NV)
        return self.with_text(self.temperature**2 * self.divergence_of(log_p_NV, log_q_NV), student_NV, target_N)

    def with_text(self, loss_N: Tensor, student_NV: Tensor, target_N: Tensor) -> Tensor:
        """These losses with the share of the cross entropy to the text's own tokens."""
        if self.cross_entropy:
            own_N = torch.nn.functional.cross_entropy(student_NV.float(), target_N, ignore_index=-100, reduction="none")
            loss_N = (1 - self.cross_entropy) * loss_N + self.cross_entropy * own_N
        return torch.where(target_N == -100, 0.0, loss_N)

    def _log_softmax(self, logits_NV: Tensor) -> Tensor:
        warm_NV = logits_NV.float()
        return torch.log_softmax(warm_NV if self.temperature == 1 else warm_NV / self.temperature, dim=-1)

    def divergence_of(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        """D(p, q) of each row, [N], from log-probabilities."""
        match self.divergence:
            case "forward_kl":
                return kl(log_p_NV, log_q_NV)
            case "reverse_kl":
                return kl(log_q_NV, log_p_NV)
            case "jsd":
                middle_NV = mixed(log_p_NV, log_q_NV, self.mix)
                return self.mix * kl(log_p_NV, middle_NV) + (1 - self.mix) * kl(log_q_NV, middle_NV)
            case "skew_kl":
                return kl(log_p_NV, mixed(log_p_NV, log_q_NV, self.mix))
            case "skew_rkl":
                return kl(log_q_NV, mixed(log_q_NV, log_p_NV, self.mix))
            case "alpha_beta":
                return alpha_beta(log_p_NV, log_q_NV, self.alpha, self.beta)
            case "tv":
                return 0.5 * (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Σ p (log p - log q), [N]; where p is zero nothing counts."""
    p_NV = log_p_NV.exp()
    return torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(-1)


def mixed(log_p_NV: Tensor, log_q_NV: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    if share in (0.0, 1.0):
        return log_p_NV if share else log_q_NV
    return torch.logaddexp(log_p_NV + math.log(share), log_q_NV + math.log1p(-share))


def alpha_beta(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float, beta: float) -> Tensor:
    """The alpha-beta divergence; alpha, beta and their sum must not be zero (the limits are other names here)."""
    both = alpha + beta
    cross_NV = torch.exp(alpha * log_p_NV + beta * log_q_NV)
    p_NV, q_NV = torch.exp(both * log_p_NV), torch.exp(both * log_q_NV)
    return -(cross_NV - alpha / both * p_NV - beta / both * q_NV).sum(-1) / (alpha * beta)


def chunked(
    loss: Loss,
    student: tuple[Tensor, Logits],
    teacher: tuple[Tensor, Logits],
    target_N: Tensor,
    chunk_tokens: int,
) -> Tensor:
    """The mean loss over all tokens with a target; 0 if there is none. `student`, `teacher`: hidden states [N, D], and
    what makes logits of them."""
    hidden_ND, head = student

    def part(hidden_ND: Tensor, taught_ND: Tensor, target_N: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_NV = teacher[1](taught_ND)
        student_NV = head(hidden_ND)
        width = min(student_NV.shape[-1], teacher_NV.shape[-1])  # padding rows behind the vocabulary
        return loss.of_tokens(student_NV[:, :width], teacher_NV[:, :width], target_N).sum()

    return mean_in_chunks(part, (hidden_ND, teacher[0]), target_N, chunk_tokens)


def mean_in_chunks(
    summed: Callable[..., Tensor], tensors: tuple[Tensor, ...], target_N: Tensor, chunk_tokens: int
) -> Tensor:
    """The mean over all tokens with a target of what `summed` gives for rows of `tensors` and targets, so many at a
    time; computed again for the gradient, so that nothing as wide as the vocabulary is kept."""
    hidden_ND = tensors[0]
    total = hidden_ND.new_zeros((), dtype=torch.float32) + 0.0 * hidden_ND.float().sum()  # a graph even without tokens
    for start in range(0, len(target_N), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        total = total + checkpoint(summed, *(each[rows] for each in tensors), target_N[rows], use_reentrant=False)
    return total / max(int((target_N != -100).sum()), 1)
