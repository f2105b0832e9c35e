"""Figures: the headline of a run, before → after, and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.core.quantities import format_bytes
from compress.evaluate.gate import accuracy
from compress.report import words
from compress.report.layers import zeros_of

_TO_95_PERCENT = 1.96  # standard errors, as many as make the level of the intervals of changes
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")


@dataclass(frozen=True)
class Row:
    """One figure before and after, its change and the interval of the change; `tone` is good, bad or nothing."""

    name: str
    before: str
    after: str
    change: str = ""
    interval: str = ""
    tone: str = ""


def headline(run: Mapping[str, Any]) -> list[Row]:
    """All figures of a run that fit one table."""
    evaluation = run.get("evaluation") or {}
    quality = [
        *_text_rows(evaluation),
        *refusal_rows(evaluation),
        *_task_rows(run),
        *long_context_rows(evaluation),
    ]
    return [*_size_rows(run), *quality, *_speed_rows(run), *_cost_rows(run)]


def _size_rows(run: Mapping[str, Any]) -> list[Row]:
    source, artifact = run["source"], run["artifact"]
    was, now = source["parameters"], artifact.get("parameters", source["parameters"])
    fewer = [Row("parameters", f"{was:,}", f"{now:,}", words.signed_percent(now / was - 1))] if was != now else []
    fewer += _shape_rows(source.get("sizes") or {}, artifact.get("sizes") or {})
    zeros = zeros_of(run)
    bits_before = 8 * source["bytes"] / was
    return [
        Row(
            "size of the weights",
            format_bytes(source["bytes"]),
            format_bytes(artifact["bytes"]),
            words.signed_percent(artifact["bytes"] / source["bytes"] - 1),
        ),
        *fewer,
        Row("bits per weight", words.number(bits_before), words.number(artifact["bits_per_weight"])),
        *([] if zeros is None else [Row("zeros in the pruned layers", "–", words.percent(zeros))]),
        *_kept_rows(artifact.get("kv_cache")),
    ]


def _kept_rows(kept: Mapping[str, Any] | None) -> list[Row]:
    """Keys and values of a token, and which tokens keep theirs."""
    if kept is None:
        return []
    full, now = kept["full_token_bytes"], kept["token_bytes"]
    change = words.signed_percent(now / full - 1)
    before = f"{format_bytes(full)} in {kept['full_dtype']}"
    rows = [Row("keys and values of a token", before, format_bytes(now), change)]
    return rows if kept["eviction"] is None else [*rows, Row("tokens that keep theirs", "all", kept["eviction"])]


SHAPES = {
    "layers": "layers",
    "hidden": "hidden size",
    "heads": "query heads",
    "kv_heads": "key-value heads",
    "ffn": "feed-forward channels",
    "experts": "experts",
    "expert_ffn": "channels of an expert",
    "vocab": "tokens in the vocabulary",
}


def _shape_rows(before: Mapping[str, int], after: Mapping[str, int]) -> list[Row]:
    """Sizes of the model that are not what they were; a dense model has one expert, which is no size of its own."""
    dense = before.get("experts") == 1
    return [
        Row(name, f"{before[key]:,}", f"{after[key]:,}", words.signed_percent(after[key] / before[key] - 1))
        for key, name in SHAPES.items()
        if key in before and key in after and before[key] != after[key] and not (dense and key == "expert_ffn")
    ]


def _text_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    rows = []
    perplexity, bits = evaluation.get("perplexity"), evaluation.get("bits_per_byte")
    kl, flips = evaluation.get("kl"), evaluation.get("flips")
    if perplexity:
        interval = words.between(perplexity["interval"], words.signed_percent)
        before, after = words.number(perplexity["original"]), words.number(perplexity["artifact"])
        tone = _tone(perplexity["interval"], lower_is_better=True)
        rows.append(Row("perplexity", before, after, words.signed_percent(perplexity["increase"]), interval, tone))
    if bits:
        known = None not in (bits["original"], bits["artifact"])
        change = words.change(bits["artifact"] - bits["original"]) if known else words.NOT_MEASURED
        rows.append(Row("bits per byte", words.number(bits["original"]), words.number(bits["artifact"]), change))
    if kl:
        rows.append(Row("KL divergence, mean", words.NONE, words.number(kl["mean"]), "", words.between(kl["interval"])))
        rows.append(Row("KL divergence, 99th percentile", words.NONE, words.number(kl["p99"])))
    if flips:
        interval = words.between(flips["interval"], words.percent)
        rows.append(Row("most likely token differs", words.NONE, words.percent(flips["share"]), "", interval))
    return rows


def refusal_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Refused prompts by kind, and how many are refused by one of the two models alone."""
    refusals = evaluation.get("refusals")
    if not refusals:
        return []
    rows = []
    for kind in ("harmful", "harmless"):
        found = refusals[kind]
        shares = [
            words.NONE if found[side] is None else words.percent(found[side]) for side in ("original", "artifact")
        ]
        rows.append(Row(f"{kind} prompts refused (n = {found['n']})", *shares))
    changed = refusals["changed"]
    if changed:
        interval = words.between(changed["interval"], words.percent)
        rows.append(Row("refused by one of the two alone", words.NONE, words.percent(changed["share"]), "", interval))
    return rows


def _task_rows(run: Mapping[str, Any]) -> list[Row]:
    tasks = (run.get("evaluation") or {}).get("tasks") or {}
    return [
        Row(
            f"{name}: {metric} (n = {figures['n']:,})",
            _with_error(figures["original"], (figures.get("stderr") or {}).get("original")),
            _with_error(figures["artifact"], (figures.get("stderr") or {}).get("artifact")),
            words.change(figures["difference"]),
            words.between(figures["interval"], words.change),
            _tone(figures["interval"], lower_is_better=metric.split(" ")[0] in LOWER_IS_BETTER),
        )
        for name, metrics in tasks.items()
        for metric, figures in metrics.items()
    ]


def long_context_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Facts found in long contexts, what the answers came to, and perplexity over long text, length by length."""
    found = evaluation.get("long_context") or {}
    rows, cells = [], []
    for task, lengths in (found.get("tasks") or {}).items():
        for length, figures in lengths.items():
            cells.append(figures)
            name = f"{task.replace('_', ' ')}, {int(length):,} tokens (n = {figures['n']:,})"
            moved, interval = words.change(figures["difference"]), words.between(figures["interval"], words.change)
            tone = _tone(figures["interval"], lower_is_better=False)
            rows.append(Row(name, _share(figures["original"]), _share(figures["artifact"]), moved, interval, tone))
    if cells and cells[0]["regressed"] is not None:
        regressed, gained = (sum(cell[key] for cell in cells) for key in ("regressed", "gained"))
        rows.append(Row("answers: right before, wrong now", words.NONE, f"{regressed:,}"))
        rows.append(Row("answers: wrong before, right now", words.NONE, f"{gained:,}"))
    if cells:
        sides = [[cell["output_tokens"][side] for cell in cells] for side in ("original", "artifact")]
        means = [words.NONE if None in side else words.number(sum(side) / len(side)) for side in sides]
        rows.append(Row("tokens of an answer, mean", *means))
    for length, figures in (found.get("perplexity") or {}).items():
        before = words.NONE if figures["original"] is None else words.number(figures["original"])
        moved = words.signed_percent(figures["increase"])
        interval = words.between(figures["interval"], words.signed_percent)
        tone = _tone(figures["interval"], lower_is_better=True)
        name = f"perplexity, windows of {int(length):,} tokens"
        rows.append(Row(name, before, words.number(figures["artifact"]), moved, interval, tone))
    return rows


def _share(share: float | None) -> str:
    return words.NONE if share is None else words.percent(share)


def _with_error(value: float | None, error: float | None) -> str:
    """A figure and the half width of its own 95 % interval; `error` is its standard error."""
    text = words.number(value)
    return text if value is None or error is None else f"{text} ± {words.number(_TO_95_PERCENT * error, 2)}"


def _tone(interval: Any, *, lower_is_better: bool) -> str:
    """Good or bad only where the interval leaves zero out."""
    if not interval or interval[0] <= 0 <= interval[1]:
        return ""
    return "good" if (interval[1] < 0) == lower_is_better else "bad"


def _speed_rows(run: Mapping[str, Any]) -> list[Row]:
    """Original and artifact in the runtime, side by side on this machine."""
    rows = []
    for found in (run.get("speed") or {}).get("found") or ():
        rates, first = found["tokens_per_second"], found["first_token_seconds"]
        at_once = f"{found['batch']} at a time"
        for name, pair, scale in (("tokens a second", rates, 1), ("first token, ms", first, 1000)):
            before, after = scale * pair["original"], scale * pair["artifact"]
            change = words.signed_percent(after / before - 1)
            rows.append(Row(f"{name}, {at_once}", words.number(before), words.number(after), change))
    return rows


def _cost_rows(run: Mapping[str, Any]) -> list[Row]:
    measured = run.get("measured") or {}
    minutes, peak = measured.get("minutes"), measured.get("peak_memory_bytes")
    return [
        Row("time of stages and evaluation", words.NONE, words.duration(None if minutes is None else 60 * minutes)),
        Row("peak memory of the run", words.NONE, format_bytes(peak) if peak else words.NOT_MEASURED),
    ]


def tiles(run: Mapping[str, Any]) -> list[Row]:
    """The four figures that a person looks for first: size, perplexity, KL, accuracy."""
    evaluation = run.get("evaluation") or {}
    source, artifact = run["source"], run["artifact"]
    perplexity, kl = evaluation.get("perplexity") or {}, evaluation.get("kl") or {}
    before, after = words.number(perplexity.get("original")), words.number(perplexity.get("artifact"))
    worse = words.signed_percent(perplexity.get("increase"))
    return [
        _size_tile(source["bytes"], artifact["bytes"], artifact.get("kv_cache")),
        Row("perplexity", before, worse, f"{before} → {after}" if perplexity else ""),
        Row("KL divergence", "", words.number(kl.get("mean"), 3), "nats per token, to the original" if kl else ""),
        _accuracy_tile(evaluation.get("tasks") or {}),
    ]


def _size_tile(before: int, after: int, kept: Mapping[str, Any] | None) -> Row:
    """Of the weights; where these stay as they are, of keys and values."""
    if before != after:
        return Row("size", "", f"{before / after:.2f} × smaller", f"{format_bytes(before)} → {format_bytes(after)}")
    if kept is None:
        return Row("size", "", "unchanged", format_bytes(before))
    full, now, dropped = kept["full_token_bytes"], kept["token_bytes"], kept["eviction"]
    sizes = f"{format_bytes(full)} → {format_bytes(now)} a token"
    if full == now:
        return Row("keys and values", "", dropped or "unchanged", f"{format_bytes(now)} a token")
    return Row("keys and values", "", f"{full / now:.2f} × smaller", f"{sizes}, {dropped}" if dropped else sizes)


def _accuracy_tile(tasks: Mapping[str, Any]) -> Row:
    figures = [accuracy(task) for task in tasks.values()]
    known = [each["difference"] for each in figures if each and each["difference"] is not None]
    if not known:
        return Row("accuracy", "", words.NOT_MEASURED)
    mean = 100 * sum(known) / len(known)
    text = f"{mean:+.2f} points".replace("-", "−")
    return Row("accuracy", "", text, f"mean change over {len(known)} task{'s' if len(known) > 1 else ''}")


def missing(run: Mapping[str, Any]) -> list[str]:
    """What a reader might look for and will not find, said plainly."""
    evaluation = run.get("evaluation")
    if evaluation is None:
        return ["Quality was not measured: the recipe has no evaluate block, or evaluation was switched off."]
    notes = []
    if not evaluation.get("perplexity"):
        notes.append("Perplexity, KL divergence and flips were not measured: evaluate.perplexity is not in the recipe.")
    elif (evaluation.get("bits_per_byte") or {}).get("original") is not None and not evaluation.get("kl"):
        notes.append("Original and artifact have different vocabularies, so only bits per byte are compared.")
    elif not evaluation.get("kl"):
        notes.append("The original was not measured, so there is no change, KL divergence or interval.")
    elif not (evaluation["perplexity"] or {}).get("interval"):
        notes.append("The text is a single unit, so there are no intervals.")
    if not evaluation.get("tasks"):
        notes.append("No task was measured: evaluate.tasks is empty.")
    if run.get("speed"):
        rounds = ((run["speed"].get("asked") or {}).get("rounds")) or 1
        often = "one round each" if rounds == 1 else f"the median of {rounds} rounds each"
        notes.append(
            f"Speed is {often}, in turns, in the bundled runtime on this machine, whatever else it was doing: other "
            "engines were not run."
        )
    else:
        notes.append("Speed when serving, and loading in other engines, were not measured by this run.")
    return notes
