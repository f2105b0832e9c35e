"""Sparse distributions: unbiased where they claim to be, exact where nothing is left out, against formulas in fp64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill._cache_settings import Cache
from distill._losses import Loss
from distill._sparse import Sparse, decode, encode, random_numbers

N, V = 6, 23
spreads = pytest.mark.parametrize("spread", ["even", "random"])


def logits(seed: int, rows: int = N, width: int = V) -> Tensor:
    return 2.0 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def kept(cache: Cache, teacher_NV: Tensor, row: int = 0) -> Sparse:
    return decode(cache, encode(cache, teacher_NV, random_numbers(cache, row, len(teacher_NV))))


def gradient(loss_N: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss_N.mean(), student)[0]


def full_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    log_p, log_q = teacher_NV.double().log_softmax(-1), student_NV.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@spreads
def test_what_is_kept_are_the_tokens_at_the_points(spread: Any) -> None:
    cache, teacher = Cache(draws=9, spread=spread, seed=4), logits(1)
    probabilities = torch.softmax(teacher.double(), -1).numpy()
    draw = np.random.Generator(np.random.Philox(key=[4, 17])).random((N, 9 if spread == "random" else 1))
    points = np.sort(draw, 1) if spread == "random" else (np.arange(9) + draw) / 9
    found = kept(cache, teacher, row=17)
    for n in range(N):
        wanted = Counter(int(np.argmax(np.cumsum(probabilities[n]) > point)) for point in points[n])
        shares = zip(found.ids_NK[n].tolist(), found.p_NK[n].tolist(), strict=True)
        assert {token: round(9 * p) for token, p in shares if p} == wanted
    entropy = -(probabilities * np.log(probabilities)).sum(1)
    assert np.allclose(-found.negentropy_N.numpy(), entropy, rtol=1e-6)


@spreads
def test_the_sampled_loss_and_its_gradient_are_unbiased(spread: Any) -> None:
    seeds = 20_000
    cache, teacher = Cache(draws=5, spread=spread), logits(1, rows=1)
    student = logits(2, rows=1).requires_grad_()
    losses = kept(cache, teacher.expand(seeds, V)).kl(student.expand(seeds, V))
    wanted = full_kl(teacher, student)
    off = float((losses.mean() - wanted).detach())
    assert abs(off) < 4 * float(losses.detach().std()) / seeds**0.5
    found, exact = gradient(losses, student), gradient(wanted, student)
    p = torch.softmax(teacher.detach(), -1)
    bound = 4 * (p * (1 - p) / (5 * seeds)).sqrt() + 1e-5  # the standard error of independent draws
    assert bool(((found - exact).abs() < bound).all())


def test_even_draws_are_never_a_whole_draw_off() -> None:
    cache, teacher = Cache(draws=7), logits(1, rows=1).expand(500, V)
    found = kept(cache, teacher)
    p_NV = torch.zeros(500, V).scatter_add(1, found.ids_NK, found.p_NK)
    assert float((7 * p_NV - 7 * torch.softmax(teacher, -1)).abs().max()) < 1


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_tokens_kept_are_the_online_loss(temperature: float) -> None:
    student, other = logits(2).requires_grad_(), logits(2).requires_grad_()
    online = Loss("forward_kl", temperature).of_tokens(other, logits(1), torch.arange(N))
    found = temperature**2 * kept(Cache(codec="topk", k=V), logits(1) / temperature).kl(student / temperature)
    assert torch.allclose(found, online, atol=1e-5)
    assert torch.allclose(gradient(found, student), gradient(online, other), atol=1e-6)


def test_the_tail_is_one_more_token() -> None:
    teacher, student = logits(1), logits(2).requires_grad_()
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    order = p.argsort(-1, descending=True)
    coarse_p, coarse_q = (
        torch.cat([x.gather(1, order)[:, :4], x.gather(1, order)[:, 4:].sum(-1, keepdim=True)], -1) for x in (p, q)
    )
    wanted = (coarse_p * (coarse_p / coarse_q).log()).sum(-1)
    found = kept(Cache(codec="topk", k=4), teacher).kl(student)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert torch.allclose(gradient(found, student), gradient(wanted, student), atol=1e-6)
    assert bool((wanted < full_kl(teacher, student)).all())


def test_a_dropped_tail_scales_the_rest_to_one() -> None:
    teacher, student = logits(1), logits(2)
    p = torch.softmax(teacher.double(), -1).topk(4)
    scaled = p.values / p.values.sum(-1, keepdim=True)
    wanted = (scaled * (scaled.log() - student.double().log_softmax(-1).gather(1, p.indices))).sum(-1)
    found = kept(Cache(codec="topk", k=4, tail="drop"), teacher).kl(student)
    assert torch.allclose(found.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"codec": "topk", "k": 3}], ids=["sampled", "topk"])
def test_certain_teachers_and_gradients_are_finite(settings: dict[str, Any]) -> None:
    teacher = logits(1, rows=2)
    teacher[0] = torch.nn.functional.one_hot(torch.tensor(3), V) * 400.0
    teacher[1, :5] = -1e30
    student = (20 * logits(2, rows=2)).requires_grad_()
    loss_N = kept(Cache(**settings), teacher).kl(student)
    assert float(loss_N[0].detach()) == pytest.approx(-float(student.log_softmax(-1)[0, 3].detach()), rel=1e-5)
    assert bool(gradient(loss_N, student).isfinite().all()) and bool(loss_N.isfinite().all())


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)])
def test_ids_take_two_bytes_where_they_can(vocabulary: int, dtype: torch.dtype) -> None:
    teacher = torch.zeros(2, vocabulary)
    teacher[:, -1] = 30.0
    for settings in ({"draws": 3}, {"codec": "topk", "k": 2}):
        cache = Cache.model_validate(settings)
        stored = encode(cache, teacher, random_numbers(cache, 0, 2))
        assert stored["ids"].dtype == dtype
        assert decode(cache, stored).ids_NK[:, 0].tolist() == [vocabulary - 1] * 2
        size = sum(tensor.nbytes for tensor in stored.values())
        assert size <= 2 * cache.token_bytes(vocabulary)


def test_positions_of_a_row_have_numbers_of_their_own() -> None:
    cache = Cache(spread="random", draws=3)
    assert torch.equal(random_numbers(cache, 5, 4)[:2], random_numbers(cache, 5, 2))
    others = (random_numbers(cache, 6, 4), random_numbers(Cache(spread="random", draws=3, seed=1), 5, 4))
    assert not any(bool((random_numbers(cache, 5, 4) == other).any()) for other in others)
