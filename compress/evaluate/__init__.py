"""Evaluation: what an artifact costs in quality, measured beside the original on the same tokens and requests.

The result is plain data: deterministic, six significant digits, no times and no paths of this machine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.events import Listener, silent
from compress.evaluate.gate import check_gate

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Evaluation
    from compress.evaluate.scorers import Scorer

__all__ = ["SCHEMA_VERSION", "check_gate", "evaluate", "evaluate_folder"]

SCHEMA_VERSION = 1
_DIGITS = 6
OTHER_TOKENS = (
    "original and artifact have different vocabularies: bits per byte are compared, each by its own tokens; perplexity "
    "per token, KL divergence and flips cannot be"
)


def evaluate(
    original: Checkpoint | None,
    artifact: Checkpoint,
    evaluation: Evaluation,
    *,
    base_folder: Path | str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    micro_batch: int | None = None,
    spill_folder: Path | str | None = None,
    offline: bool = False,
    events: Listener = silent,
) -> dict[str, Any]:
    """Measure what `evaluation` asks for on `artifact`, and on `original` where there is one.

    Returns protocol, perplexity {original, artifact, increase, interval}, bits_per_byte, kl {mean, p99, interval} in
    nats, flips {share, interval}, refusals {harmful, harmless, changed {share, interval}}, tasks {name: {metric:
    {original, artifact, difference, interval, n}}}, long_context as compress.evaluate.long_context gives it, and
    notices. What was not measured is None. Text figures need one block of memory at a time (activations over 256 MB go
    to unnamed files in `spill_folder`), the rest the whole model.
    Raises UsageError or InputError for what cannot be evaluated.
    """
    from compress.evaluate.scorers import make_scorer

    scorers = [
        model
        and make_scorer(model, evaluation, device=device, dtype=dtype, micro_batch=micro_batch, spill=spill_folder)
        for model in (original, artifact)
    ]
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "protocol": {"seed": evaluation.seed, "text": None, **scorers[1].protocol},
        "perplexity": None,
        "bits_per_byte": None,
        "kl": None,
        "flips": None,
        "refusals": None,
        "tasks": {},
        "long_context": None,
        "notices": [],
    }
    if evaluation.perplexity is not None:
        figures, protocol, notices = _text_figures(
            original, artifact, scorers, evaluation, base_folder, offline, events
        )
        result |= figures
        result["protocol"]["text"] = protocol
        result["notices"] += notices
    if evaluation.tasks:
        from compress.evaluate.tasks import measure_tasks

        tasks, protocol, notices = measure_tasks(
            *scorers, evaluation, base_folder=base_folder, offline=offline, events=events
        )
        result["tasks"], result["protocol"]["tasks"] = tasks, protocol
        result["notices"] += notices
    if evaluation.refusals is not None:
        from compress.evaluate.refusals import measure_refusals

        figures, protocol = measure_refusals(scorers, evaluation.refusals, evaluation, events=events)
        result["refusals"], result["protocol"]["refusals"] = figures, protocol
    if evaluation.long_context is not None:
        from compress.evaluate.long_context import measure_long_context

        figures, protocol, notices = measure_long_context(
            *scorers, evaluation, base_folder=base_folder, offline=offline, events=events
        )
        result["long_context"], result["protocol"]["long_context"] = figures, protocol
        result["notices"] += notices
    return rounded(result, result["notices"])


def _text_figures(
    original: Checkpoint | None,
    artifact: Checkpoint,
    scorers: Sequence[Scorer],
    evaluation: Evaluation,
    base_folder: Path | str | None,
    offline: bool,
    events: Listener,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(figures, protocol, notices) of a text. Models with different vocabularies cut it into different tokens: then
    each is measured by its own, and compared is only what counts by bytes."""
    from compress.evaluate.text import measure_text
    from compress.evaluate.windows import read_windows

    windows = read_windows(evaluation.perplexity, artifact, base_folder, offline=offline)
    alone = original is not None and original.config["vocab_size"] != artifact.config["vocab_size"]
    before = None if original is None or alone else scorers[0].logits(windows.tokens)
    after = scorers[1].logits(windows.tokens)
    figures = measure_text(windows, before, after, seed=evaluation.seed, events=events)
    if original is None or not alone:
        return figures, windows.protocol, []
    own = read_windows(evaluation.perplexity, original, base_folder, offline=offline)
    found = measure_text(own, None, scorers[0].logits(own.tokens), seed=evaluation.seed, events=events)
    figures["bits_per_byte"]["original"] = found["bits_per_byte"]["artifact"]
    return figures, windows.protocol, [OTHER_TOKENS]


def evaluate_folder(
    artifact: Path | str,
    evaluation: Evaluation,
    *,
    base: str | Path | None = None,
    base_folder: Path | str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    offline: bool = False,
    events: Listener = silent,
) -> dict[str, Any]:
    """`evaluate` for any model folder or hub id; without `base` only the folder's own figures are measured.

    With it comes fast_to_exact: what the runtime's `fast` numerics add, where they were measured.
    """
    from compress.core.checkpoint import Checkpoint
    from compress.core.places import locate
    from compress.evaluate.task_files import require_tasks

    require_tasks(evaluation, base_folder)
    artifact, original_place = (place and locate(str(place), "model", Path.cwd()) for place in (artifact, base))
    original = None if original_place is None else Checkpoint.open(original_place, offline=offline)
    model = Checkpoint.open(artifact, offline=offline)
    result = evaluate(
        original,
        model,
        evaluation,
        base_folder=base_folder,
        device=device,
        dtype=dtype,
        spill_folder=tempfile.gettempdir(),
        offline=offline,
        events=events,
    )
    return result | {"fast_to_exact": _fast_to_exact(model, evaluation, device, dtype)}


def _fast_to_exact(model: Checkpoint, evaluation: Evaluation, device: str, dtype: str) -> dict[str, Any] | None:
    """What the numerics that were measured add to exact ones: as the artifact's parity record says, or measured."""
    if evaluation.through != "runtime" or evaluation.numerics != "fast":
        return None
    from compress.core.artifact import open_artifact
    from compress.core.manifest import MANIFEST_NAME
    from compress.evaluate.parity import fast_to_exact

    if dtype == "auto" and (model.folder / MANIFEST_NAME).is_file():
        record = open_artifact(model.folder).manifest.parity
        if record is not None:
            return record["fast_to_exact"]
    return rounded(fast_to_exact(model, device=device, dtype=dtype), [])


def rounded(value: Any, notices: list[str], where: str = "") -> Any:
    """Plain data with floats of six significant digits; a figure that is not finite becomes None and a notice."""
    if isinstance(value, dict):
        return {key: rounded(item, notices, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, notices, where) for item in value]
    if isinstance(value, float) or hasattr(value, "item"):
        number = float(value)
        if not math.isfinite(number):
            notices.append(f"{where} is not a finite number")
            return None
        return float(f"{number:.{_DIGITS}g}")
    return value
