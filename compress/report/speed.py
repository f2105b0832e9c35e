"""Speed: the result of a benchmark as tables, and as one offline page, Markdown and JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.files import io_errors, report_folder
from compress.core.quantities import format_bytes
from compress.report import words
from compress.report.figures import Row
from compress.report.packings import sentence
from compress.report.plots import Plot
from compress.report.render import html, markdown_text, write_files
from compress.report.speed_plots import course_plots, latency_plots

SCHEMA_VERSION = 1
_LATENCIES = {
    "first_token": "first token",
    "per_token": "per output token",
    "gap": "gap between tokens",
}
_SPREAD = {"p50": "p50", "p90": "p90", "p99": "p99", "max": "largest"}
_THROUGHPUT = (
    ("generated_tokens_per_second", "generated tokens/s"),
    ("prompt_tokens_per_second", "prompt tokens/s"),
    ("requests_per_second", "requests/s"),
)
_COUNTS = (("steps", "steps"), ("preemptions", "preemptions"), ("prefix_hit_tokens", "prefix-cache hits (tokens)"))
_MEMORY = (
    ("disk_bytes", "weights on disk"),
    ("weights_bytes", "weights in memory"),
    ("kv_pool_bytes", "KV pool"),
    ("kv_used_bytes", "… used at most"),
    ("activations_bytes", "activations (estimate)"),
    ("graphs_bytes", "captured graphs"),
    ("total_bytes", "in all"),
)


@dataclass(frozen=True)
class SpeedTable:
    """Rows of texts under columns, the first of which names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class SpeedReport:
    """A benchmark's report before it has a form. Pairs are (name, value); all texts are unescaped."""

    title: str
    subtitle: str
    tiles: Sequence[Row]
    tables: Sequence[SpeedTable]
    notices: Sequence[str]
    fallbacks: Sequence[tuple[str, str]]
    small_plots: Sequence[Plot]
    plots: Sequence[Plot]
    workload: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]


def write_speed_report(result: Mapping[str, Any], folder: Path | str) -> tuple[Path, Path, Path]:
    """Write benchmark.html, .md and .json of a result of compress.benchmark into `folder`; returns their paths."""
    data = speed_report(result)
    return write_files(
        folder,
        "benchmark",
        html=html("benchmark.html.j2", report=data),
        text=markdown_text("benchmark.md.j2", report=data),
        data={"schema_version": SCHEMA_VERSION, "kind": "benchmark", **result},
    )


def require_writable(folder: Path | str) -> None:
    """Make the folder of a report now, and see that files can be written there: before an hour of measuring, not after.

    Raises what the operating system says, as `write_speed_report` would.
    """
    folder = report_folder(Path(folder))
    with io_errors("write the report", folder), tempfile.TemporaryFile(dir=folder):
        pass


def speed_report(result: Mapping[str, Any]) -> SpeedReport:
    """What the report of a benchmark shows."""
    models = result["models"]
    name, workload, settings = models[0]["name"], result["workload"], result["settings"]
    against = f"against {models[1]['name']}, in turns; " if len(models) > 1 else ""
    return SpeedReport(
        title=name,
        subtitle=f"{against}{_requests(workload)}, {settings['numerics']} numerics on {settings['device']}",
        tiles=_tiles(models, result["ratios"]),
        tables=speed_tables(result),
        notices=[*result["notices"], *packing_lines(models)],
        fallbacks=[_fallback(model["role"], item) for model in models for item in model["fallbacks"]],
        small_plots=latency_plots(models),
        plots=course_plots(models),
        workload=_workload(workload, settings, models[0]["computes_in"]),
        environment=[(key, str(value)) for key, value in sorted(result["environment"].items()) if value is not None],
    )


def packing_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became of layers with zeros, a line for each outcome."""
    return [f"{model['role']}: {sentence(outcome)}" for model in models for outcome in model.get("packings") or ()]


def speed_tables(result: Mapping[str, Any]) -> list[SpeedTable]:
    """Throughput, latency and memory."""
    models, ratios = result["models"], result["ratios"]
    tables = [_throughput(models, ratios), _latency(models, ratios), _memory(models, ratios)]
    return [*tables, _rounds(models)] if result["settings"]["rounds"] > 1 else tables


def _columns(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["", "artifact"] if len(models) == 1 else ["", "artifact", "original", "ratio"]


def _throughput(models: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any] | None) -> SpeedTable:
    rows = [
        [title, *(three_digits(model["figures"][key]) for model in models), *_ratio(ratios, key)]
        for key, title in _THROUGHPUT
    ]
    for key, title in (("seconds", "time for all requests"), ("load_seconds", "time to load, at best")):
        rows.append([title, *(milliseconds(model["figures"][key]) for model in models), *_ratio(ratios, key)])
    for key, title in _COUNTS:
        rows.append([title, *(f"{model['figures'][key]:,.0f}" for model in models), *([""] if ratios else [])])
    return SpeedTable("Throughput", _columns(models), rows)


def _latency(models: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any] | None) -> SpeedTable:
    rows = []
    for key, title in _LATENCIES.items():
        for model in models:
            name = f"{title}, {model['role']}" if ratios else title
            rows.append([name, *(milliseconds(model["figures"][key][column]) for column in _SPREAD)])
        if ratios:
            rows.append(["ratio", *(_ratio(ratios, f"{key}_{column}")[0] for column in _SPREAD)])
    return SpeedTable("Latency", ["", *_SPREAD.values()], rows)


def _memory(models: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any] | None) -> SpeedTable:
    rows = []
    for key, title in (*_MEMORY, ("peak_bytes", f"held at most by {models[0]['memory']['peak_of']}")):
        if any(model["memory"][key] for model in models):
            sizes = (format_bytes(model["memory"][key]) for model in models)
            rows.append([title, *sizes, *(_ratio(ratios, key) if not ratios or key in ratios else [""])])
        if key == "kv_pool_bytes":
            rows += [[name, *cells, *([""] if ratios else [])] for name, cells in _pool(models)]
    return SpeedTable("Memory", _columns(models), rows)


def _pool(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """How keys and values are kept, and the tokens that the pool holds of them."""
    held = [model["memory"] for model in models]
    if all("kv_tokens" in each for each in held):
        yield "… tokens that it holds", [f"{each['kv_tokens']:,}" for each in held]
        yield "… kept as", [each["kept_as"] for each in held]


def _rounds(models: Sequence[Mapping[str, Any]]) -> SpeedTable:
    rates = [model["figures"]["rounds_generated_tokens_per_second"] for model in models]
    rows = [[str(number), *(three_digits(rate) for rate in row)] for number, row in enumerate(zip(*rates), start=1)]  # noqa: B905
    return SpeedTable("Rounds: generated tokens/s", ["round", *(model["role"] for model in models)], rows)


def _ratio(ratios: Mapping[str, Any] | None, key: str) -> list[str]:
    """The cell of a ratio, where there is a column of them."""
    if ratios is None:
        return []
    return [words.NONE if ratios[key] is None else f"× {three_digits(ratios[key])}"]


def milliseconds(seconds: float | None) -> str:
    """0.0123 -> "12.3 ms"; seconds from one on."""
    if seconds is None:
        return words.NONE
    return f"{three_digits(1000 * seconds)} ms" if seconds < 0.9995 else f"{three_digits(seconds)} s"


def three_digits(value: float | None) -> str:
    """2.9 -> "2.90", so that columns of figures are easily compared."""
    if value is None:
        return words.NONE
    return f"{value:,.0f}" if value >= 999.5 or value == 0 else f"{value:#.3g}".rstrip(".")


def _tiles(models: Sequence[Mapping[str, Any]], ratios: Mapping[str, Any] | None) -> list[Row]:
    """What a person looks for first; below it the original's, or, where there is none, what stands beside it."""
    figures, held = models[0]["figures"], models[0]["memory"]
    prompt = f"and {three_digits(figures['prompt_tokens_per_second'])} of prompts"
    tiles = [
        ("generated tokens/s", lambda model: three_digits(model["figures"]["generated_tokens_per_second"]),
         "generated_tokens_per_second", prompt),
        ("first token, median", lambda model: milliseconds(model["figures"]["first_token"]["p50"]),
         "first_token_p50", f"99 % within {milliseconds(figures['first_token']['p99'])}"),
        ("per output token, median", lambda model: milliseconds(model["figures"]["per_token"]["p50"]),
         "per_token_p50", f"99 % within {milliseconds(figures['per_token']['p99'])}"),
        ("weights in memory", lambda model: format_bytes(model["memory"]["weights_bytes"]),
         "weights_bytes", f"on disk {format_bytes(held['disk_bytes'])}"),
    ]  # fmt: skip
    return [
        Row(name, "", text(models[0]), f"{_ratio(ratios, key)[0]}, original {text(models[1])}" if ratios else beside)
        for name, text, key, beside in tiles
    ]


def _fallback(role: str, item: Mapping[str, Any]) -> tuple[str, str]:
    names = item["layers"]
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{role}: {some}", f"no fast path: {item['reason']}"


def _requests(workload: Mapping[str, Any]) -> str:
    return "1 request" if workload["requests"] == 1 else f"{workload['requests']:,} requests"


def _workload(workload: Mapping[str, Any], settings: Mapping[str, Any], dtype: str) -> list[tuple[str, str]]:
    say: dict[str, tuple[str, Callable[[Any], str]]] = {
        "source": ("requests", str),
        "prompt_tokens": ("prompt tokens", lambda count: f"{count:,}"),
        "output_tokens": ("tokens to generate", lambda count: f"{count:,}"),
        "longest_tokens": ("longest request", lambda count: f"{count:,} tokens"),
        "arrivals": ("arrival", str),
        "seed": ("seed", str),
    }
    told = [(title, text(workload[key])) for key, (title, text) in say.items()]
    rounds = settings["rounds"]
    each = "one pass" if rounds == 1 else f"{rounds} passes each, of whose figures these are the medians"
    told.append(("numerics", f"{settings['numerics']}: activations in {dtype}, on {settings['device']}"))
    return [*told, ("passes", f"{each}; the prefix cache is empty at the start, a short warm-up is not counted")]
