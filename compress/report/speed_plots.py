"""Plots of a benchmark: how latencies are spread, and what was done over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.plots import (
    ACCENT,
    INK,
    SECOND,
    STYLE,
    Plot,
    inline_svg,
    legend,
    matplotlib,
    new_figure,
    short_number,
)

_COLOURS = {"artifact": ACCENT, "original": SECOND}
_SMALL = (
    ("first_token", "Time to the first token", "Of each request, from its arrival on."),
    ("per_token", "Time per output token", "Mean of each request after its first token."),
    ("gap", "Gap between tokens", "Every token after the first of its request."),
)

_OF_ONE_PASS = "Of the pass with the median throughput; tables have medians of all passes."

_FAR = 8
"""Largest over median from which on an axis is logarithmic."""

_CROWDED = 150
"""Largest over smallest from which on such an axis names powers of ten only."""


def latency_plots(models: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """How latencies are spread, small: they stand side by side. Left out: what there is nothing of."""
    return [
        _latencies(models, key, title, note)
        for key, title, note in _SMALL
        if any(model["series"]["latencies"][key] for model in models)
    ]


def course_plots(models: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """What was done over time: tokens, requests."""
    return [_tokens(models), _requests(models)]


def _latencies(models: Sequence[Mapping[str, Any]], key: str, title: str, note: str) -> Plot:
    """Share of requests, or of tokens, that came within a time."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(width=3.7, height=2.7)
        values_of = {model["role"]: model["series"]["latencies"][key] for model in models}
        every = sorted(value for values in values_of.values() for value in values)
        unit, factor = ("seconds", 1.0) if every and every[-1] >= 2 else ("milliseconds", 1000.0)
        for role, values in values_of.items():
            if values:
                shares = [100 * (number + 1) / len(values) for number in range(len(values))]
                times = [factor * value for value in (values[0], *values)]
                axes.step(times, [0, *shares], where="post", color=_COLOURS[role], lw=2, label=role)
        axes.set_ylim(0, 104)
        axes.set_xlabel(unit)
        axes.set_ylabel("% of tokens" if key == "gap" else "% of requests")
        _scale(axes, every)
        _name(axes, models)
        return Plot(key, title, f"{note} {_OF_ONE_PASS}".strip(), inline_svg(figure, key, title))


def _scale(axes, values: Sequence[float]) -> None:
    if values and values[-1] > _FAR * values[len(values) // 2] > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(short_number)
        crowded = values[-1] > _CROWDED * values[0]
        axes.xaxis.set_minor_formatter((lambda value, position: "") if crowded else short_number)
    else:
        axes.set_xlim(left=0)


def _tokens(models: Sequence[Mapping[str, Any]]) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(wide=True)
        for model in models:
            moments, colour = model["series"]["moments"], _COLOURS[model["role"]]
            seconds = [0, *(moment["seconds"] for moment in moments)]
            for field, style in (("generated_tokens", "-"), ("computed_tokens", ":")):
                counts = [0, *(moment[field] for moment in moments)]
                axes.plot(seconds, counts, style, color=colour, lw=2 if style == "-" else 1.6)
                kind = "generated" if style == "-" else "computed"
                axes.lines[-1].set_label(f"{kind}, {model['role']}" if len(models) > 1 else kind)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel("tokens so far")
        legend(axes)
        caption = "Computed counts every token that went through the model, of prompts too; steeper is faster."
        return Plot("tokens", "Tokens over time", caption, inline_svg(figure, "tokens", "tokens over time"))


def _requests(models: Sequence[Mapping[str, Any]]) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(wide=True, height=2.4)
        for model in models:
            moments, colour = model["series"]["moments"], _COLOURS[model["role"]]
            seconds = [moment["seconds"] for moment in moments]
            for field, style in (("running", "-"), ("waiting", ":")):
                axes.step(seconds, [moment[field] for moment in moments], style, where="pre", color=colour, lw=1.6)
                axes.lines[-1].set_label(f"{field}, {model['role']}" if len(models) > 1 else field)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel("requests")
        axes.yaxis.get_major_locator().set_params(integer=True)
        legend(axes)
        caption = "Running requests get a token or a part of their prompt in every step; the others wait."
        return Plot("requests", "Requests over time", caption, inline_svg(figure, "requests", "requests over time"))


def _name(axes, models: Sequence[Mapping[str, Any]]) -> None:
    """Above the axes: a small plot has no room inside that no curve may need."""
    if len(models) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1, labelcolor=INK)
