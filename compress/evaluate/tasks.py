"""Tasks: lm-eval's, by name or from a folder, original and artifact on the same requests, one model after the other.

The artifact's model is built by our own decoders from its files, so what is scored is exactly what is stored. Intervals
are of the difference, from a bootstrap over documents in pairs. Shape legend: D documents, B resamples.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.core.checkpoint import load_tokenizer
from compress.core.errors import InputError
from compress.core.events import Listener, silent
from compress.evaluate.intervals import Statistic, interval, spread
from compress.evaluate.task_files import choose, is_local

if TYPE_CHECKING:
    from compress.core.recipe import Evaluation
    from compress.evaluate.scorers import Scorer

Values = list[Any]


def measure_tasks(
    original: Scorer | None,
    artifact: Scorer,
    evaluation: Evaluation,
    *,
    base_folder: Path | str | None = None,
    offline: bool = False,
    events: Listener = silent,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(figures by task and metric, protocol, notices). Without `original` the artifact is measured alone."""
    from compress.evaluate import _harness

    folder = Path(base_folder or ".") / evaluation.task_folder if evaluation.task_folder else None
    configs, names = choose(evaluation.tasks, folder)
    with _harness.quiet(offline=offline or (not names and all(map(is_local, configs)))):
        with _harness.seeded(evaluation.seed):
            loaded = _harness.build_tasks(configs, names, fewshot=evaluation.fewshot, seed=evaluation.seed)
        runs = [
            scorer and _answers(scorer, label, loaded, evaluation, events)
            for scorer, label in ((original, "original"), (artifact, "artifact"))
        ]
    tasks, protocols, notices = {}, {}, []
    for name, task in sorted(loaded["tasks"].items()):
        samples = [run and run["samples"][name] for run in runs]
        _check_paired(samples, name)
        tasks[name] = _task_figures(task, samples, evaluation.seed)
        protocols[name] = {
            "fewshot": task.get_config("num_fewshot"),
            "version": runs[1]["versions"].get(name),
            "documents": len({sample["doc_id"] for sample in samples[1]}),
            "request_sha256": _harness.request_sha256(samples[1]),
        }
    if evaluation.limit is not None:
        notices.append(
            f"tasks were limited to {evaluation.limit} documents each: figures are not comparable with others'"
        )
    protocol = {
        "lm_eval": importlib.metadata.version("lm-eval"),
        "limit": evaluation.limit,
        "chat_template": evaluation.chat_template,
        "tasks": protocols,
    }
    return tasks, protocol, notices


def _answers(scorer: Scorer, label: str, loaded: dict, evaluation: Evaluation, events: Listener) -> dict[str, Any]:
    from compress.evaluate._harness import answer_tasks

    if evaluation.chat_template and not load_tokenizer(scorer.folder).chat_template:
        raise InputError("chat_template: true needs a template, and the tokenizer has none", where=str(scorer.folder))
    with scorer.language_model(f"evaluate tasks, {label}", events) as model:
        return answer_tasks(
            model, loaded, limit=evaluation.limit, chat_template=evaluation.chat_template, seed=evaluation.seed
        )


def _check_paired(samples: Sequence[list[dict[str, Any]] | None], name: str) -> None:
    from compress.evaluate._harness import request_sha256

    if samples[0] is not None and request_sha256(samples[0]) != request_sha256(samples[1] or []):
        raise InputError(f"task {name!r} asks original and artifact different questions: it is not repeatable")


def _task_figures(task: Any, samples: Sequence[list[dict[str, Any]] | None], seed: int) -> dict[str, Any]:
    """{metric: figures}; a metric of a filter other than "none" is called "metric (filter)"."""
    figures = {}
    for filter_name in dict.fromkeys(sample["filter"] for sample in samples[1] or []):
        sides = [side and [sample for sample in side if sample["filter"] == filter_name] for side in samples]
        for metric in sides[1][0]["metrics"]:
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            values = [side and [sample[metric] for sample in side] for side in sides]
            aggregate = task.aggregation().get(metric)
            if aggregate is not None:
                figures[label] = _metric_figures(aggregate, values, seed)
    return figures


def _metric_figures(aggregate: Any, values: Sequence[Values | None], seed: int) -> dict[str, Any]:
    count = len(values[1] or [])
    whole = np.ones((1, count))
    statistics = [None if side is None else aggregated(aggregate, side) for side in values]
    original, artifact = (None if each is None else float(each(whole)[0]) for each in statistics)
    errors = [None if each is None else spread(each, count, seed=seed) for each in statistics]
    difference = None if original is None or artifact is None else artifact - original
    pair = None
    if statistics[0] is not None and statistics[1] is not None:
        before, after = statistics
        pair = interval(lambda drawn: after(drawn) - before(drawn), count, seed=seed)
    return {
        "original": original,
        "artifact": artifact,
        "difference": difference,
        "interval": pair,
        "stderr": {"original": errors[0], "artifact": errors[1]},
        "n": count,
    }


def aggregated(aggregate: Any, values: Values) -> Statistic:
    """lm-eval's aggregation of per-document values as a function of how often each document was drawn.

    The usual ones are done for all resamples at once; any other is called on the drawn documents.
    """
    name = getattr(aggregate, "__name__", "")
    table_DX = np.asarray(values, dtype=np.float64) if name in _SUMS else None
    if table_DX is None:
        return lambda drawn_BD: np.array([float(aggregate(_drawn(values, row))) for row in drawn_BD])
    weight_D = table_DX[:, 1] if table_DX.ndim == 2 else np.ones(len(table_DX))
    value_D = table_DX[:, 0] if table_DX.ndim == 2 else table_DX
    return lambda drawn_BD: _SUMS[name]((drawn_BD @ value_D) / (drawn_BD @ weight_D))


_SUMS = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "weighted_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / np.log(2),
}


def _drawn(values: Values, counts_D: np.ndarray) -> Values:
    return [value for value, count in zip(values, counts_D, strict=True) for _ in range(int(count))]
