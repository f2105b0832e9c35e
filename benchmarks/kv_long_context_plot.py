"""Pictures of results/kv-long-context.json: right answers, and perplexity, against the bytes that pages take."""

from pathlib import Path

COLOURS = {
    "h2o": "#d1495b",
    "snapkv": "#2f6fde",
    "pyramidkv": "#7fb2f0",
    "adakv": "#12357a",
    "tova": "#2a9d76",
    "expected_attention": "#8a6fd1",
    "keydiff": "#e0803a",
    "key_norm": "#c9a227",
    "streaming": "#5b8e9c",
}
PLAIN = {"random": ("#8c8c8c", ":"), "cut": ("#222222", "--")}
WIDTH, HEIGHT = 8.4, 4.6


def draw(results: dict, folder: Path) -> list[Path]:
    """kv-recall-LENGTH.svg and kv-perplexity-MODEL.svg; equal figures give equal bytes."""
    parts: dict[str, list[dict]] = {}
    for way in results["recall"]:
        if way["when"] != "within":
            parts.setdefault(f"kv-recall-{way['length']}", []).append(way)
    for way in results["perplexity"]:
        parts.setdefault(f"kv-perplexity-{way['model']}", []).append(way)
    paths = []
    for name, ways in parts.items():
        paths.append(folder / f"{name}.svg")
        picture(name, ways).savefig(paths[-1], metadata={"Date": None, "Creator": None})
    return paths


def picture(name: str, ways: list[dict]):
    import matplotlib
    from matplotlib.figure import Figure

    from compress.report.plots import INK, STYLE

    matplotlib.rcParams.update(STYLE)
    is_recall = name.startswith("kv-recall-")

    def quality(way: dict) -> float:
        return 100 * way["right"] / way["questions"] if is_recall else way["perplexity"]

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(way["method"] for way in ways):
        mine = sorted((way for way in ways if way["method"] == method), key=lambda way: way["bytes"])
        points = [way["bytes"] / 1e3 for way in mine], [quality(way) for way in mine]
        if method == "all":
            axes.plot(*points, "*", color=INK, markersize=13, label="all kept")
            continue
        colour, line = PLAIN.get(method, (COLOURS.get(method, INK), "-"))
        style = {"marker": "x", "zorder": 4} if method == "cut" else {"marker": "o"}
        label = method
        if method == "cut":
            beyond = "" if is_recall else ": " + ", ".join(f"{value:.1f}" for value in points[1])
            label = f"cut context{beyond}"
        axes.plot(*points, line, markersize=5, linewidth=1.4, color=colour, label=label, **style)
    if not is_recall:  # a context that is cut is far worse: its figures are in the key
        shown = [way["perplexity"] for way in ways if way["method"] != "cut"]
        axes.set_ylim(min(shown) - 0.1, max(shown) + 0.3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("keys and values of a sequence behind its prompt (kB, pages as allocated)")
    axes.set_ylabel("right answers (%)" if is_recall else "perplexity")
    better = "upper left" if is_recall else "lower left"
    subject = name.rsplit("-", 1)[1] if is_recall else name.removeprefix("kv-perplexity-")
    title = f"recall, prompts of {int(subject):,} tokens" if is_recall else f"{subject}, long stories"
    axes.set_title(f"{title}: {better} is better", loc="left", fontsize=11)
    figure.legend(loc="outside right upper", borderaxespad=0.2)
    return figure
