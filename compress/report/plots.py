"""Plots as inline SVG: one look for all, small, equal for equal figures, readable on a light and on a dark page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO

from markupsafe import Markup, escape

from compress.core.lazy import lazy_module
from compress.report.escape import visible

figure_module = lazy_module("matplotlib.figure")
matplotlib = lazy_module("matplotlib")

INK = "#6b7683"
ACCENT = "#2f6fde"
SECOND = "#e0803a"
COLOURS = ("#2f6fde", "#e0803a", "#2a9d76", "#b0529c", "#8a6fd1", "#c9a227", "#4aa3c7", "#d1495b", "#7a8b3a")
BITS = {2: "#d1495b", 3: "#e0803a", 4: "#2f6fde", 5: "#4aa3c7", 6: "#2a9d76", 7: "#7a8b3a", 8: "#8a6fd1"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa4af",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#9aa4af",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_MARK_POINTS = 9
_LABEL_OFFSET = (10, 7)
_LINE_POINTS = 13
_MOST_LINES = 15
_WIDE_INCHES = 6.2
"""Of plots over the depth of a model or over time: readable on a phone's screen as on a large one."""
_HANDLE_POINTS, _LETTER_POINTS, _LEGEND_ROW_INCHES = 44, 5.4, 0.2


@dataclass(frozen=True)
class Plot:
    """One picture: `key` names it in the page, `caption` says how to read it."""

    key: str
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Point:
    """An artifact in the size-quality plane."""

    label: str
    size_bytes: int
    quality: float
    interval: tuple[float, float] | None = None
    is_original: bool = False


def size_quality(points: Sequence[Point], quality: str, key: str = "size-quality") -> Plot:
    """Megabytes against a figure that should be low, one mark per model; models at one point share a mark."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        for number, (point, *others) in enumerate(_coinciding(points)):
            names = "\n".join(shortened(each.label) for each in (point, *others))
            _mark(axes, point, names, INK if point.is_original else COLOURS[number % len(COLOURS)])
        axes.set_xlabel("size of the weights (MB)")
        axes.set_ylabel(quality)
        axes.set_xlim(left=0, right=1.25 * max(point.size_bytes for point in points) / 1e6)
        axes.margins(y=0.25)
        _part_labels(figure, axes)
        caption = "Lower left is better. Bars are 95 % intervals of the difference to the original, where there is one."
        return Plot(key, f"Size and {quality}", caption, inline_svg(figure, key, f"{quality} over size"))


def _coinciding(points: Sequence[Point]) -> list[list[Point]]:
    """Points that differ in nothing but their label, together."""
    groups: dict[Point, list[Point]] = {}
    for point in points:
        groups.setdefault(replace(point, label=""), []).append(point)
    return list(groups.values())


def _mark(axes, point: Point, names: str, colour: str) -> None:
    x = point.size_bytes / 1e6
    if point.interval is not None:
        low, high = point.interval
        axes.errorbar(
            x,
            point.quality,
            yerr=[[max(0, point.quality - low)], [max(0, high - point.quality)]],
            color=colour,
            capsize=4,
        )
    axes.plot(x, point.quality, "s" if point.is_original else "o", color=colour, markersize=_MARK_POINTS)
    axes.annotate(names, (x, point.quality), _LABEL_OFFSET, textcoords="offset points", color=colour)


def _part_labels(figure, axes) -> None:
    """Move labels up or down, line by line, until none covers another or a mark; where all is full, they stay."""
    with _fonts_of_readers():
        figure.draw_without_rendering()  # places the axes, which decides how far points are apart
    figure.set_layout_engine("none")
    labels, frame = list(axes.texts), axes.get_window_extent()
    radius = _MARK_POINTS / 2 * figure.dpi / 72
    taken = [_around(axes.transData.transform(label.xy), radius) for label in labels]
    steps = [0, *(sign * lines for lines in range(1, _MOST_LINES) for sign in (-1, 1))]
    right, up = _LABEL_OFFSET
    for label in labels:
        box = label.get_window_extent()
        line = _LINE_POINTS * figure.dpi / 72
        moved = ((step, box.translated(0, step * line)) for step in steps)
        free = (
            (step, place)
            for step, place in moved
            if frame.y0 <= place.y0 and place.y1 <= frame.y1 and not any(place.overlaps(other) for other in taken)
        )
        step, place = next(free, (0, box))
        label.xyann = (right, up + step * _LINE_POINTS)
        taken.append(place)


def _around(centre: Sequence[float], radius: float):
    from matplotlib.transforms import Bbox

    x, y = centre
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def error_per_layer(outputs: Sequence[float | None], kinds: Mapping[str, Sequence[float | None]]) -> Plot:
    """The error of each block's output and of its layers, along the depth of the model, on a logarithmic axis."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(wide=True)
        blocks = range(len(outputs))
        marker = "o" if len(outputs) < 20 else "None"
        for number, (kind, errors) in enumerate(kinds.items()):
            colour = COLOURS[(number + 1) % len(COLOURS)]
            line = axes.plot(blocks, _gaps(errors), marker=marker, color=colour, lw=1, ms=3.5, alpha=0.85)
            line[0].set_label(shortened(kind))
        if any(error for error in outputs):
            axes.plot(blocks, _gaps(outputs), marker=marker, color=ACCENT, lw=2.4, ms=5, label="output of the block")
        if any(error for errors in (outputs, *kinds.values()) for error in errors):
            axes.set_yscale("log")
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(short_number)
        axes.set_xlabel("block")
        axes.set_ylabel("relative squared error")
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(axes)
        caption = "Against the uncompressed weights on the same inputs; layers weighted by what they were shown."
        return Plot(
            "error-per-layer", "Error per layer", caption, inline_svg(figure, "error-per-layer", "error per layer")
        )


def bits_per_layer(kinds: Sequence[str], bits: Sequence[Sequence[float | None]]) -> Plot:
    """One square per layer, coloured by its bits; columns are blocks. None: kept as it was."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        columns = max(map(len, bits))
        figure, axes = new_figure(wide=True, height=0.9 + 0.3 * len(kinds))
        present = sorted({round(value) for row in bits for value in row if value is not None})
        for row, values in enumerate(bits):
            for column, value in enumerate(values):
                colour = "#c3c9d0" if value is None else BITS.get(round(value), INK)
                axes.add_patch(_patches().Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, color=colour, lw=0))
        axes.set_xlim(-0.6, columns - 0.4)
        axes.set_ylim(len(kinds) - 0.4, -0.6)
        axes.set_yticks(range(len(kinds)), [shortened(kind) for kind in kinds])
        axes.tick_params(length=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("block")
        for spine in axes.spines.values():
            spine.set_visible(False)
        handles = [_patches().Patch(color=BITS.get(value, INK), label=f"{value} bits") for value in present]
        if any(value is None for row in bits for value in row):
            handles.append(_patches().Patch(color="#c3c9d0", label="kept"))
        legend(axes, handles)
        caption = "Bits of the stored codes, scales apart; experts of one block are averaged."
        return Plot("bits-per-layer", "Bits per layer", caption, inline_svg(figure, "bits-per-layer", "bits per layer"))


def shortened(text: str, longest: int = 28) -> str:
    """A label that fits beside a mark."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def new_figure(*, wide: bool = False, width: float | None = None, height: float | None = None):
    """A figure on no ground, and its axes."""
    figure = figure_module.Figure(
        figsize=(width or (_WIDE_INCHES if wide else 5.6), height or 3.4), layout="constrained"
    )
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def short_number(value: float, position: int) -> str:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten; matplotlib's own need its mathematics."""
    return f"{value:.3g}" if f"{value:e}"[0] in "125" and round(float(f"{value:e}"[:8]), 3) % 1 == 0 else ""


def _patches():
    import matplotlib.patches

    return matplotlib.patches


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [value or float("nan") for value in values]


def legend(axes, handles=None) -> None:
    """Below the axes, where there is anything to name; the figure grows by it, so that the axes keep their height."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    if not handles:
        return
    figure = axes.figure
    width, height = figure.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(72 * width / (_HANDLE_POINTS + _LETTER_POINTS * longest))))
    rows = -(-len(handles) // columns)
    figure.set_size_inches(width, height + rows * _LEGEND_ROW_INCHES)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, borderaxespad=0.2)


@contextmanager
def _fonts_of_readers() -> Iterator[None]:
    """Names in scripts that the measuring font lacks are drawn by the reader's own fonts all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        yield


def inline_svg(figure, key: str, label: str) -> Markup:
    """The figure as an <svg> element: no prolog, no metadata, no fixed size; ids of its own within the page."""
    stream = StringIO()
    with _fonts_of_readers():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)(?!' + re.escape(key) + "-)", rf"\g<1>{key}-", text)
    text = re.sub(r'^<svg\b([^>]*?)\s(?:width)="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg\b([^>]*?)\s(?:height)="[^"]*"', r"<svg\1", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(visible(label))}"', 1).strip())
