"""Time and memory of a method on random-weight models, ours and the peers' in turn on the same machine.

    python benchmarks/speed.py --peers DIR [--method gptq] [--shapes 135m 1b] [--runs 3] [--threads 2]
    python benchmarks/speed.py --table              # print the table of what results/speed.json holds

Everyone gets the same 32 x 512 token ids and as many threads. A contestant is a tool and the dtype it computes in: on a
CPU without bf16 instructions fp32 is much faster and bf16 leaner, so the rival is the best of both for each figure.
Measured from outside: wall time of the whole command, peak RssAnon every 20 ms. Of them: what the imports alone take
(wall time, in the same environment), and what a bare `import torch, transformers` holds.
The figures mean something only on an otherwise idle machine; the load before each run is written beside them.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tools
from make_models import SHAPES, make_model
from make_tokens import random_ids
from measurement import after_imports, measure
from runner import Job
from safetensors.numpy import save_file

CONTESTANTS = (
    "compress/auto",
    "llmcompressor/float32",
    "gptqmodel/float32",
    "autoround/float32",
    "llmcompressor/auto",
    "gptqmodel/auto",
    "autoround/auto",
)
METHODS = {  # what is written, and who has the method
    "gptq": ("weights", 4, 64, CONTESTANTS[:3]),
    "awq": ("weights", 4, 64, CONTESTANTS[:2]),
    "smoothquant": ("w8a8", 8, -1, CONTESTANTS[:2]),
    "autoround": ("weights", 4, 64, ("compress/auto", "autoround/float32", "autoround/auto")),
}
BARE = "import torch, transformers"
OUR_IMPORTS = "import torch, transformers, compress.cli, compress.pipeline; from transformers import LlamaForCausalLM"
SAMPLES, LENGTH = 32, 512


@dataclass(frozen=True)
class Inputs:
    method: str
    shape: str
    model: Path
    tokens: Path


def prepare(method: str, shape: str, work: Path) -> Inputs:
    inputs = Inputs(method, shape, work / "models" / shape, work / f"tokens-{shape}.safetensors")
    if not (inputs.model / "tokenizer_config.json").exists():  # written last
        make_model(SHAPES[shape], inputs.model, seed=0)
    if not inputs.tokens.exists():
        ids = random_ids(SHAPES[shape].vocabulary, 0, SAMPLES, LENGTH)
        save_file({"input_ids": ids}, inputs.tokens)
    return inputs


def imports_of(tool: str, python: Path | str, environment: dict[str, str]) -> dict[str, float]:
    """The bare imports' memory in this tool's environment, and (ours) the seconds that all imports take."""
    figures = {"bare_import_bytes": after_imports(python, BARE, "rss_anon_bytes", environment)}
    if tool == tools.OURS:
        seconds = [after_imports(python, OUR_IMPORTS, "process_age_s", environment) for _ in range(3)]
        figures["import_seconds"] = median(seconds)
    return figures


def run_once(contestant: str, inputs: Inputs, work: Path, asked: argparse.Namespace) -> dict[str, object]:
    tool, dtype = contestant.split("/")
    peers = tools.Peers(asked.peers.resolve())
    environment = tools.quiet_environment(asked.threads)
    name = f"{inputs.method}-{contestant.replace('/', '-')}"
    output = work / "artifacts" / f"{inputs.shape}-{name}"
    record = work / f"{inputs.shape}-{name}.json"
    scheme, bits, group_size, _ = METHODS[inputs.method]
    what = {
        "method": inputs.method,
        "scheme": scheme,
        "bits": bits,
        "group_size": group_size,
        "dtype": dtype,
        "steps": asked.steps,
    }
    job = Job(str(inputs.model), str(inputs.tokens), str(output), str(record), **what)
    for leftover in (output, Path(f"{output}.report"), Path(f"{output}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    if tool == tools.OURS:
        python: Path | str = sys.executable
        recipe = tools.write_recipe(job, SAMPLES, LENGTH, record.with_suffix(".yaml"))
        command = tools.our_command(job, recipe)
    else:
        python = peers.python(tool)
        command = tools.peer_command(peers, tool, *tools.job_options(job))
    figures = imports_of(tool, python, environment)
    with (work / f"{name}.log").open("ab") as log:
        measured = measure(command, environment, log)
    inside = {} if tool == tools.OURS else json.loads(record.read_text())
    failure = inside.get("failure") or (f"exit {measured.exit_code}" if measured.exit_code else None)
    if failure:
        raise SystemExit(f"speed: {contestant} on {inputs.shape} failed: {failure}; see {work / name}.log")
    imports = figures.get("import_seconds", inside.get("seconds_of_imports"))
    return {
        "contestant": contestant,
        "shape": inputs.shape,
        "seconds": measured.seconds,
        "seconds_after_imports": measured.seconds - imports,
        "cpu_seconds": measured.cpu_seconds,
        "peak_rss_anon_bytes": measured.peak_rss_anon_bytes,
        "bytes_above_bare_imports": measured.peak_rss_anon_bytes - figures["bare_import_bytes"],
        "artifact_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
        "load_before": measured.load_before,
        "versions": inside.get("versions", {}),
    }


FIGURES = ("seconds", "seconds_after_imports", "bytes_above_bare_imports")


def summarize(runs: list[dict[str, object]]) -> dict[str, object]:
    """Medians per shape and contestant, and ours as a ratio of the best peer in each figure."""
    summary: dict[str, object] = {}
    for shape in dict.fromkeys(run["shape"] for run in runs):
        names = dict.fromkeys(run["contestant"] for run in runs if run["shape"] == shape)
        medians = {
            name: {
                figure: median(r[figure] for r in runs if (r["shape"], r["contestant"]) == (shape, name))
                for figure in FIGURES
            }
            for name in names
        }
        ours = next((m for name, m in medians.items() if name.startswith(tools.OURS)), None)
        rivals = {name: m for name, m in medians.items() if not name.startswith(tools.OURS)}
        ratios = {}
        for figure in FIGURES if ours and rivals else ():
            best = min(rivals, key=lambda name: rivals[name][figure])
            ratios[figure] = {"best_peer": best, "ratio": ours[figure] / rivals[best][figure]}
        summary[shape] = {"medians": medians, "ratios": ratios}
    return summary


def render(results: dict[str, object]) -> str:
    lines = []
    method = results["method"]
    scheme, bits, group_size, _ = METHODS[method]
    what = f"W{bits} g{group_size}" if scheme == "weights" else scheme.upper()
    what += f" with {results['steps']} steps" if results.get("steps", 200) != 200 else ""
    count = results["environment"]["threads"]
    threads = f"{count} thread{'s' * (count > 1)}"
    for shape, summary in results["summary"].items():
        contestants = [run["contestant"] for run in results["runs"] if run["shape"] == shape]
        count = " / ".join(str(contestants.count(name)) for name in summary["medians"])
        lines += [
            "",
            f"### {shape}, {method} {what}, {SAMPLES} x {LENGTH} tokens, {threads}, median of {count} runs",
            "",
        ]
        lines += [
            "| tool / dtype | whole command s | after imports s | peak memory above bare imports MB |",
            "|---|---|---|---|",
        ]
        for name, figures in summary["medians"].items():
            whole, after, above = (figures[figure] for figure in FIGURES)
            lines.append(f"| {name} | {whole:.1f} | {after:.1f} | {above / 1e6:.0f} |")
        if summary["ratios"]:
            cells = [f"{r['ratio']:.2f} of {r['best_peer']}" for r in (summary["ratios"][f] for f in FIGURES)]
            lines.append(f"| **ours : best peer** | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(asked: argparse.Namespace) -> None:
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    peers = tools.Peers(asked.peers.resolve())
    contestants = asked.contestants or METHODS[asked.method][3]
    peers.require(name.split("/")[0] for name in contestants)
    runs: list[dict[str, object]] = json.loads(asked.out.read_text())["runs"] if asked.add else []
    for shape in asked.shapes:
        inputs = prepare(asked.method, shape, work)
        for number in range(asked.runs):
            for contestant in contestants:  # in turn, so that a slow minute hits all
                runs.append(run_once(contestant, inputs, work, asked) | {"run": number})
                print(json.dumps(runs[-1]), flush=True)
                results = {
                    "environment": tools.describe_machine() | {"threads": asked.threads},
                    "protocol": " ".join(__doc__.split("\n\n")[2].split()),
                    "method": asked.method,
                    "steps": asked.steps,
                    "summary": summarize(runs),
                    "runs": runs,
                }
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                asked.out.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks/peers.sh filled")
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--shapes", nargs="+", default=["135m"], choices=SHAPES)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="those that have the method")
    parser.add_argument("--steps", type=int, default=200, help="of autoround in each block")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "speed")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "speed.json")
    parser.add_argument("--add", action="store_true", help="to the runs that the results hold, on the same machine")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.peers is None:
            parser.error("--peers is needed (benchmarks/README.md says how to make it)")
        run(asked)
    print(render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
