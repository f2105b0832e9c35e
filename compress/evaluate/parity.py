"""Parity: that the bundled runtime computes what transformers computes, on the artifact itself.

In `exact` numerics log-probabilities must agree to BOUND (the KL divergence to KL_BOUND where inputs are rounded) and a
task's figure to one document; what `fast` numerics add is recorded beside it. The record goes into the artifact's
manifest, where `compress verify --level parity` finds it.
Shapes: B samples, T positions, V vocabulary, P scored positions.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.core.events import Finished, Listener, Started, silent
from compress.evaluate.scorers import RuntimeScorer, TransformersScorer

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Evaluation

BOUND = 1e-3  # nats, of the log-probability of any token
LEAST_AGREEMENT = 0.99  # share of positions with the same likeliest token: near-ties may fall either way
KL_BOUND = 1e-3  # nats, where inputs are rounded: sums in another order flip a code, and all behind it moves a little
LEAST_AGREEMENT_ROUNDED = 0.97
SAMPLES, LENGTH = 4, 256
DOCUMENTS = 16
_STAGE = "parity of runtime and transformers"


def measure_parity(
    artifact: Checkpoint,
    tokens: Tokens | None,
    evaluation: Evaluation | None,
    *,
    base_folder: Path | None = None,
    device: str = "cpu",
    offline: bool = False,
    events: Listener = silent,
) -> dict[str, Any]:
    """The record: agreement on some of `tokens` (None: drawn ones) and on the first documents of each task."""
    from compress.evaluate import rounded

    events(Started(_STAGE, 1, "artifact"))
    sample = _sample(artifact, tokens)
    rounds_inputs = any(scheme.activation_bits == 8 for scheme in artifact.schemes.values())
    figure, bounded = ("kl", "kl") if rounds_inputs else ("largest_logprob_difference", "logprob")
    bounds = {
        bounded: KL_BOUND if rounds_inputs else BOUND,
        "greedy_agreement": LEAST_AGREEMENT_ROUNDED if rounds_inputs else LEAST_AGREEMENT,
        "documents": 1,
    }
    reference = TransformersScorer(artifact, device, "float32")
    exact, fast = (RuntimeScorer(artifact, device, numerics, kv_cache="full") for numerics in ("exact", "fast"))
    to_reference, to_exact = compare_logits(sample, reference.logits(sample), exact.logits(sample), fast.logits(sample))
    tasks = {}
    if evaluation is not None and evaluation.tasks:
        tasks = _task_differences(reference, exact, evaluation, base_folder, offline)
    record = {
        "tokens": sample.ids.numel(),
        "bounds": bounds,
        "exact_to_transformers": to_reference,
        "fast_to_exact": to_exact,
        "tasks": tasks,
        "transformers": importlib.metadata.version("transformers"),
    }
    record["passed"] = (
        to_reference[figure] <= bounds[bounded]
        and to_reference["greedy_agreement"] >= bounds["greedy_agreement"]
        and all(abs(task["difference"]) * task["documents"] < 1.5 for task in tasks.values())
    )
    events(Finished(_STAGE, "passed" if record["passed"] else "did not pass"))
    return rounded(record, [])


def fast_to_exact(
    artifact: Checkpoint, tokens: Tokens | None = None, *, device: str = "cpu", dtype: str = "auto"
) -> dict[str, float]:
    """What `fast` numerics of the runtime add: a comparison with `exact` on some of `tokens` (None: drawn ones)."""
    sample = _sample(artifact, tokens)
    exact, fast = (RuntimeScorer(artifact, device, numerics, dtype) for numerics in ("exact", "fast"))
    [found] = compare_logits(sample, exact.logits(sample), fast.logits(sample))
    return found


@dataclass
class Differences:
    """Sums over the positions of two models that foretell a token."""

    largest: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    count: int = 0

    def add(self, before_PV: torch.Tensor, after_PV: torch.Tensor, targets_P: torch.Tensor) -> None:
        """Log-probabilities of the reference and of the other at positions that foretell `targets_P`."""
        targets_P1 = targets_P[:, None].to(before_PV.device)
        difference_P1 = (before_PV.gather(-1, targets_P1) - after_PV.gather(-1, targets_P1)).abs()
        self.largest = max(self.largest, float(difference_P1.max()))
        self.agreed += int((before_PV.argmax(-1) == after_PV.argmax(-1)).sum())
        self.kl += float((before_PV.exp() * (before_PV - after_PV)).sum(-1).clamp_(min=0).double().sum())
        self.count += len(targets_P)

    def figures(self) -> dict[str, float]:
        """Largest difference of a token's log-probability, share of equal likeliest tokens, mean KL."""
        return {
            "largest_logprob_difference": self.largest,
            "greedy_agreement": self.agreed / self.count,
            "kl": self.kl / self.count,
        }


def compare_logits(tokens: Tokens, *streams: Iterable[torch.Tensor]) -> list[dict[str, float]]:
    """Each stream of logits after the first against the one before it (see Differences), in one pass over all."""
    found = [Differences() for _ in streams[1:]]
    for number, (ids_T, *models) in enumerate(zip(tokens.ids, *map(_rows, streams), strict=True)):
        length = len(ids_T) if tokens.lengths is None else int(tokens.lengths[number])
        logs = [torch.log_softmax(logits_TV[: length - 1].float(), -1) for logits_TV in models]
        for differences, (before_PV, after_PV) in zip(found, pairwise(logs), strict=True):
            differences.add(before_PV, after_PV, ids_T[1:length])
    return [differences.figures() for differences in found]


def _rows(stream: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    for logits_BTV in stream:
        yield from logits_BTV


def _sample(artifact: Checkpoint, tokens: Tokens | None) -> Tokens:
    from compress.core.calibration import Tokens

    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        return Tokens.of(torch.randint(artifact.config["vocab_size"], (SAMPLES, 64), generator=generator))
    ids = tokens.ids[:SAMPLES, :LENGTH]
    return Tokens.of(ids, None if tokens.lengths is None else tokens.lengths[:SAMPLES].clamp(max=LENGTH))


def _task_differences(
    reference: TransformersScorer,
    exact: RuntimeScorer,
    evaluation: Evaluation,
    base_folder: Path | None,
    offline: bool,
) -> dict[str, Any]:
    """By task and metric: the runtime's figure less that of transformers, on the same first documents."""
    from compress.evaluate.tasks import measure_tasks

    limit = min(DOCUMENTS, evaluation.limit or DOCUMENTS)
    short = evaluation.model_copy(update={"limit": limit})
    tasks, _, _ = measure_tasks(reference, exact, short, base_folder=base_folder, offline=offline)
    return {
        f"{name}: {metric}": {"difference": figures["difference"], "documents": figures["n"]}
        for name, metrics in tasks.items()
        for metric, figures in metrics.items()
        if metric.startswith(("acc", "exact_match"))
    }
