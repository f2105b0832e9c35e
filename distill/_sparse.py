"""A teacher's distributions by few tokens each: what is kept of them, and a student's divergence from that.

Sampled: with counts c of n draws, c / n is an unbiased estimate of p, and cross entropy is linear in it: so are the
loss and its gradient (Anshumann et al., 2025, arXiv:2503.16870). The teacher's exact entropy makes a KL divergence of
it. Draws at equal distances along the cumulated distribution, all moved by one random number, have the same mean as
independent ones, and no count is a whole draw away from n p (systematic sampling; Madow and Madow, 1944).

Top k: with all other tokens as one more, this is the KL divergence of the coarser distributions, at most the whole one.
Without them the kept tokens are scaled to 1, and the student learns that nothing else is ever said.

Shape suffixes: N positions, V vocabulary, K tokens kept at a position, S draws, M tokens kept at all positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill._cache_settings import SHORT_IDS, Cache


@dataclass(frozen=True, slots=True)
class Sparse:
    """Distributions: ids [N, K] with probabilities (0 behind the last one), Σ p log p of the teacher [N], and the
    probability of all other tokens [N] (None: they do not count)."""

    ids_NK: Tensor
    p_NK: Tensor
    negentropy_N: Tensor
    tail_N: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The fields that are there: `Sparse(*parts)` is the same."""
        fields = (self.ids_NK, self.p_NK, self.negentropy_N, self.tail_N)
        return tuple(field for field in fields if field is not None)

    def kl(self, logits_NV: Tensor) -> Tensor:
        """KL(teacher, student), fp32 [N], from the student's logits, divided by the teacher's temperature."""
        whole_N = logits_NV.logsumexp(-1)
        log_q_NK = logits_NV.gather(1, self.ids_NK) - whole_N[:, None]
        kl_N = self.negentropy_N - (self.p_NK * log_q_NK).sum(-1)
        if self.tail_N is None or self.ids_NK.shape[1] == logits_NV.shape[1]:
            return kl_N
        others_N = logits_NV.scatter(1, self.ids_NK, -torch.inf).logsumexp(-1)
        return kl_N - self.tail_N * (others_N - whole_N)


def encode(cache: Cache, logits_NV: Tensor, random_NS: Tensor) -> dict[str, Tensor]:
    """What is kept of the distributions of these logits, on the CPU; `random_NS` is of `random_numbers`."""
    vocabulary = logits_NV.shape[1]
    if cache.codec == "sampled":
        ids_M, counts_M, lengths_N, entropy_N = sample(logits_NV, points(cache, random_NS))
        found = {"ids": ids_M, "counts": counts_M.to(torch.uint8), "lengths": lengths_N, "entropy": entropy_N.float()}
    else:
        ids_NK, log_p_NK, log_tail_N = top(logits_NV, cache.most(vocabulary))
        lengths_N = torch.full_like(log_tail_N, ids_NK.shape[1])
        found = {"ids": ids_NK.flatten(), "log_p": log_p_NK.flatten(), "lengths": lengths_N, "log_tail": log_tail_N}
    found["ids"] = found["ids"].to(torch.uint16 if vocabulary <= SHORT_IDS else torch.int32)
    found["lengths"] = found["lengths"].to(torch.uint8 if cache.most(vocabulary) < 1 << 8 else torch.int32)
    return {name: value.cpu() for name, value in found.items()}


def decode(cache: Cache, kept: Mapping[str, Tensor]) -> Sparse:
    """The distributions that `encode` was given, as far as they were kept."""
    lengths_N = kept["lengths"].long()
    inside_NK = torch.arange(int(lengths_N.max()) if len(lengths_N) else 0) < lengths_N[:, None]

    def padded(flat_M: Tensor) -> Tensor:
        return torch.zeros(inside_NK.shape, dtype=flat_M.dtype).masked_scatter_(inside_NK, flat_M)

    ids_NK = padded(kept["ids"].long())
    if cache.codec == "sampled":
        return Sparse(ids_NK, padded(kept["counts"].float()) / cache.draws, -kept["entropy"])
    log_p_NK, log_tail_N = padded(kept["log_p"]), kept["log_tail"]
    if cache.tail == "drop":
        log_p_NK = log_p_NK.log_softmax(-1)
        return Sparse(ids_NK, log_p_NK.exp(), (log_p_NK.exp() * log_p_NK).sum(-1))
    p_NK, tail_N = log_p_NK.exp(), log_tail_N.exp()
    return Sparse(ids_NK, p_NK, (p_NK * log_p_NK).sum(-1) + torch.xlogy(tail_N, tail_N), tail_N)


def sample(logits_NV: Tensor, points_NS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens at these points of the cumulated distributions, in fp64: distinct ids [M] and how often each was met
    [M], how many there are at each position [N], and the entropies [N]. Points rise along a row."""
    log_p_NV = logits_NV.double().log_softmax(-1)
    p_NV = log_p_NV.exp()
    cumulated_NV = p_NV.cumsum(-1)
    places_NS = points_NS.to(p_NV.device) * cumulated_NV[:, -1:]
    ids_NS = torch.searchsorted(cumulated_NV, places_NS, right=True).clamp_(max=p_NV.shape[1] - 1)
    first_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    first_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
    starts_M = first_NS.flatten().nonzero().flatten()
    counts_M = torch.diff(starts_M, append=starts_M.new_tensor([ids_NS.numel()]))
    return ids_NS[first_NS], counts_M, first_NS.sum(-1), -torch.where(p_NV > 0, p_NV * log_p_NV, 0.0).sum(-1)


def top(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely ids [N, K], their log-probabilities [N, K], and the log of what all others have [N]."""
    log_p_NV = logits_NV.double().log_softmax(-1)
    log_p_NK, ids_NK = log_p_NV.topk(k, sorted=True)
    others_N = log_p_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    return ids_NK, log_p_NK.float(), others_N.float()


def points(cache: Cache, random_NS: Tensor) -> Tensor:
    """Where the cumulated distributions are looked at, rising along a row, [N, draws]."""
    if cache.spread == "random":
        return random_NS.sort(-1).values
    return (torch.arange(cache.draws, dtype=torch.float64) + random_NS) / cache.draws


def random_numbers(cache: Cache, row: int, positions: int) -> Tensor:
    """Those of a row of the text, fp64 [positions, S]: a function of the seed, the row and the position alone."""
    each = cache.draws if cache.spread == "random" else 1
    generator = np.random.Generator(np.random.Philox(key=[cache.seed, row]))
    return torch.from_numpy(generator.random((positions, each if cache.codec == "sampled" else 0)))
