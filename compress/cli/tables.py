"""What a run and a plan look like in a terminal of 80 columns. Built from plain data; needs no torch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from compress.cli.console import clean
from compress.cli.words import NOTHING, change, duration, figure, percent
from compress.core.quantities import format_bytes

if TYPE_CHECKING:
    from compress.core.passes import LayerPlan, Plan
    from compress.planning import RunPlan

Row = tuple[str, str, str, str]
SIGNS = {"yes": "+", "no": "-", "with-conditions": "~", "unknown": "?"}
"""What stands before an engine's verdict."""

_SHARES = ("acc_norm", "acc", "exact_match", "f1")


def grid(*columns: str, title: str = "", figures: bool = True) -> Table:
    """An empty table in the house style: columns between the first and the last hold figures, to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=clean(title) or None, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        right = figures and 0 < number < len(columns) - 1
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """A row of untrusted text."""
    table.add_row(*(Text(clean(cell)) for cell in cells))


def before_after(summary: Mapping[str, Any]) -> Table:
    """Size, bits per weight, perplexity, KL and tasks of original and artifact, from run.json."""
    table = grid("", "original", "compressed", "change")
    for row in [*_size_rows(summary), *quality_rows(summary.get("evaluation") or {}), *_speed_rows(summary)]:
        add_row(table, *row)
    return table


def _size_rows(summary: Mapping[str, Any]) -> Iterator[Row]:
    source, artifact = summary["source"], summary["artifact"]
    before, after = source["bytes"], artifact["bytes"]
    yield "size of weights", format_bytes(before), format_bytes(after), change(after / before - 1)
    was, now = source["parameters"], artifact.get("parameters", source["parameters"])
    if was != now:
        yield "parameters", f"{was:,}", f"{now:,}", change(now / was - 1)
    bits = 8 * before / was
    yield "bits per weight", f"{bits:.2f}", f"{artifact['bits_per_weight']:.2f}", ""
    kept = artifact.get("kv_cache")
    if kept:
        full, now = kept["full_token_bytes"], kept["token_bytes"]
        was = f"{format_bytes(full)} in {kept['full_dtype']}"
        yield "keys and values of a token", was, format_bytes(now), change(now / full - 1)
        if kept["eviction"]:
            yield "tokens that keep theirs", "all", kept["eviction"], ""


def _speed_rows(summary: Mapping[str, Any]) -> Iterator[Row]:
    for found in (summary.get("speed") or {}).get("found") or ():
        rates = found["tokens_per_second"]
        before, after = rates["original"], rates["artifact"]
        name = f"tokens a second, batch {found['batch']}"
        yield name, figure(before), figure(after), change(after / before - 1)


def quality_rows(evaluation: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of an evaluation; what was not measured has none."""
    text = evaluation.get("perplexity")
    if text:
        increase = change(text.get("increase"), text.get("interval"))
        yield "perplexity", figure(text["original"]), figure(text["artifact"]), increase
    per_byte = evaluation.get("bits_per_byte")
    if per_byte:
        yield "bits per byte", figure(per_byte["original"]), figure(per_byte["artifact"]), ""
    divergence = evaluation.get("kl")
    if divergence:
        yield "KL divergence (nats)", NOTHING, figure(divergence["mean"]), f"99th: {figure(divergence['p99'])}"
    flips = evaluation.get("flips")
    if flips:
        yield "top-1 flips", NOTHING, percent(flips["share"]), ""
    refusals = evaluation.get("refusals")
    if refusals:
        for kind in ("harmful", "harmless"):
            found = refusals[kind]
            before = NOTHING if found["original"] is None else percent(found["original"])
            yield f"{kind} prompts refused", before, percent(found["artifact"]), ""
        if refusals["changed"]:
            yield "refused by one alone", NOTHING, percent(refusals["changed"]["share"]), ""
    for name, metrics in (evaluation.get("tasks") or {}).items():
        yield from _task_rows(name, metrics)
    yield from _long_context_rows(evaluation.get("long_context") or {})


def _long_context_rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for task, lengths in (found.get("tasks") or {}).items():
        for length, figures in lengths.items():
            moved = change(figures["difference"], figures["interval"], "pt")
            yield f"{task}, {length} tokens", percent(figures["original"]), percent(figures["artifact"]), moved
    for length, figures in (found.get("perplexity") or {}).items():
        increase = change(figures["increase"], figures["interval"])
        yield f"perplexity, {length} tokens", figure(figures["original"]), figure(figures["artifact"]), increase


def _task_rows(name: str, metrics: Mapping[str, Any]) -> Iterator[Row]:
    main = next((metric for metric in _SHARES if metric in metrics), None)
    for metric in [main] if main else sorted(metrics):
        found = metrics[metric]
        if metric in _SHARES:
            moved = change(found.get("difference"), found.get("interval"), "pt")
            yield f"{name} ({metric})", percent(found["original"]), percent(found["artifact"]), moved
        else:
            yield f"{name} ({metric})", figure(found["original"]), figure(found["artifact"]), ""


def cost_line(summary: Mapping[str, Any]) -> str:
    """Time, peak memory and fallbacks in one line."""
    measured = summary.get("measured") or {}
    parts = [f"stages and evaluation took {duration(60 * measured.get('minutes', 0))}"]
    parts.append(f"peak memory {format_bytes(measured.get('peak_memory_bytes', 0))}")
    fallbacks = len(summary.get("fallbacks") or ())
    if fallbacks:
        parts.append(f"{fallbacks} fallback{'s' if fallbacks > 1 else ''}, see the report")
    return " · ".join(parts)


def plan_table(plan: "RunPlan") -> Table:
    """What the plan comes to."""
    table = grid("planned", "")
    add_row(
        table, "weights", f"{format_bytes(plan.bytes_in)} → {format_bytes(plan.bytes_out)} ({plan.bytes_out:,} bytes)"
    )
    add_row(table, "all files of the artifact", f"about {format_bytes(plan.artifact_bytes)}")
    add_row(table, "peak memory of the stages", f"about {format_bytes(plan.peak_memory_bytes)}")
    add_row(table, "disk while it runs", f"about {format_bytes(plan.disk_bytes)}")
    add_row(table, "time", f"about {duration(60 * plan.minutes)}, without the evaluation")
    return table


def layers_table(stage: "Plan", title: str, *, every: bool) -> Table:
    """The layers that a stage touches: summed up by what happens to them, or every one."""
    if every:
        table = grid("layer", "shape", "bytes", "becomes", title=title)
        table.columns[0].no_wrap = True
        for layer in stage.layers:
            shape = "×".join(map(str, layer.shape))
            add_row(table, layer.name, shape, f"{layer.bytes_out:,}", fate(layer))
        return table
    table = grid("layers", "before", "after", "become", title=title)
    fates = Counter(fate(layer) for layer in stage.layers)
    for found, count in fates.items():
        alike = [layer for layer in stage.layers if fate(layer) == found]
        before, after = sum(layer.bytes_in for layer in alike), sum(layer.bytes_out for layer in alike)
        add_row(table, count, format_bytes(before), format_bytes(after), found)
    return table


def fate(layer: "LayerPlan") -> str:
    """ "w4a16, groups of 64", "50 % zeros", "narrower: 96×64", or why the layer stays as it is."""
    if len(layer.alternatives) > 1:
        return f"one of {', '.join(scheme.name for scheme in layer.alternatives)}"
    if layer.sparsity is not None:
        return f"{100 * layer.sparsity:.4g} % zeros{f', {layer.reason}' if layer.reason else ''}"
    if layer.becomes:
        return "narrower: " + "×".join(map(str, layer.becomes))
    if layer.scheme is None:
        return f"unchanged: {layer.reason}" if layer.reason else "unchanged"
    word = "blocks" if layer.scheme.blocks else "groups"
    groups = "one scale per channel" if layer.scheme.group_size == -1 else f"{word} of {layer.scheme.group_size}"
    kind = "" if layer.scheme.symmetric else ", asymmetric"
    kind += ", double quantization" if layer.scheme.double_quantization else ""
    return f"{layer.scheme.name}, {groups}{kind}{f' ({layer.reason})' if layer.reason else ''}"
