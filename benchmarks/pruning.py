"""Perplexity after single weights became zero, or structures went, ours and the peers', on the same token ids.

    python benchmarks/pruning.py --peers DIR --data DIR [--models ...] [--seeds 0 1 2 3 4]
    python benchmarks/pruning.py --table            # print the table of what results/pruning.json holds

Models, calibration and evaluation are those of quality.py; linear layers of the blocks, embedding and head untouched.
Every case is kept in the work folder as soon as it is scored: a stopped benchmark goes on where it was.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean

import tools
from quality import MODELS, Case, Workplace, chunks, quantize, score, score_original

PATTERNS = {"50 %": (0.5, "unstructured"), "60 %": (0.6, "unstructured"), "70 %": (0.7, "unstructured")}
PATTERNS |= {pattern: (0.0, pattern) for pattern in ("2:4", "4:8")}
METHODS = {tools.OURS: ("magnitude", "wanda", "sparsegpt", "alps"), "llmcompressor": ("wanda", "sparsegpt")}
WIDTHS = {f"{share} % of the {what}": (share / 100, pattern) for share, what, pattern in (
    (25, "channels", "channels"), (50, "channels", "channels"),
    (25, "key-value heads", "groups"), (50, "key-value heads", "groups"), (50, "query heads", "queries"),
)}  # fmt: skip
IMPORTANCES = {tools.OURS: ("magnitude", "activation", "fluctuation", "osscar"), "torchpruning": ("magnitude",)}
ALLOCATIONS = ("owl", "sensitivity")
ALLOCATED = {tools.OURS: tuple(f"{method} {way}" for method in ("wanda", "sparsegpt") for way in ALLOCATIONS)}
TABLES = {
    "zeros": (PATTERNS, METHODS),
    "zeros, as many as each block stands": ({label: PATTERNS[label] for label in ("60 %", "70 %")}, ALLOCATED),
    "what goes": (WIDTHS, IMPORTANCES),
}
TOOLS = tuple(dict.fromkeys((*METHODS, *IMPORTANCES)))


def wanted_cases(asked: argparse.Namespace) -> Iterator[Case]:
    """One seed of everything before the next."""
    for seed, model, tool in product(asked.seeds, asked.models, asked.tools):
        for cases, methods in TABLES.values():
            for method, (sparsity, pattern) in product(methods.get(tool, ()), cases.values()):
                if tool == "torchpruning" and pattern != "channels":
                    continue  # its heads of grouped queries did not come to an end
                if method != "magnitude" or seed == asked.seeds[0]:  # it needs no text
                    name, _, variant = method.partition(" ")
                    yield Case(model, tool, variant or "default", name, 16, -1, seed, "pruned", sparsity, pattern)


def run(asked: argparse.Namespace) -> None:
    place = Workplace(asked.work.resolve(), asked.data.resolve(), asked.threads)
    peers = tools.Peers(asked.peers.resolve())
    peers.require(asked.tools)
    place.root.mkdir(parents=True, exist_ok=True)
    pending = [case for case in wanted_cases(asked) if not place.record(case).exists()]
    for model in asked.models:
        place.evaluation(model)
        score_original(model, place)
    for chunk in chunks(pending):
        failures = quantize(chunk, place, peers)
        for case in chunk:
            score(case, place, failures.get(case), keep=False)
        print(f"{chunk[-1].model} {chunk[-1].name} and {len(chunk) - 1} before it", flush=True)
        write_results(place.root, asked.out)


def write_results(work: Path, out: Path) -> None:
    cases = [json.loads(path.read_text()) for path in sorted(work.glob("*/cases/*.json"))]
    originals = {path.parent.name: json.loads(path.read_text())["perplexity"] for path in work.glob("*/original.json")}
    pins = [word for tool in TOOLS[1:] for word in (tools.HERE / "peers" / f"{tool}.txt").read_text().split()]
    results = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": tools.describe_machine(),
        "peers": [word for word in pins if "==" in word],
        "original": originals,
        "cases": cases,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def render(results: dict[str, object]) -> str:
    """Tables per model: means over seeds, (n) where there are not five; the lowest of a row is bold."""
    return "\n\n".join("\n".join(_of_model(results, model)) for model in results["original"])


def _of_model(results: dict[str, object], model: str) -> Iterator[str]:
    yield f"**{model}** (perplexity {results['original'][model]:.3f})"
    for title, (rows, methods) in TABLES.items():
        columns = [(tool, method) for tool, found in methods.items() for method in found]
        yield from ("", f"| {title} | " + " | ".join(f"{method}, {tool}" for tool, method in columns) + " |")
        yield "|---|" + "--:|" * len(columns)
        for label, (sparsity, pattern) in rows.items():
            wanted = (model, sparsity, pattern)
            found = [case for case in results["cases"] if (case["model"], case["sparsity"], case["pattern"]) == wanted]
            means = [seeds_of(found, tool, method) for tool, method in columns]
            best = min((mean(figures) for figures in means if figures), default=None)
            cells = [cell(figures, method, best) for figures, (_, method) in zip(means, columns, strict=True)]
            yield f"| {label} | {' | '.join(cells)} |"


def seeds_of(cases: list[dict[str, object]], tool: str, method: str) -> list[float]:
    return [
        case["perplexity"] for case in cases if (case["tool"], _named(case)) == (tool, method) and "failure" not in case
    ]


def _named(case: dict[str, object]) -> str:
    return case["method"] if case["variant"] == "default" else f"{case['method']} {case['variant']}"


def cell(figures: list[float], method: str, best: float | None) -> str:
    if not figures:
        return "–"
    text = f"{mean(figures):.2f}"
    text = f"**{text}**" if mean(figures) == best else text
    return text if len(figures) == 5 or method == "magnitude" else f"{text} ({len(figures)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks/peers.sh filled")
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tools", nargs="+", default=[*TOOLS], choices=[*TOOLS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "pruning")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "pruning.json")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.peers is None or asked.data is None:
            parser.error("--peers and --data are needed (benchmarks/README.md says how to make them)")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
