"""Writes the figures of benchmarks/results into the project's README and docs, between their markers.

python benchmarks/figures.py [--demo runs/demo-w4.report]      # keep that run as results/demo.json first
python benchmarks/figures.py --check                           # exit 1 if the README says something else
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import compiled_training
import distillation
import kv_eviction
import kv_long_context_plot
import kv_long_context_table
import kv_speed
import loss_memory
import narrow
import preference
import pruning
import quality_table
import quantization_plot
import quantization_table
import recovery
import sparse_linear
import speed
import teacher_cache
import throughput

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
DEMO_FIELDS = ("recipe", "source", "artifact", "evaluation", "measured", "environment")


def read(name: str) -> dict[str, object] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def demo_table() -> str:
    kept = read("demo")
    return "(not measured)" if kept is None else str(kept["markdown"])


def quality_tables() -> str:
    results = read("quality")
    if results is None:
        return "(not measured)"
    lines = [
        "**Quality.** Perplexity after GPTQ, ours against the better of llm-compressor 0.14 and GPTQModel 7.6, each in",
        "the best of its settings for that very case; mean over calibration seeds (their number in brackets).",
        "",
    ]
    for model, original in results["original"].items():
        cases = [case for case in results["cases"] if case["model"] == model]
        rows = [row for bits in (4, 3, 2) for size in (32, 64, 128, -1) if (row := quality_row(cases, bits, size))]
        if rows:
            head = [f"{model} (original {original:.3f}):", "", "| | ours | best peer | |", "|---|---|---|---|"]
            lines += [*head, *rows, ""]
    return "\n".join(lines).strip()


def quality_row(cases: list[dict[str, object]], bits: int, size: int) -> str | None:
    entries = [case for case in cases if (case["bits"], case["group_size"]) == (bits, size)]
    ours = [e for e in entries if e["tool"] == "compress" and e["method"] == "gptq" and e["mean"] is not None]
    peer = quality_table.best_peer(entries)
    if not ours or peer is None:
        return None
    verdict = "better" if ours[0]["mean"] < peer["mean"] else "**worse**"
    label = f"W{bits} " + ("per channel" if size == -1 else f"g{size}")
    counted = [f"{e['mean']:.3f} ({len(e['perplexity'])})" for e in (ours[0], peer)]
    return f"| {label} | {counted[0]} | {counted[1]} {peer['tool']}, {peer['variant']} | {verdict} |"


def speed_tables() -> str:
    lines = []
    for path in sorted(RESULTS.glob("speed-*.json")):
        results = json.loads(path.read_text())
        shapes = " and ".join(f"{shape} shape{_part(shape)}" for shape in results["summary"])
        lines += [f"**Time and memory of {results['method']}, {shapes}.**", "", speed.render(results).strip(), ""]
    return "\n".join(lines).strip() or "**Time and memory.** Not measured in this version."


def _part(shape: str) -> str:
    """Of shapes with few of their blocks (1b-2): a peer that holds the whole model holds little then."""
    _, dash, blocks = shape.partition("-")
    return f", {blocks} of its blocks" if dash else ""


def memory_lines() -> str:
    lines = []
    for path in sorted(RESULTS.glob("memory-*.json")):
        found = json.loads(path.read_text())
        planned, measured = found["planned"], found["measured"]
        lines.append(
            f"- {found['model']}, {found['tokens'][0]} x {found['tokens'][1]} tokens: peak RssAnon "
            f"{measured['peak_rss_anon_bytes'] / 1e6:.0f} MB (planned {planned['peak_memory_bytes'] / 1e6:.0f} MB), "
            f"{measured['bytes_out']:,} bytes of tensors (planned {planned['bytes_out']:,})"
        )
    return "\n".join(["**Memory against the plan.**", "", *lines]) if lines else ""


THROUGHPUT = """\
**The runtime against transformers.** Generated (prefill: read) tokens a second on two threads of a CPU without bf16
instructions, medians; random weights but for the demo model; `benchmarks/throughput.py` says what the rows are.
"""


def throughput_tables() -> str:
    results = read("throughput")
    if results is None:
        return "**The runtime.** Throughput was not measured in this version."
    return f"{THROUGHPUT}\n{throughput.render(results)}"


def simulation_lines() -> str:
    results = read("runtime-simulations")
    if results is None:
        return ""
    waste = {name: f"{100 * results['kv_waste'][name]:.1f} %" for name in ("paged", "static")}
    gaps = {name: results["long_prompt"][name]["largest_over_steady"] for name in ("chunked", "unchunked")}
    fair = results["fairness"]
    service = {name: fair[name]["largest_service_gap"] / fair[name]["bound"] for name in ("vtc", "fcfs")}
    more = 100 * (fair["throughput_vtc_over_fcfs"] - 1)
    worst = max(abs(found["ratio_to_theory"] - 1) for found in results["continuous_batching"])
    busiest = max(results["bookkeeping"], key=lambda found: found["sequences"])
    lines = [
        "**Scheduler and pool in virtual time** (lengths of Azure's trace; `benchmarks/runtime_simulations.py`).",
        "",
        f"- keys and values wasted: {waste['paged']} in pages of 16, {waste['static']} with static rows",
        f"- continuous over static batching: within {100 * worst:.0f} % of theory",
        f"- a prompt of 4,096 tokens among 16 decodes: largest gap {gaps['chunked']:.2f} x the steady one with chunks, "
        f"{gaps['unchunked']:.0f} x without",
        f"- fair scheduling: largest service gap {service['vtc']:.2f} of its bound (first come, first served: "
        f"{service['fcfs']:.1f}), throughput {more:+.1f} %",
        f"- bookkeeping at {busiest['sequences']} sequences: {busiest['median_ms']:.2f} ms a step",
    ]
    return "\n".join(lines)


def batching_lines() -> str:
    results = read("batching")
    if results is None:
        return ""
    gaps = []
    for found in results["long_prompt"]:
        size = found["chunk_tokens"]
        cut = "whole" if size is None else f"in chunks of {size}"
        gaps.append(f"{found['largest_over_steady']:.1f} x {cut}")
    lines = [
        f"**The same on real steps** ({results['shape']} shape, at most 16 at a time; `benchmarks/batching.py`).",
        "",
        f"- continuous over static batching: {results['batching']['continuous_over_padded']:.2f} x padded",
        f"- a prompt of 4,096 tokens among 16 decodes: largest gap over the steady one {', '.join(gaps)}",
    ]
    return "\n".join(lines)


def recipe_table() -> str:
    results = read("recipes")
    if results is None:
        return "(not measured)"
    lines = ["| recipe | size | bits per weight, whole model | perplexity | KL divergence |", "|---|--:|--:|--:|--:|"]
    for found in results["recipes"]:
        perplexity = found["perplexity"]
        low, high = perplexity["interval"]
        lines.append(
            f"| {found['recipe']} | {found['bytes_in'] / 1e6:.2f} → {found['bytes_out'] / 1e6:.2f} MB | "
            f"{found['bits_per_weight']:.2f} | {perplexity['original']:.2f} → {perplexity['artifact']:.2f} "
            f"({100 * low:+.2f} … {100 * high:+.2f} %) | {found['kl']:.5f} |"
        )
    return "\n".join(lines)


METHODS = """\
**Methods and peers.** All methods on equal calibration tokens, calibration seeds: {seeds}; perplexity and KL by one
evaluator for all tools. Seconds and memory are of the whole command. {times}
"""
BUSY = "Other work went on beside it (load {:.1f} to {:.1f}): the seconds order tools roughly, no more."
IDLE_LOAD = 1.5  # of one command after the other, each on a thread or two


def quantize_tables() -> str:
    """The pictures, which are drawn anew, and the table."""
    results = read("quantize")
    if results is None:
        return "(not measured)"
    paths = quantization_plot.draw(results, RESULTS)
    pictures = [f"![{path.stem}]({path.relative_to(HERE.parent).as_posix()})" for path in paths]
    low, high = results["environment"]["load_before"]
    seeds = len({case["seed"] for case in results["cases"]})
    words = METHODS.format(seeds=seeds, times=BUSY.format(low, high) if high > IDLE_LOAD else "")
    return "\n".join([words.strip(), "", *pictures, "", quantization_table.render(results)])


def fill(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)


def mixed_table() -> str:
    """The curve of mixed precision on the bundled model, by size."""
    results = read("mixed")
    if results is None:
        return "(not measured)"
    lines = ["| | size | bits per weight, whole model | perplexity | KL divergence |", "|---|--:|--:|--:|--:|"]
    entries = results["models"]["demo"]
    for label, run in sorted(entries.items(), key=lambda item: (item[1]["bytes_out"], item[0])):
        lines.append(
            f"| {label} | {run['bytes_out'] / 1e6:.2f} MB | {run['bits_per_weight']:.2f} | "
            f"{run['perplexity']['artifact']:.2f} | {run['kl']:.5f} |"
        )
    return "\n".join(lines)


def rendered(name: str, render: Callable[[dict[str, object]], str]) -> Callable[[], str]:
    """The table that a benchmark makes of its own results."""

    def table() -> str:
        results = read(name)
        return "(not measured)" if results is None else render(results).strip()

    return table


def sparse_lines(results: dict[str, object]) -> str:
    return sparse_linear.table(results, ("2:4", "70 %"))


def kv_quality_tables() -> str:
    """The pictures of eviction, which are drawn anew, and the tables."""
    results = read("kv-long-context")
    if results is None:
        return "(not measured)"
    paths = kv_long_context_plot.draw(results, RESULTS)
    pictures = [f"![{path.stem}](../{path.relative_to(HERE.parent).as_posix()})" for path in paths]
    return "\n".join([kv_long_context_table.render(results), "", *pictures])


def figure_tables() -> str:
    tables = (quality_tables, speed_tables, memory_lines, throughput_tables, simulation_lines, batching_lines)
    return "\n\n".join(part for part in (table() for table in tables) if part)


PLACES = {  # markers -> where they are, and what is between them
    "demo": (README, demo_table),
    "figures": (README, figure_tables),
    "quantize": (README, quantize_tables),
    "recipes": (HERE.parent / "recipes" / "README.md", recipe_table),
    "mixed": (HERE.parent / "docs" / "methods.md", mixed_table),
    "narrow": (HERE.parent / "docs" / "pruning.md", rendered("narrow", narrow.render)),
    "pruning": (HERE.parent / "docs" / "pruning.md", rendered("pruning", pruning.render)),
    "distillation": (HERE.parent / "docs" / "distillation.md", rendered("distillation", distillation.render)),
    "teacher-cache": (HERE.parent / "docs" / "distillation.md", rendered("teacher-cache", teacher_cache.render)),
    "loss-memory": (HERE.parent / "docs" / "distillation.md", rendered("loss-memory", loss_memory.render)),
    "compiled-training": (
        HERE.parent / "docs" / "distillation.md",
        rendered("compiled-training", compiled_training.render),
    ),
    "preference": (HERE.parent / "docs" / "distillation.md", rendered("preference", preference.render)),
    "recovery": (HERE.parent / "docs" / "distillation.md", rendered("recovery", recovery.render)),
    "kv-eviction": (HERE.parent / "docs" / "kv-eviction.md", rendered("kv-eviction", kv_eviction.render)),
    "kv-speed": (HERE.parent / "docs" / "kv-cache.md", rendered("kv-speed", kv_speed.render)),
    "kv-long-context": (HERE.parent / "docs" / "kv-eviction.md", kv_quality_tables),
    "sparse-linear": (HERE.parent / "docs" / "runtime.md", rendered("sparse-linear", sparse_lines)),
}


def keep_demo(report: Path) -> None:
    run = json.loads((report / "run.json").read_text())
    kept = {field: run[field] for field in DEMO_FIELDS if field in run}
    kept["artifact"] = {key: value for key, value in kept["artifact"].items() if key != "path"}
    markdown = (report / "report.md").read_text()
    table = re.search(r"(^\|.*?\n)(?=\n)", markdown, re.DOTALL | re.MULTILINE)
    kept["markdown"] = table[1].strip() if table else ""
    (RESULTS / "demo.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="report folder of a demo run to keep")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.demo:
        keep_demo(arguments.demo)
    texts: dict[Path, str] = {}
    for name, (path, content) in PLACES.items():
        texts[path] = fill(texts.get(path) or path.read_text(), name, content())
    if arguments.check:
        return int(any(path.read_text() != text for path, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
