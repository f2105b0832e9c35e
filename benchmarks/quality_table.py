"""results/quality.json from the cases of quality.py, and the Markdown table of it."""

import json
from pathlib import Path
from statistics import mean

import tools

PROTOCOL = (
    "GPTQ of the blocks' linear layers, symmetric, embedding and head untouched; 128 x 250 calibration token ids of "
    "text a, the same for all tools, five seeds; perplexity over the first 200 stories of text b, each scored from its "
    "start, at most 512 tokens, dense fp32 model of the decoded artifact. Peers compute in fp32."
)
Key = tuple[str, int, int]


def write_results(work: Path, out: Path) -> None:
    originals = {path.parent.name: json.loads(path.read_text())["perplexity"] for path in work.glob("*/original.json")}
    settings: dict[tuple[object, ...], dict[str, object]] = {}
    for path in sorted(work.glob("*/cases/*.json")):
        case = json.loads(path.read_text())
        key = tuple(case[field] for field in ("model", "bits", "group_size", "tool", "method", "variant"))
        fields = ("model", "bits", "group_size", "tool", "method", "variant")
        entry = settings.setdefault(key, dict(zip(fields, key, strict=True)) | {"perplexity": {}, "failures": {}})
        where = "failures" if "failure" in case else "perplexity"
        entry[where][str(case["seed"])] = case.get("failure", case.get("perplexity"))
    for entry in settings.values():
        figures = entry["perplexity"].values()
        entry["mean"] = mean(figures) if figures else None
    peers = {path.stem: path.read_text().split() for path in (tools.HERE / "peers").glob("*.txt")}
    versions = {peer: [word for word in words if "==" in word] for peer, words in peers.items()}
    results = {
        "protocol": PROTOCOL,
        "environment": tools.describe_machine(),
        "peers": versions,
        "original": originals,
        "cases": [settings[key] for key in sorted(settings)],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


def figure(entry: dict[str, object] | None) -> str:
    if entry is None:
        return "–"
    if entry["mean"] is None:
        return "failed"
    seeds = len(entry["perplexity"])
    return f"{entry['mean']:.3f}" + ("" if seeds == 5 or entry["method"] == "rtn" else f" ({seeds})")


def best_peer(entries: list[dict[str, object]]) -> dict[str, object] | None:
    scored = [e for e in entries if e["tool"] != tools.OURS and e["method"] == "gptq" and e["mean"] is not None]
    return min(scored, key=lambda entry: entry["mean"], default=None)


def render(results: dict[str, object]) -> str:
    """One table per model; (n) behind a figure: the mean of n seeds instead of five."""
    rows: dict[Key, list[dict[str, object]]] = {}
    for entry in results["cases"]:
        rows.setdefault((entry["model"], entry["bits"], entry["group_size"]), []).append(entry)
    columns = sorted({(e["tool"], e["method"], e["variant"]) for e in results["cases"]})
    lines: list[str] = []
    model = None
    for key in sorted(rows, key=lambda key: (key[0], key[1], key[2] % 999)):  # per channel (-1) last
        (name, bits, group_size), entries = key, rows[key]
        if name != model:
            model = name
            lines += ["", f"### {name}: original {results['original'].get(name, float('nan')):.3f}", ""]
            lines.append("| case | best peer | " + " | ".join(" ".join(column) for column in columns) + " |")
            lines.append("|" + "---|" * (len(columns) + 2))
        found = {(e["tool"], e["method"], e["variant"]): e for e in entries}
        best = best_peer(entries)
        label = f"W{bits} " + ("per channel" if group_size == -1 else f"g{group_size}")
        cells = [figure(found.get(column)) for column in columns]
        rival = "–" if best is None else f"{best['tool']} {best['variant']} {figure(best)}"
        lines.append(f"| {label} | {rival} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
