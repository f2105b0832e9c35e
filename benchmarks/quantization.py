"""Every method of ours beside the peers', on equal tokens: perplexity, KL to the original, seconds, memory, bytes.

    python benchmarks/quantization.py --peers DIR --data DIR [--models ...] [--schemes ...] [--tools ...] [--seeds 0]
    python benchmarks/quantization.py --table       # print the table of what results/quantize.json holds

Models, calibration and evaluation are those of quality.py. Each case is one command in a process of its own, measured
from outside (see measurement.py), and kept in the work folder as soon as it is scored: a stopped benchmark goes on
where it was. Perplexity and KL are one evaluator's for the artifacts of all tools (perplexity.py). A peer is run in the
setting that is its best in quality.py's table. (This is not called quantize.py: the package of that name is imported.)
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import quantization_table
import tools
from measurement import Measurement, measure
from quality import LENGTH, MODELS, SAMPLES, Case, Workplace
from runner import Job
from speed import imports_of

SCHEMES = {
    "w4-g128": ("weights", 4, 128),
    "w4-g32": ("weights", 4, 32),
    "w3-g64": ("weights", 3, 64),
    "w2-g32": ("weights", 2, 32),
    "w8a8": ("w8a8", 8, -1),
    "fp8": ("fp8", 8, -1),
}
WEIGHTS, WITH_INPUTS, FLOATS = "weights", "w8a8", "fp8"
METHODS = {  # (tool, kind of scheme) -> (method, setting of the tool)
    (tools.OURS, WEIGHTS): tuple((name, "default") for name in ("rtn", "gptq", "awq", "autoround", "hqq")),
    (tools.OURS, WITH_INPUTS): (("gptq", "default"), ("smoothquant", "default")),
    (tools.OURS, FLOATS): (("rtn", "default"),),
    ("llmcompressor", WEIGHTS): (("gptq", "imatrix"), ("awq", "default")),
    ("llmcompressor", WITH_INPUTS): (("gptq", "imatrix"), ("smoothquant", "imatrix")),
    ("llmcompressor", FLOATS): (("rtn", "default"),),
    ("gptqmodel", WEIGHTS): (("gptq", "mse"),),
    ("autoround", WEIGHTS): (("autoround", "default"),),
}
TOOLS = tuple(dict.fromkeys(tool for tool, _ in METHODS))
UNCALIBRATED = ("rtn", "hqq")  # one seed is enough


def wanted_cases(asked: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """With the names of their schemes; one seed of everything before the next."""
    for seed, tool, model, scheme in product(asked.seeds, asked.tools, asked.models, asked.schemes):
        kind, bits, group_size = SCHEMES[scheme]
        for method, variant in METHODS.get((tool, kind), ()):
            if seed == asked.seeds[0] or method not in UNCALIBRATED:
                yield scheme, Case(model, tool, variant, method, bits, group_size, seed, kind)


def run_case(scheme: str, case: Case, place: Workplace, peers: tools.Peers) -> dict[str, object]:
    from perplexity import score

    job, environment = place.job(case), tools.quiet_environment(place.threads)
    remove(job)
    log_file = place.root / f"{case.tool}-{case.model}.log"
    with log_file.open("ab") as log:
        measured = measure(command_of(case, job, peers), environment, log)
    record: dict[str, object] = asdict(case) | {"scheme": scheme, "load_before": measured.load_before}
    failure = failure_of(case, job, measured)
    if failure:
        return record | {"failure": failure}
    found = score(Path(job.output), place.model(case.model), place.evaluation(case.model))
    return record | asdict(found) | figures(case, job, measured, place, peers)


def command_of(case: Case, job: Job, peers: tools.Peers) -> list[str]:
    if case.tool != tools.OURS:
        return tools.peer_command(peers, case.tool, *tools.job_options(job))
    return tools.our_command(job, tools.write_recipe(job, SAMPLES, LENGTH, Path(job.json).with_suffix(".yaml")))


def failure_of(case: Case, job: Job, measured: Measurement) -> str | None:
    if case.tool != tools.OURS and Path(job.json).exists():
        return json.loads(Path(job.json).read_text()).get("failure")
    return f"exit {measured.exit_code}" if measured.exit_code or case.tool != tools.OURS else None


def figures(case: Case, job: Job, measured: Measurement, place: Workplace, peers: tools.Peers) -> dict[str, object]:
    """Of the whole command, and above what the imports alone take."""
    imports = imports_once(case.tool, place, peers)
    inside = {} if case.tool == tools.OURS else json.loads(Path(job.json).read_text())
    import_seconds = imports.get("import_seconds", inside.get("seconds_of_imports"))
    return {
        "seconds": measured.seconds,
        "seconds_after_imports": measured.seconds - import_seconds,
        "cpu_seconds": measured.cpu_seconds,
        "peak_rss_anon_bytes": measured.peak_rss_anon_bytes,
        "bytes_above_bare_imports": measured.peak_rss_anon_bytes - imports["bare_import_bytes"],
        "bytes": quantization_table.weight_bytes(Path(job.output)),
    }


def imports_once(tool: str, place: Workplace, peers: tools.Peers) -> dict[str, float]:
    path = place.root / f"imports-{tool}.json"
    if not path.exists():
        python = sys.executable if tool == tools.OURS else peers.python(tool)
        path.write_text(json.dumps(imports_of(tool, python, tools.quiet_environment(place.threads))))
    return json.loads(path.read_text())


def remove(job: Job) -> None:
    for leftover in (job.output, f"{job.output}.report", f"{job.output}.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    Path(job.json).unlink(missing_ok=True)


def run(asked: argparse.Namespace) -> None:
    place = Workplace(asked.work.resolve(), asked.data.resolve(), asked.threads)
    peers = tools.Peers(asked.peers.resolve())
    peers.require(asked.tools)
    place.root.mkdir(parents=True, exist_ok=True)
    for model in asked.models:
        quantization_table.score_original(model, place)
    for scheme, case in wanted_cases(asked):
        path = place.record(case)
        if path.exists():
            continue
        record = run_case(scheme, case, place, peers)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        if not asked.keep:
            remove(place.job(case))
        print(f"{case.model} {case.name}: {record.get('failure') or record['perplexity']}", flush=True)
        quantization_table.write_results(place.root, asked.out)
    quantization_table.write_results(place.root, asked.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks/peers.sh filled")
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["tinystories-656k", "demo"], choices=MODELS)
    parser.add_argument("--schemes", nargs="+", default=[*SCHEMES], choices=[*SCHEMES])
    parser.add_argument("--tools", nargs="+", default=[*TOOLS], choices=TOOLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "quantize")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "quantize.json")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.peers is None or asked.data is None:
            parser.error("--peers and --data are needed (benchmarks/README.md says how to make them)")
        run(asked)
    print(quantization_table.render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
