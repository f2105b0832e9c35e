"""The Markdown tables of results/kv-long-context.json: right answers of each length, perplexity of each model."""

from collections.abc import Callable

WINDOW = 384
KEPT = (0.5, 0.25, 0.125)
TIMES = {"": "–", "end": "at the prompt's end", "within": "within the prompt"}


def render(results: dict) -> str:
    """A table for each length and one for each model; a column for each share that is kept."""
    lines = []
    for length in dict.fromkeys(way["length"] for way in results["recall"]):
        ways = [way for way in results["recall"] if way["length"] == length]
        lines += [
            f"Right answers of {ways[0]['questions']} ({length:,} tokens of prompt), in brackets those that only the "
            "whole cache has right; kB behind the prompt, and at most.",
            "",
            *table(ways, lambda way: f"{way['right']} ({len(way['regressed'])})"),
            "",
        ]
    for model in dict.fromkeys(way["model"] for way in results["perplexity"]):
        ways = [way for way in results["perplexity"] if way["model"] == model]
        lines += [f"Perplexity, {model}, stories of {WINDOW} tokens.", ""]
        lines += [*table(ways, lambda way: f"{way['perplexity']:.2f}"), ""]
    return "\n".join(lines).strip()


def table(ways: list[dict], shown: Callable[[dict], str]) -> list[str]:
    """A row for each method and time."""
    rows = dict.fromkeys((way["when"], way["method"]) for way in ways)
    lines = ["| keeps | evicts | " + " | ".join(f"{100 * kept:g} %" for kept in (1.0, *KEPT)) + " |"]
    lines.append("|---|---|" + "--:|" * (1 + len(KEPT)))
    for when, method in sorted(rows, key=lambda row: row[0]):
        cells = []
        for kept in (1.0, *KEPT):
            way = next((way for way in ways if (way["when"], way["method"], way["kept"]) == (when, method, kept)), None)
            sizes = "" if way is None else f"; {way['bytes'] / 1e3:.0f}, {way['peak_bytes'] / 1e3:.0f} kB"
            cells.append("" if way is None else shown(way) + sizes)
        lines.append(f"| {method} | {TIMES[when]} | " + " | ".join(cells) + " |")
    return lines
