"""What training did: the loss of each step, and what the model was worth behind each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from compress.report import words
from compress.report.plots import COLOURS, STYLE, Plot, inline_svg, legend, matplotlib, new_figure

MOST_POINTS = 400
SMOOTHING = 0.9


def loss_plot(run: Mapping[str, Any]) -> list[Plot]:
    """The losses of the stages that trained, if there are any."""
    stages = run.get("stages") or []
    curves = [(number, stage, stage["losses"]) for number, stage in enumerate(stages, 1) if stage.get("losses")]
    if not curves:
        return []
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(wide=True)
        for place, (number, stage, losses) in enumerate(curves):
            colour = COLOURS[place % len(COLOURS)]
            steps = range(1, len(losses) + 1, -(-len(losses) // MOST_POINTS))
            axes.plot(steps, [losses[step - 1] for step in steps], color=colour, lw=0.8, alpha=0.35)
            smooth = smoothed(losses)
            line = axes.plot(steps, [smooth[step - 1] for step in steps], color=colour, lw=2)
            line[0].set_label(f"stage {number}: {stage['method']}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        legend(axes)
        caption = "Of each step on its batch (thin), and smoothed."
        return [Plot("training-loss", "Loss of training", caption, inline_svg(figure, "training-loss", "loss by step"))]


def smoothed(losses: Sequence[float]) -> list[float]:
    """An exponential mean, corrected for its start."""
    sums = accumulate(losses, lambda sum, loss: SMOOTHING * sum + (1 - SMOOTHING) * loss, initial=0.0)
    return [sum / (1 - SMOOTHING**step) for step, sum in enumerate(sums) if step]


def judged_stages(run: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], tuple[str, str]]]:
    """The stages behind which the model was measured, with perplexity and KL to the original as the report says it."""
    for stage in run.get("stages") or []:
        worth = stage.get("worth")
        if worth:
            found = (worth["perplexity"] or {}).get("artifact"), (worth["kl"] or {}).get("mean")
            yield stage, (words.number(found[0]), words.number(found[1]))
