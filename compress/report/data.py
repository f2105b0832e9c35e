"""Report data: run.json turned into what a report shows, in words; HTML, Markdown and JSON are written from it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.quantities import format_bytes
from compress.report import layers, words
from compress.report.figures import Row, headline, missing, tiles
from compress.report.packings import run_notes
from compress.report.plots import Plot, Point, size_quality
from compress.report.training import judged_stages, training_plots

SCHEMA_VERSION = 1
MOST_LINES = 200
_TEXT_PROTOCOL = (
    "text", "field", "split", "documents", "documents_read", "window", "stride", "special_tokens", "prefix", "windows",
    "tokens_scored", "text_bytes", "token_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class ReportData:
    """A report before it has a form. Pairs are (name, value); all texts are unescaped."""

    title: str
    subtitle: str
    gate_asked: bool
    gate_failures: Sequence[str]
    tiles: Sequence[Row]
    rows: Sequence[Row]
    missing: Sequence[str]
    plots: Sequence[Plot]
    recipe_yaml: str
    plan: Sequence[tuple[str, str, str, str]]
    stages: Sequence[tuple[str, str, str, str]]
    worth: Sequence[tuple[str, str, str]]
    regressions: Sequence[tuple[str, str, str, str, str]]
    fallbacks: Sequence[tuple[str, str]]
    more_fallbacks: int
    notices: Sequence[str]
    layers: Sequence[layers.LayerRow]
    layers_note: str
    protocol: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]
    lineage: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str, str]]
    schema_version: int = SCHEMA_VERSION


def report_data(run: Mapping[str, Any]) -> ReportData:
    """What the report of a run shows."""
    fallbacks = layers.fallback_lines(run)
    rows, note = layers.layer_rows(run, MOST_LINES)
    return ReportData(
        title=model_name(run),
        subtitle=summary(run),
        gate_asked=bool((run.get("gate") or {}).get("asked")),
        gate_failures=(run.get("gate") or {}).get("failures") or [],
        tiles=tiles(run),
        rows=headline(run),
        missing=missing(run),
        plots=_plots(run),
        recipe_yaml=as_yaml(run["recipe"]),
        plan=_plan(run),
        stages=_stages(run),
        worth=[(_stage_words(stage), *found) for stage, found in judged_stages(run)],
        regressions=_regressions(run),
        fallbacks=fallbacks[:MOST_LINES],
        more_fallbacks=max(0, len(fallbacks) - MOST_LINES),
        notices=[*map(str, run.get("notices") or []), *run_notes(run)],
        layers=rows,
        layers_note=note,
        protocol=protocol_lines(run.get("evaluation")),
        environment=_pairs(run.get("environment") or {}),
        lineage=_lineage(run),
        files=_files(run),
    )


def _regressions(run: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Questions of long contexts that only the original has right: what, where the fact stands, and the answers."""
    found = ((run.get("evaluation") or {}).get("long_context") or {}).get("regressions") or []
    return [
        (
            f"{each['task'].replace('_', ' ')} {each['sample'] + 1}",
            f"{each['length']:,}",
            words.percent(each["depth"]),
            each["answer"],
            each["artifact"],
        )
        for each in found
    ]


def model_name(run: Mapping[str, Any]) -> str:
    """What the source is called: its hub id, its folder's name, or the demo model."""
    is_demo = str((run.get("recipe") or {}).get("model")) in ("demo", "demo/model")
    return "demo model" if is_demo else str(run["source"]["id"])


def summary(run: Mapping[str, Any]) -> str:
    """The stages in a few words: "gptq w4a16, groups of 64"."""
    return " → ".join(_stage_words(stage) for stage in run.get("stages") or []) or "no stage"


def _stage_words(stage: Mapping[str, Any]) -> str:
    settings = stage.get("settings") or {}
    text = str(stage["method"])
    if settings.get("bits_per_weight"):
        text += f" {settings['bits_per_weight']:g} bits"
    elif settings.get("scheme") and settings["scheme"] != text:
        text += f" {settings['scheme']}"
    elif settings.get("bits"):
        text += f" {settings['bits']} bits"
    if stage.get("kind") == "prune":
        text += _share_words(settings)
    size = settings.get("group_size")
    if size:
        text += ", one group per channel" if size == -1 else f", groups of {size}"
    if settings.get("symmetric") is False:
        text += ", asymmetric"
    others = len(settings.get("overrides") or ())
    return text if not others else f"{text}, {'an override' if others == 1 else f'{others} overrides'}"


def _share_words(settings: Mapping[str, Any]) -> str:
    """How much a prune stage takes, as its recipe says it."""
    if settings.get("pattern") not in (None, "unstructured"):
        return f" {settings['pattern']}"
    share = settings.get("sparsity") or settings.get("ratio")
    if share:
        return f" {100 * share:g} %"
    if settings.get("max_size"):
        return f", at most {format_bytes(settings['max_size'])}"
    told = (f", {key} {settings[key]:,}" for key in ("keep", "parameters") if settings.get(key))
    return next(told, "")


def as_yaml(data: Any) -> str:
    """Plain data as YAML without what is empty."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    stream = io.StringIO()
    yaml.dump(_without_nothing(data), stream)
    return stream.getvalue()


def _without_nothing(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plots(run: Mapping[str, Any]) -> list[Plot]:
    plots = []
    perplexity = (run.get("evaluation") or {}).get("perplexity") or {}
    before, after = perplexity.get("original"), perplexity.get("artifact")
    if before and after:
        bounds = perplexity.get("interval")
        interval = tuple(before * (1 + bound) for bound in bounds) if bounds else None
        points = [
            Point("original", run["source"]["bytes"], before, is_original=True),
            Point(summary(run), run["artifact"]["bytes"], after, interval),
        ]
        plots.append(size_quality(points, "perplexity"))
    return plots + training_plots(run) + layers.layer_plots(run)


def _plan(run: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    planned, measured = run.get("plan") or {}, _measured_as_planned(run)
    rows = []
    for key, name, text in (
        ("bytes", "bytes of the weights", lambda value: f"{value:,.0f}"),
        ("artifact_bytes", "bytes of all files", lambda value: f"{value:,.0f}"),
        ("peak_memory_bytes", "peak memory of the stages", format_bytes),
        ("minutes", "time of the stages", lambda value: words.duration(60 * value)),
    ):
        before, after = planned.get(key), measured.get(key)
        if before is None and after is None:
            continue
        ratio = words.signed_percent(after / before - 1) if before and after is not None else words.NONE
        rows.append((name, *(words.NOT_MEASURED if value is None else text(value) for value in (before, after)), ratio))
    return rows


def _measured_as_planned(run: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the things that a plan covers: it leaves the evaluation out."""
    stages = run.get("stages") or []
    seconds = [stage["seconds"] for stage in stages if stage.get("seconds") is not None]
    peaks = [stage["peak_memory_bytes"] for stage in stages if stage.get("peak_memory_bytes")]
    parts = {"minutes": sum(seconds) / 60 if seconds else None, "peak_memory_bytes": max(peaks, default=None)}
    return {**(run.get("measured") or {}), **parts}


def _stages(run: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    minutes = (run.get("measured") or {}).get("minutes")
    rest = (
        None if minutes is None else 60 * minutes - sum(stage.get("seconds") or 0 for stage in run.get("stages") or [])
    )
    rows = _stage_rows(run)
    if run.get("evaluation") and rest is not None:
        rows.append(("evaluate", "original and compressed", words.duration(max(0.0, rest)), words.NONE))
    return rows


def _stage_rows(run: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            str(stage["kind"]),
            _stage_words(stage),
            words.duration(stage.get("seconds")),
            format_bytes(stage["peak_memory_bytes"]) if stage.get("peak_memory_bytes") else words.NOT_MEASURED,
        )
        for stage in run.get("stages") or []
    ]


def protocol_lines(evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How the figures came about, line by line."""
    protocol = (evaluation or {}).get("protocol") or {}
    text, tasks = protocol.get("text"), protocol.get("tasks")
    lines = [("run through", str(protocol["through"]))] if "through" in protocol else []
    lines += [("computed in", str(protocol["dtype"]))] if "dtype" in protocol else []
    lines += [("numerics of the runtime", str(protocol["numerics"]))] if "numerics" in protocol else []
    lines += _parity_lines((evaluation or {}).get("parity"))
    known = [(name, (text or {}).get(name)) for name in _TEXT_PROTOCOL]
    lines += [(name.replace("_", " "), _plain(value)) for name, value in known if value not in (None, "")]
    if text:
        units = "documents" if str(text.get("documents", "")).startswith("each") else "windows"
        lines.append(("intervals", f"95 %, paired bootstrap over {units}, 1000 resamples, seed {protocol.get('seed')}"))
        lines.append(("KL divergence", "of the artifact from the original, in nats, at every scored token"))
    for name, task in ((tasks or {}).get("tasks") or {}).items():
        asked = f"{task['documents']} documents, {task['fewshot']} shots, version {_plain(task['version'])}"
        lines.append((f"task {name}", f"{asked}, requests sha256 {str(task['request_sha256'])[:16]}"))
    if tasks:
        template = "on" if tasks.get("chat_template") else "off"
        lines.append(
            ("lm-eval", f"version {tasks['lm_eval']}, limit {tasks.get('limit') or 'none'}, chat template {template}")
        )
    return lines


def _parity_lines(parity: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the runtime's figures are worth: against transformers, and fast against exact numerics."""
    if not parity:
        return []
    lines = []
    for key, name in (
        ("exact_to_transformers", "runtime (exact) against transformers"),
        ("fast_to_exact", "runtime (fast) against exact"),
    ):
        found = parity[key]
        same = words.percent(found["greedy_agreement"])
        text = f"KL {words.number(found['kl'])}, same likeliest token at {same} of {parity['tokens']:,} positions"
        lines.append((name, f"{text}, log-probabilities within {words.number(found['largest_logprob_difference'])}"))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _pairs(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in data.items() if value is not None]


def _lineage(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    lineage = run.get("lineage") or {}
    lines = [
        ("source", str(lineage.get("source") or run["source"]["id"])),
        ("commit", str(lineage.get("revision") or "none: a local folder")),
        ("licence", str(lineage.get("licence") or "not stated by the source")),
    ]
    return lines + [(name, f"sha256 {digest}") for name, digest in read_files(lineage)]


def read_files(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The files that a run has read, with their SHA-256: those of the source, then of an adapter."""
    adapter = lineage.get("adapter") or {}
    own = [(f"{adapter['source']}/{name}", digest) for name, digest in sorted((adapter.get("sha256") or {}).items())]
    return [*sorted((lineage.get("sha256") or {}).items()), *own]


def _files(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The artifact's files as its manifest lists them, if it still lies where the run left it."""
    manifest = Path(str((run.get("artifact") or {}).get("path") or "")) / "compress.json"
    if not manifest.is_file():
        return []
    files = json.loads(manifest.read_text(encoding="utf-8")).get("files") or []
    return [(str(file["path"]), format_bytes(file["size"]), str(file["sha256"])) for file in files]
