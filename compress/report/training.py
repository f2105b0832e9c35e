"""What training did: the loss of each step, and what the model was worth behind each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from compress.report import words
from compress.report.plots import COLOURS, STYLE, Plot, inline_svg, legend, matplotlib, new_figure

MOST_POINTS = 400
SMOOTHING = 0.9


PER_PAIR = {"preference"}  # methods whose loss is no mean over tokens


def training_plots(run: Mapping[str, Any]) -> list[Plot]:
    """The losses of the stages that trained, if there are any, and what else they measured at each step."""
    found: list[Plot] = []
    stages = list(enumerate(run.get("stages") or [], 1))
    trained = [(number, stage) for number, stage in stages if stage.get("losses")]
    tokens = [(_name(*each), each[1]["losses"]) for each in trained if each[1]["method"] not in PER_PAIR]
    pairs = [(_name(*each), each[1]["losses"]) for each in trained if each[1]["method"] in PER_PAIR]
    if tokens:
        found.append(_plot("training-loss", "Loss of training", "loss (nats per token)", tokens))
    if pairs:
        found.append(_plot("preference-loss", "Loss of preference", "loss (per pair)", pairs))
    for key, title, unit in (
        ("reward_accuracy", "Pairs whose chosen answer has the larger reward", "share of a step's pairs"),
        ("reward_margin", "By how much the chosen answer's reward is larger", "beta × nats"),
    ):
        curves = [(_name(*each), each[1]["figures"][key]) for each in trained if key in (each[1].get("figures") or {})]
        if curves:
            found.append(_plot(key.replace("_", "-"), title, unit, curves))
    return found


def _name(number: int, stage: Mapping[str, Any]) -> str:
    return f"stage {number}: {stage['method']}"


def _plot(key: str, title: str, unit: str, curves: Sequence[tuple[str, Sequence[float]]]) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(wide=True)
        for place, (name, values) in enumerate(curves):
            colour = COLOURS[place % len(COLOURS)]
            steps = range(1, len(values) + 1, -(-len(values) // MOST_POINTS))
            axes.plot(steps, [values[step - 1] for step in steps], color=colour, lw=0.8, alpha=0.35)
            smooth = smoothed(values)
            line = axes.plot(steps, [smooth[step - 1] for step in steps], color=colour, lw=2)
            line[0].set_label(name)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        legend(axes)
        return Plot(key, title, "Of each step on its batch (thin), and smoothed.", inline_svg(figure, key, title))


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean, corrected for its start."""
    sums = accumulate(values, lambda sum, value: SMOOTHING * sum + (1 - SMOOTHING) * value, initial=0.0)
    return [sum / (1 - SMOOTHING**step) for step, sum in enumerate(sums) if step]


def judged_stages(run: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], tuple[str, str]]]:
    """The stages behind which the model was measured, with perplexity and KL to the original as the report says it."""
    for stage in run.get("stages") or []:
        worth = stage.get("worth")
        if worth:
            found = (worth["perplexity"] or {}).get("artifact"), (worth["kl"] or {}).get("mean")
            yield stage, (words.number(found[0]), words.number(found[1]))
