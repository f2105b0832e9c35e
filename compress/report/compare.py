"""Compare: several artifacts in one report. Figures of different protocols never share a column.

What is read: compress.json and evaluation.json of each artifact, and run.json of the report folder beside it, if there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.core.quantities import format_bytes
from compress.report import words
from compress.report.data import as_yaml, protocol_lines
from compress.report.entries import Entry, read_entries
from compress.report.plots import Plot, Point, size_quality
from compress.report.render import html, markdown_text, write_files

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One figure, and under it the interval of its change."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Comparison:
    """A table (first column names), plots, the protocols that its columns refer to, recipes, and notes."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    plots: Sequence[Plot]
    protocols: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    recipes: Sequence[tuple[str, str]]
    notes: Sequence[str]


def compare(artifacts: Sequence[Path | str], folder: Path | str) -> tuple[Path, Path, Path]:
    """Write comparison.html, .md and .json for `artifacts` into `folder`; returns their paths."""
    data = comparison(artifacts)
    plain = {key: value for key, value in asdict(data).items() if key != "plots"}
    return write_files(
        folder,
        "comparison",
        html=html("compare.html.j2", report=data),
        text=markdown_text("compare.md.j2", report=data),
        data={"schema_version": SCHEMA_VERSION, "kind": "comparison", **plain},
    )


def comparison(artifacts: Sequence[Path | str]) -> Comparison:
    """What a comparison of `artifacts` shows. InputError for a folder that is no artifact of ours."""
    entries = read_entries(artifacts)
    columns, cells, protocols, notes = _figures(entries)
    costs = [_costs(entry) for entry in entries]
    fixed = ["artifact", "method", "size", "bits per weight"]
    rows = [
        [
            *map(Cell, (entry.name, entry.summary, format_bytes(entry.bytes), _bits(entry))),
            *cells[number],
            *costs[number],
        ]
        for number, entry in enumerate(entries)
    ]
    original = _original_row(entries, columns)
    if original:
        rows.insert(0, original)
    sources = list(dict.fromkeys(entry.source for entry in entries))
    if len(sources) > 1:
        notes.append(f"The artifacts come from different models: {', '.join(sources)}.")
    return Comparison(
        title=f"{len(entries)} artifacts of {sources[0]}" if len(sources) == 1 else f"{len(entries)} artifacts",
        columns=[*fixed, *(column.title for column in columns), "time", "peak memory"],
        rows=rows,
        plots=_plots(entries, columns),
        protocols=protocols,
        recipes=[(entry.name, as_yaml(entry.recipe)) for entry in entries],
        notes=notes,
    )


@dataclass(frozen=True)
class _Column:
    """A figure under one protocol: `of[i]` is (original, artifact, interval of the change) of entry i, or None."""

    title: str
    kind: str
    of: Sequence[Mapping[str, Any] | None]


def _figures(entries: Sequence[Entry]) -> tuple[list[_Column], list[list[Cell]], list, list[str]]:
    columns, protocols, notes = [], [], []
    texts = _protocols(entries, _text_protocol)
    for number, protocol in enumerate(texts, start=1):
        mark = f" (text {number})" if len(texts) > 1 else ""
        members = [entry if _text_protocol(entry) == protocol else None for entry in entries]
        for kind, title in (("perplexity", "perplexity"), ("kl", "KL divergence"), ("flips", "flips")):
            of = [member and member.evaluation.get(kind) for member in members]
            if any(of):
                columns.append(_Column(f"{title}{mark}", kind, of))
        first = next(member for member in members if member)
        protocols.append((f"text{f' {number}' if mark else ''}", protocol_lines(_only_text(first.evaluation))))
    if len(texts) > 1:
        notes.append(
            "The artifacts were scored on text by different protocols: their figures stand in columns of their own."
        )
    columns += _task_columns(entries, notes)
    unmeasured = [entry.name for entry in entries if not entry.evaluation]
    if unmeasured:
        notes.append(f"Not measured: the quality of {', '.join(unmeasured)}.")
    cells = [[_cell(column.kind, column.of[number]) for column in columns] for number in range(len(entries))]
    return columns, cells, protocols, notes


def _protocols(entries: Sequence[Entry], protocol_of: Any) -> list[str]:
    return list(dict.fromkeys(protocol for entry in entries if (protocol := protocol_of(entry))))


def _text_protocol(entry: Entry) -> str:
    protocol = entry.evaluation.get("protocol") or {}
    if not protocol.get("text"):
        return ""
    original = (entry.evaluation.get("perplexity") or {}).get("original")
    return json.dumps([protocol["text"], protocol.get("through"), protocol.get("dtype"), original], sort_keys=True)


def _only_text(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {"protocol": {**evaluation["protocol"], "tasks": None}}


def _task_columns(entries: Sequence[Entry], notes: list[str]) -> list[_Column]:
    columns = []
    found = [(entry.evaluation.get("tasks") or {}) for entry in entries]
    names = dict.fromkeys((task, metric) for tasks in found for task, metrics in tasks.items() for metric in metrics)
    for task, metric in names:

        def protocol_of(entry: Entry, task: str = task) -> str:
            protocol = entry.evaluation.get("protocol") or {}
            asked = ((protocol.get("tasks") or {}).get("tasks") or {}).get(task)
            return json.dumps([asked, protocol.get("through"), protocol.get("dtype")], sort_keys=True) if asked else ""

        protocols = _protocols(entries, protocol_of)
        for number, protocol in enumerate(protocols, start=1):
            mark = f" (protocol {number})" if len(protocols) > 1 else ""
            of = [
                (entry.evaluation.get("tasks") or {}).get(task, {}).get(metric)
                if protocol_of(entry) == protocol
                else None
                for entry in entries
            ]
            if any(of):
                columns.append(_Column(f"{task}: {metric}{mark}", "task", of))
        note = f"{task} was asked in different ways: its figures stand in columns of their own."
        if len(protocols) > 1 and note not in notes:
            notes.append(note)
    return columns


def _cell(kind: str, figures: Mapping[str, Any] | None) -> Cell:
    if not figures:
        return Cell(words.NONE)
    if kind == "kl":
        return Cell(words.number(figures["mean"], 3), words.between(figures["interval"]))
    if kind == "flips":
        return Cell(words.percent(figures["share"]), words.between(figures["interval"], words.percent))
    if kind == "perplexity":
        text, change = words.signed_percent, figures["increase"]
    else:
        text, change = words.change, figures["difference"]
    known = "" if change is None else text(change)
    return Cell(words.number(figures["artifact"]), words.between(figures["interval"], text) or known)


def _bits(entry: Entry) -> str:
    return words.number(8 * entry.bytes / entry.parameters) if entry.parameters else words.NONE


def _costs(entry: Entry) -> list[Cell]:
    measured = (entry.run or {}).get("measured") or {}
    minutes, peak = measured.get("minutes"), measured.get("peak_memory_bytes")
    seconds = None if minutes is None else 60 * minutes
    return [Cell(words.duration(seconds)), Cell(format_bytes(peak) if peak else words.NOT_MEASURED)]


def _original_row(entries: Sequence[Entry], columns: Sequence[_Column]) -> list[Cell] | None:
    """The common original, where the artifacts have one."""
    if len({entry.source for entry in entries}) > 1:
        return None
    held, parameters = entries[0].source_bytes, entries[0].parameters
    size = format_bytes(held) if held else words.NONE
    bits = words.number(8 * held / parameters) if held and parameters else words.NONE
    figures = []
    for column in columns:
        values = {each["original"] for each in column.of if each and each.get("original") is not None}
        figures.append(words.number(values.pop()) if len(values) == 1 else words.NONE)
    return [Cell(text) for text in (entries[0].source, "original", size, bits, *figures, words.NONE, words.NONE)]


def _plots(entries: Sequence[Entry], columns: Sequence[_Column]) -> list[Plot]:
    """Size against perplexity, one plot for each protocol."""
    plots = []
    for column in columns:
        if column.kind != "perplexity":
            continue
        points = [
            Point(entry.name, entry.bytes, figures["artifact"], _around(figures))
            for entry, figures in zip(entries, column.of, strict=True)
            if figures and figures["artifact"] is not None
        ]
        points += _originals(entries, column)
        if points:
            plots.append(size_quality(points, column.title, f"size-quality-{len(plots) + 1}"))
    return plots


def _originals(entries: Sequence[Entry], column: _Column) -> list[Point]:
    """The originals of the artifacts in a column, each once, where a manifest tells their size."""
    sizes = {entry.source: entry.source_bytes for entry in entries if entry.source_bytes}
    found = {
        entry.source: figures["original"]
        for entry, figures in zip(entries, column.of, strict=True)
        if figures and figures["original"] is not None
    }
    return [
        Point("original" if len(found) == 1 else f"original, {source}", sizes[source], quality, is_original=True)
        for source, quality in found.items()
        if source in sizes
    ]


def _around(figures: Mapping[str, Any]) -> tuple[float, float] | None:
    bounds, original = figures["interval"], figures["original"]
    return (original * (1 + bounds[0]), original * (1 + bounds[1])) if bounds and original else None
