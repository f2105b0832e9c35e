"""Text: perplexity, bits per byte, KL divergence and flips from one pass over original and artifact side by side.

Log-probabilities are fp32 whatever the models compute in; sums are fp64. KL is of the artifact from the original,
Σ p_original (log p_original - log p_artifact), in nats, at every scored position. A flip is a position where the most
likely token differs. Shape legend: R rows, T tokens, V vocabulary, P scored positions, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import torch

from compress.core.errors import InputError
from compress.core.events import Finished, Listener, Progress, Started, silent
from compress.evaluate.intervals import interval, ratio
from compress.evaluate.windows import Windows

STAGE = "evaluate text"
_CHUNK_VALUES = 1 << 23


@dataclass
class _Sums:
    """What is kept of each unit (document or window), and the KL of each scored position."""

    tokens_U: np.ndarray
    original_U: np.ndarray
    artifact_U: np.ndarray
    kl_U: np.ndarray
    flips_U: np.ndarray
    kl_P: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, units: int) -> _Sums:
        return cls(*(np.zeros(units) for _ in range(5)))


def measure_text(
    windows: Windows,
    original: Iterable[torch.Tensor] | None,
    artifact: Iterable[torch.Tensor],
    *,
    seed: int = 0,
    events: Listener = silent,
) -> dict[str, Any]:
    """The figures of both models, given their logits as streams of [b, T, V] in the order of the rows.

    Without `original` only the artifact's own figures are there and the rest is None.
    """
    units = int(windows.unit.max()) + 1
    sums = _Sums.of(units)
    rows = len(windows.score_from)
    events(Started(STAGE, rows, "window"))
    done = 0
    for logits_BTV, reference_BTV in _paired(artifact, original):
        for row_TV, reference_TV in zip(logits_BTV, reference_BTV or repeat(None), strict=False):
            _add_row(sums, windows, done, row_TV, reference_TV)
            done += 1
        events(Progress(STAGE, done, rows))
    events(Finished(STAGE, f"{windows.scored:,} tokens scored"))
    return _figures(sums, windows, seed, alone=original is None)


def _paired(
    artifact: Iterable[torch.Tensor], original: Iterable[torch.Tensor] | None
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor] | None]]:
    if original is None:
        yield from ((logits, None) for logits in artifact)
        return
    for logits, reference in zip(artifact, original, strict=True):
        if logits.shape != reference.shape:
            raise InputError(
                f"original and artifact give different shapes, {list(reference.shape)} and {list(logits.shape)}",
                hint="they must share one vocabulary",
            )
        yield logits, list(reference)


def _add_row(
    sums: _Sums, windows: Windows, row: int, logits_TV: torch.Tensor, reference_TV: torch.Tensor | None
) -> None:
    unit, start, end = windows.unit[row], int(windows.score_from[row]), int(windows.lengths[row])
    targets_P = windows.tokens.ids[row, start:end]
    step = max(1, _CHUNK_VALUES // logits_TV.shape[-1])
    for low in range(start, end, step):
        high = min(end, low + step)
        targets = targets_P[low - start : high - start]
        artifact_PV = _log_probabilities(logits_TV[low - 1 : high - 1])
        sums.tokens_U[unit] += high - low
        sums.artifact_U[unit] += _loss(artifact_PV, targets)
        if reference_TV is not None:
            original_PV = _log_probabilities(reference_TV[low - 1 : high - 1])
            sums.original_U[unit] += _loss(original_PV, targets)
            kl_P = (original_PV.exp() * (original_PV - artifact_PV)).sum(-1).clamp_(min=0)
            sums.kl_U[unit] += float(kl_P.double().sum())
            sums.kl_P.append(kl_P.numpy())
            sums.flips_U[unit] += int((original_PV.argmax(-1) != artifact_PV.argmax(-1)).sum())


def _log_probabilities(logits_PV: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_PV.float(), dim=-1).cpu()


def _loss(log_probabilities_PV: torch.Tensor, targets_P: torch.Tensor) -> float:
    return -float(log_probabilities_PV.gather(-1, targets_P[:, None]).double().sum())


def _figures(sums: _Sums, windows: Windows, seed: int, *, alone: bool) -> dict[str, Any]:
    units, tokens_U = len(sums.tokens_U), sums.tokens_U
    bits = windows.text_tokens / windows.text_bytes / np.log(2)
    artifact = sums.artifact_U.sum() / tokens_U.sum()
    perplexity: dict[str, Any] = {"original": None, "artifact": np.exp(artifact), "increase": None, "interval": None}
    bits_per_byte: dict[str, Any] = {"original": None, "artifact": artifact * bits}
    if alone:
        return {"perplexity": perplexity, "bits_per_byte": bits_per_byte, "kl": None, "flips": None}
    original = sums.original_U.sum() / tokens_U.sum()
    difference = ratio(sums.artifact_U - sums.original_U, tokens_U)
    perplexity |= {
        "original": np.exp(original),
        "increase": np.expm1(artifact - original),
        "interval": interval(lambda drawn: np.expm1(difference(drawn)), units, seed=seed),
    }
    bits_per_byte["original"] = original * bits
    return {
        "perplexity": perplexity,
        "bits_per_byte": bits_per_byte,
        "kl": {
            "mean": sums.kl_U.sum() / tokens_U.sum(),
            "p99": np.quantile(np.concatenate(sums.kl_P), 0.99),
            "interval": interval(ratio(sums.kl_U, tokens_U), units, seed=seed),
        },
        "flips": {
            "share": sums.flips_U.sum() / tokens_U.sum(),
            "interval": interval(ratio(sums.flips_U, tokens_U), units, seed=seed),
        },
    }
