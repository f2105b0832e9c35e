"""Plots of a benchmark: how latencies are spread, and what was done over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.plots import ACCENT, INK, SECOND, STYLE, Plot, inline_svg, matplotlib, new_figure

_COLOURS = {"artifact": ACCENT, "original": SECOND}
_FAR = 30
"""Largest over median from which on an axis is logarithmic."""


def speed_plots(models: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Latencies of requests, tokens over time, and requests over time."""
    return [
        _latencies(models, "first_token", "Time to the first token", "From a request's arrival, waiting included."),
        _latencies(models, "per_token", "Time per output token", "Mean of each request after its first token."),
        _tokens(models),
        _requests(models),
    ]


def _latencies(models: Sequence[Mapping[str, Any]], key: str, title: str, note: str) -> Plot:
    """Share of requests that were served within a time."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        every: list[float] = []
        for model in models:
            values = [1000 * value for value in model["series"]["latencies"][key]]
            if not values:
                continue
            every += values
            shares = [100 * (number + 1) / len(values) for number in range(len(values))]
            axes.step([values[0], *values], [0, *shares], where="post", color=_COLOURS[model["role"]], lw=2)
            axes.lines[-1].set_label(model["role"])
        axes.set_ylim(0, 104)
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("% of requests, at most")
        _scale(axes, sorted(every))
        _name(axes, models)
        return Plot(
            f"narrow-{key}", title, f"{note} Further left is better.", inline_svg(figure, f"narrow-{key}", title)
        )


def _scale(axes, values: Sequence[float]) -> None:
    if values and values[-1] > _FAR * values[len(values) // 2] > 0:
        axes.set_xscale("log")
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
        axes.legend(loc="best")
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
        axes.legend(loc="best")
        caption = "Running requests get a token or a part of their prompt in every step; the others wait."
        return Plot("requests", "Requests over time", caption, inline_svg(figure, "requests", "requests over time"))


def _name(axes, models: Sequence[Mapping[str, Any]]) -> None:
    if len(models) > 1:
        axes.legend(loc="lower right", labelcolor=INK)
