"""Layers: error and bits of each layer along the depth of the model, as rows and as plots."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.core.quantities import format_bytes
from compress.report import words
from compress.report.plots import Plot, bits_per_layer, error_per_layer

_IN_BLOCK = re.compile(r"^(?P<list>.*?)\.(?P<block>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class LayerRow:
    """One linear layer of one stage."""

    name: str
    shape: str
    scheme: str
    size: str
    error: str
    damping: str
    note: str


def layer_rows(run: Mapping[str, Any], most: int) -> tuple[list[LayerRow], str]:
    """Rows in the model's order, and a note; of many layers only those with the largest errors."""
    layers = []
    for stage in run.get("stages") or []:
        records = dict(_sites(stage))
        layers += [(layer, records.get(layer["name"]) or {}) for layer in stage.get("layers") or []]
    note = ""
    if len(layers) > most:
        note = f"The {most} layers with the largest error of {len(layers):,}; run.json has all."
        worst = sorted(range(len(layers)), key=lambda place: -(layers[place][1].get("error") or 0))[:most]
        layers = [layers[place] for place in sorted(worst)]
    return [_row(layer, record) for layer, record in layers], note


def _row(layer: Mapping[str, Any], record: Mapping[str, Any]) -> LayerRow:
    retries = record.get("retries") or 0
    damping = "" if record.get("damping") is None else words.number(record["damping"], 2)
    return LayerRow(
        name=str(layer["name"]),
        shape=" × ".join(str(width) for width in layer.get("shape") or []),
        scheme=_became(layer, record),
        size=f"{format_bytes(layer['bytes_in'])} → {format_bytes(layer['bytes_out'])}",
        error="" if record.get("error") is None else words.number(record["error"], 3),
        damping=f"{damping}, {retries} retries" if retries else damping,
        note=_what_was_done(record) or str(layer.get("reason") or ""),
    )


def _became(layer: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if layer.get("sparsity") is not None:
        sparsity = record.get("sparsity")
        return f"{100 * (layer['sparsity'] if sparsity is None else sparsity):.1f} % zeros"
    if layer.get("becomes"):
        return "narrower: " + " × ".join(str(width) for width in layer["becomes"])
    bits, group = layer.get("bits"), layer.get("group_size")
    return "kept" if bits is None else f"{bits} bits, " + ("per channel" if group == -1 else f"groups of {group}")


def fallback_lines(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each layer that got less than its method, or on a second try, and in words what was done and why."""
    records = [found for stage in run.get("stages") or [] for found in _sites(stage)]
    done = {(name, str(record.get("fallback") or "")): _what_was_done(record) for name, record in records}
    listed = [(str(item["where"]), str(item["reason"])) for item in run.get("fallbacks") or []]
    return [(where, done.get((where, reason)) or reason) for where, reason in listed]


def _what_was_done(record: Mapping[str, Any]) -> str:
    """Of a layer whose method was not used; empty of others."""
    reason = str(record.get("fallback") or "")
    return f"rounded to nearest: {reason}" if reason and record.get("method") == "rtn" else reason


def _sites(stage: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(str(site["name"]), site) for block in stage.get("blocks") or [] for site in block.get("sites") or []]


def zeros_of(run: Mapping[str, Any]) -> float | None:
    """The share of zeros among the weights of pruned layers, as the last stage that made any left it."""
    stages = [
        stage
        for stage in run.get("stages") or []
        if any(layer.get("sparsity") is not None for layer in stage.get("layers") or [])
    ]
    if not stages:
        return None
    records = dict(_sites(stages[-1]))
    zeros = weights = 0.0
    for layer in stages[-1]["layers"]:
        if layer.get("sparsity") is not None:
            found = records.get(layer["name"], {}).get("sparsity")
            size = math.prod(layer["shape"])
            zeros += size * (layer["sparsity"] if found is None else found)
            weights += size
    return zeros / weights


def layer_plots(run: Mapping[str, Any]) -> list[Plot]:
    """Error and bits per layer of the last stage that has them."""
    plots = []
    with_blocks = [stage for stage in run.get("stages") or [] if stage.get("blocks")]
    if with_blocks:
        plots += _error_plot(with_blocks[-1]["blocks"])
    with_bits = [
        stage for stage in run.get("stages") or [] if any(layer.get("bits") for layer in stage.get("layers") or [])
    ]
    if with_bits:
        kinds, table = _bits_table(with_bits[-1]["layers"])
        if kinds:
            plots.append(bits_per_layer(kinds, table))
    return plots


def _error_plot(blocks: list[Mapping[str, Any]]) -> list[Plot]:
    errors: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in blocks])
    for number, block in enumerate(blocks):
        for site in block.get("sites") or []:
            if site.get("error") is not None:
                errors[kind_of(site["name"])][number].append(site["error"])
    outputs = [block.get("output_error") for block in blocks]
    if not errors and not any(outputs):
        return []
    return [error_per_layer(outputs, {kind: [_mean(each) for each in columns] for kind, columns in errors.items()})]


def _bits_table(layers: list[Mapping[str, Any]]) -> tuple[list[str], list[list[float | None]]]:
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    columns = 0
    for layer in layers:
        match = _IN_BLOCK.match(layer["name"])
        if match:
            column = int(match["block"])
            columns = max(columns, column + 1)
            cell = cells[kind_of(layer["name"])][column]
            if layer.get("bits") is not None:
                cell.append(layer["bits"])
    return list(cells), [[_mean(row.get(column, [])) for column in range(columns)] for row in cells.values()]


def kind_of(name: str) -> str:
    """q_proj of model.layers.3.self_attn.q_proj; experts gate_proj for each expert's gate_proj."""
    match = _IN_BLOCK.match(name)
    parts = (match["kind"] if match else name).split(".")
    return f"experts {parts[-1]}" if "experts" in parts else parts[-1]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
