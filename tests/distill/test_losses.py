"""Losses of distillation: values and gradients against the formulas written out naively, in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill._divergences import Divergence
from distill._logits import tokens_at_once
from distill._losses import Loss, chunked

TRL = load_file(Path(__file__).parents[1] / "oracles" / "trl-losses.safetensors")

every = pytest.mark.parametrize("divergence", get_args(Divergence))


def logits(seed: int, rows: int = 7, width: int = 11, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(divergence: str, student_NV: Tensor, teacher_NV: Tensor, temperature: float, mix: float) -> Tensor:
    """By probabilities, as in the papers."""
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher_NV, student_NV))
    alpha, beta = 0.2, 0.7
    both = alpha + beta

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = mix * p + (1 - mix) * q
    found = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: mix * kl(p, m) + (1 - mix) * kl(q, m),
        "skew_kl": lambda: kl(p, m),
        "skew_rkl": lambda: kl(q, mix * q + (1 - mix) * p),
        "alpha_beta": lambda: (
            -(p**alpha * q**beta - alpha / both * p**both - beta / both * q**both).sum(-1) / (alpha * beta)
        ),
        "tv": lambda: 0.5 * (p - q).abs().sum(-1),
    }  # fmt: skip
    return temperature**2 * found[divergence]()


@every
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values_and_gradients_are_those_of_the_formula(divergence: Divergence, temperature: float) -> None:
    student, wanted_student = logits(1).requires_grad_(), logits(1).requires_grad_()
    teacher, targets = logits(2), torch.arange(7)
    loss = Loss(divergence, temperature, mix=0.3)
    found = loss.of_tokens(student, teacher, targets)
    wanted = naive(divergence, wanted_student, teacher, temperature, 0.3)
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    assert torch.allclose(student.grad, wanted_student.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("number", range(len(TRL["cases"])))
def test_values_and_gradients_are_those_of_trl(number: int) -> None:
    """Its GKD loss (oracles/make_trl_losses.py), which leaves out the square of the temperature."""
    beta, temperature, masked = TRL["cases"][number].tolist()
    divergence: Divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")  # type: ignore[assignment]
    student, teacher = TRL["student"].flatten(0, 1).clone().requires_grad_(), TRL["teacher"].flatten(0, 1)
    labels = TRL["labels"].flatten() if masked else torch.zeros(len(student), dtype=torch.int64)
    loss = Loss(divergence, temperature, mix=round(beta, 6))
    found = chunked(loss, (student, lambda x: x), (teacher, lambda x: x), labels, 5) / temperature**2
    found.backward()
    assert torch.allclose(found, TRL["losses"][number], rtol=1e-5, atol=1e-5)
    assert torch.allclose(student.grad.view(TRL["student"].shape), TRL["gradients"][number], atol=1e-5)


@every
def test_equal_distributions_cost_nothing_and_others_something(divergence: Divergence) -> None:
    same = Loss(divergence).of_tokens(logits(1), logits(1) + 3.0, torch.arange(7))
    assert bool((same.abs() < 1e-5).all())
    assert bool((Loss(divergence).of_tokens(logits(1), logits(2), torch.arange(7)) > 1e-3).all())


@every
def test_logits_that_rule_tokens_out_give_no_nan(divergence: Divergence) -> None:
    student, teacher = logits(1, scale=300.0).requires_grad_(), logits(2, scale=300.0)
    teacher[:, 3] = -1e30
    loss = Loss(divergence).of_tokens(student, teacher, torch.arange(7)).sum()
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(student.grad.isfinite().all())


@every
def test_masked_tokens_count_for_nothing(divergence: Divergence) -> None:
    targets = torch.tensor([1, -100, 2, -100, 3, 4, 5])
    loss = Loss(divergence, cross_entropy=0.5)
    found = loss.of_tokens(logits(1), logits(2), targets)
    assert bool((found[targets == -100] == 0).all()) and bool((found[targets != -100] > 0).all())


def test_cross_entropy_is_mixed_in() -> None:
    student, teacher, targets = logits(1), logits(2), torch.arange(7)
    own = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    both = Loss(cross_entropy=0.25).of_tokens(student, teacher, targets).double()
    alone = Loss().of_tokens(student, teacher, targets).double()
    assert torch.allclose(both, 0.75 * alone + 0.25 * own, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_the_loss_nor_its_gradients(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator)
    head, taught_head = torch.randn(11, 5, generator=generator), torch.randn(13, 6, generator=generator)
    taught = torch.randn(7, 6, generator=generator)
    targets = torch.tensor([1, 2, -100, 4, 5, 6, 7])

    def run(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        total = chunked(Loss("jsd"), (h, lambda x: x @ w.t()), (taught, lambda x: x @ taught_head.t()), targets, tokens)
        total.backward()
        return total.detach(), h.grad, w.grad

    whole, parts = run(7), run(chunk)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, parts, strict=True))
    direct = Loss("jsd").of_tokens(hidden @ head.t(), (taught @ taught_head.t())[:, :11], targets).sum() / 6
    assert torch.allclose(whole[0], direct, atol=1e-6)


def test_a_batch_without_targets_gives_zero_and_gradients_of_zero() -> None:
    hidden = torch.randn(4, 5, requires_grad=True)
    nobody = torch.full((4,), -100)
    head = torch.ones(5, 9)
    student, teacher = ((states, lambda x: x @ head) for states in (hidden, torch.randn(4, 5)))
    total = chunked(Loss(), student, teacher, nobody, 2)
    total.backward()
    assert float(total.detach()) == 0.0
    assert bool((hidden.grad == 0).all())


def test_large_vocabularies_go_through_fewer_tokens_at_a_time() -> None:
    assert [tokens_at_once(vocabulary) for vocabulary in (2_000, 32_768, 152_000, 1 << 28)] == [1024, 1024, 220, 1]
