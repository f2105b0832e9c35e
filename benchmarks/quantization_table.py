"""results/quantize.json from the cases of quantization.py, and the Markdown table of it."""

import json
from pathlib import Path
from statistics import mean

import tools
from quality import Workplace

PROTOCOL = (
    "Linear layers of the blocks, symmetric, embedding and head untouched; 128 x 250 calibration token ids of text a, "
    "the same for all tools; perplexity and KL(original, artifact) in nats over the first 200 stories of text b, each "
    "scored from its start, at most 512 tokens, by one evaluator on dense fp32 weights of the decoded artifact (w8a8, "
    "fp8: inputs rounded per token). seconds: the whole command in a process of its own, peers with 16 samples in a "
    "pass and in fp32; bytes: of all .safetensors files. Times mean something only where load_before is small."
)
KEY = ("model", "scheme", "method", "tool", "variant")
FIGURES = ("perplexity", "kl", "seconds", "seconds_after_imports", "peak_rss_anon_bytes", "bytes")
ORDER = ("w8a8", "fp8", "w4-g32", "w4-g128", "w3-g64", "w2-g32")


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def score_original(model: str, place: Workplace) -> None:
    from perplexity import perplexity

    path = place.root / model / "original.json"
    if not path.exists():
        folder = place.model(model)
        found = {"perplexity": perplexity(folder, place.evaluation(model)), "bytes": weight_bytes(folder)}
        path.write_text(json.dumps(found) + "\n")


def write_results(work: Path, out: Path) -> None:
    cases = [json.loads(path.read_text()) for path in sorted(work.glob("*/cases/*.json"))]
    peers = {path.stem: path.read_text().split() for path in (tools.HERE / "peers").glob("*.txt")}
    loads = [case["load_before"] for case in cases]
    results = {
        "protocol": PROTOCOL,
        "environment": tools.describe_machine() | {"load_before": [min(loads, default=0), max(loads, default=0)]},
        "peers": {peer: [word for word in words if "==" in word] for peer, words in peers.items()},
        "original": {path.parent.name: json.loads(path.read_text()) for path in sorted(work.glob("*/original.json"))},
        "cases": sorted(cases, key=lambda case: [str(case[field]) for field in (*KEY, "seed")]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def means(results: dict[str, object]) -> list[dict[str, object]]:
    """One entry for each model, scheme, method and tool: means over the seeds; those that failed have `failure`."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for case in results["cases"]:
        groups.setdefault(tuple(case[field] for field in KEY), []).append(case)
    entries = []
    for key, cases in groups.items():
        entry = dict(zip(KEY, key, strict=True)) | {"seeds": len(cases)}
        whole = [case for case in cases if "failure" not in case]
        if whole:
            entry |= {figure: mean(case[figure] for case in whole) for figure in FIGURES}
        else:
            entry["failure"] = cases[0]["failure"]
        entries.append(entry)
    return entries


def render(results: dict[str, object]) -> str:
    """One table per model; the lowest perplexity of a scheme is bold."""
    lines: list[str] = []
    entries = means(results)
    for model, original in results["original"].items():
        lines += ["", f"**{model}** (perplexity {original['perplexity']:.3f}, {original['bytes'] / 1e6:.2f} MB)", ""]
        lines.append("| scheme | method | tool | perplexity | KL | seconds | peak memory | size |")
        lines.append("|---|---|---|--:|--:|--:|--:|--:|")
        for scheme in ORDER:
            rows = [entry for entry in entries if (entry["model"], entry["scheme"]) == (model, scheme)]
            best = min((row["perplexity"] for row in rows if "failure" not in row), default=None)
            for row in sorted(rows, key=lambda row: row.get("perplexity", float("inf"))):
                lines.append(line(row, best))
    return "\n".join(lines).strip()


def line(row: dict[str, object], best: float | None) -> str:
    tool = str(row["tool"]) if row["variant"] == "default" else f"{row['tool']}, {row['variant']}"
    head = f"| {row['scheme']} | {row['method']} | {tool} |"
    if "failure" in row:
        return f"{head} failed | | | | |"
    figure = f"{row['perplexity']:.3f}"
    figure = f"**{figure}**" if row["perplexity"] == best else figure
    return (
        f"{head} {figure} | {row['kl']:.4f} | {row['seconds']:.0f} | "
        f"{row['peak_rss_anon_bytes'] / 1e6:.0f} MB | {row['bytes'] / 1e6:.2f} MB |"
    )
