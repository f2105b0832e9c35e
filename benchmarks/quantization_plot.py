"""One picture per model of results/quantize.json: bytes on disk against KL to the original, all methods and tools."""

from pathlib import Path

import quantization_table
import tools

MARKS = {tools.OURS: "o", "llmcompressor": "s", "gptqmodel": "^", "autoround": "D"}
COLOURS = {  # of compress.report.plots, those that are easy to tell apart where marks lie close together
    "rtn": "#c9a227",
    "gptq": "#2f6fde",
    "awq": "#2a9d76",
    "autoround": "#e0803a",
    "hqq": "#8a6fd1",
    "smoothquant": "#d1495b",
}
WIDTH, HEIGHT = 8.4, 6.2
MARK_POINTS, LABEL_POINTS = 7, 9
ASIDE_POINTS = 3.2  # from one method to the next, so that none hides another of the same size


def draw(results: dict[str, object], folder: Path) -> list[Path]:
    """quantize-MODEL.svg for each model; equal figures give equal bytes."""
    entries = [entry for entry in quantization_table.means(results) if "failure" not in entry]
    paths = []
    for model in results["original"]:
        found = [entry for entry in entries if entry["model"] == model]
        if found:
            paths.append(folder / f"quantize-{model}.svg")
            picture(model, found).savefig(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


def picture(model: str, entries: list[dict[str, object]]):
    import matplotlib
    from matplotlib.figure import Figure

    from compress.report.plots import STYLE, short_number

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for entry in entries:
        mark(axes, entry)
        axes.update_datalim([(entry["bytes"] / 1e6, entry["kl"])])  # marks that stand aside do not count by themselves
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(short_number)
    axes.set_xlabel("size of the weights on disk (MB); methods of one size stand side by side")
    axes.set_ylabel("KL divergence from the original (nats)")
    axes.set_title(f"{model}: lower left is better", loc="left", fontsize=11)
    axes.margins(x=0.08, y=0.12)
    axes.autoscale_view()
    label_schemes(axes, entries)
    key(figure, entries)
    return figure


def mark(axes, entry: dict[str, object]) -> None:
    from matplotlib.transforms import ScaledTranslation

    ours, colour = entry["tool"] == tools.OURS, COLOURS[entry["method"]]
    aside = ASIDE_POINTS * ([*COLOURS].index(entry["method"]) - (len(COLOURS) - 1) / 2)
    axes.plot(
        entry["bytes"] / 1e6,
        entry["kl"],
        MARKS[entry["tool"]],
        color=colour,
        markerfacecolor=colour if ours else "none",
        markersize=MARK_POINTS,
        markeredgewidth=1.2,
        zorder=2 if ours else 3,
        transform=axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans),
    )


def label_schemes(axes, entries: list[dict[str, object]]) -> None:
    """The name of each scheme under its best mark."""
    for scheme in quantization_table.ORDER:
        best = min((e for e in entries if e["scheme"] == scheme), key=lambda entry: entry["kl"], default=None)
        if best is None:
            continue
        axes.annotate(
            scheme,
            (best["bytes"] / 1e6, best["kl"]),
            (0, -LABEL_POINTS),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=LABEL_POINTS,
        )


def key(figure, entries: list[dict[str, object]]) -> None:
    """Colours are methods; marks are tools, ours filled."""
    from matplotlib.lines import Line2D

    from compress.report.plots import INK

    methods = [name for name in COLOURS if any(entry["method"] == name for entry in entries)]
    used = [name for name in MARKS if any(entry["tool"] == name for entry in entries)]
    handles = [Line2D([], [], linestyle="none", marker="o", color=COLOURS[name], label=name) for name in methods]
    handles.append(Line2D([], [], linestyle="none", label=" "))
    for name in used:
        face = INK if name == tools.OURS else "none"
        label = "compress (this project)" if name == tools.OURS else f"by {name}"
        handles.append(Line2D([], [], linestyle="none", marker=MARKS[name], color=INK, mfc=face, label=label))
    figure.legend(handles=handles, loc="outside right upper", borderaxespad=0.2)
