"""Perplexity after quantization, ours and the peers', on the same token ids.

    python benchmarks/quality.py --peers DIR --data DIR [--models ...] [--tools ...] [--bits ...] [--groups ...]
    python benchmarks/quality.py --table            # print the table of what results/quality.json holds

Every case (model, tool, variant, bits, group size, seed) is kept in the work folder as soon as it is scored, so that a
stopped benchmark goes on where it was; results/quality.json is written from all cases that are there.
DIR of --data holds models/NAME and text/tinystories-{a,b}.txt.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import quality_table
import tools
from make_tokens import calibration_ids, evaluation_ids
from runner import Job
from safetensors.numpy import save_file

MODELS = ("tinystories-656k", "stories-7m", "demo")
VARIANTS = {"compress": ("default",), "llmcompressor": ("default", "mse", "imatrix"), "gptqmodel": ("default", "mse")}
SAMPLES, LENGTH = 128, 250
EVALUATION_STORIES, EVALUATION_LENGTH = 200, 512
CASES_PER_PROCESS = 10


@dataclass(frozen=True)
class Case:
    model: str
    tool: str
    variant: str
    method: str
    bits: int
    group_size: int
    seed: int
    scheme: str = "weights"  # see runner.Job
    sparsity: float = 0.0
    pattern: str = "unstructured"

    @property
    def name(self) -> str:
        if self.scheme == "pruned":
            zeros = self.pattern.replace(":", "of") if self.sparsity == 0 else f"{100 * self.sparsity:g}"
            zeros += "" if self.sparsity == 0 or self.pattern == "unstructured" else f"-{self.pattern}"
            variant = "" if self.variant == "default" else f"-{self.variant}"
            return f"{self.tool}-{self.method}{variant}-{zeros}-s{self.seed}"
        if self.scheme != "weights":
            return f"{self.tool}-{self.variant}-{self.method}-{self.scheme}-s{self.seed}"
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.tool}-{self.variant}-{self.method}-w{self.bits}-{group}-s{self.seed}"


@dataclass(frozen=True)
class Workplace:
    """Where inputs, artifacts and results of the cases are."""

    root: Path
    data: Path
    threads: int

    def model(self, name: str) -> Path:
        return tools.REPOSITORY / "compress" / "demo" / "model" if name == "demo" else self.data / "models" / name

    def calibration(self, model: str, seed: int) -> Path:
        path = self.root / model / f"calibration-{seed}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = self.data / "text" / "tinystories-a.txt"
            save_file({"input_ids": calibration_ids(self.model(model), text, seed, SAMPLES, LENGTH)}, path)
        return path

    def evaluation(self, model: str) -> Path:
        path = self.root / model / "evaluation.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = self.data / "text" / "tinystories-b.txt"
            ids = evaluation_ids(self.model(model), text, EVALUATION_STORIES, EVALUATION_LENGTH)
            save_file({"input_ids": ids}, path)
        return path

    def record(self, case: Case) -> Path:
        return self.root / case.model / "cases" / f"{case.name}.json"

    def job(self, case: Case) -> Job:
        return Job(
            model=str(self.model(case.model)),
            tokens=str(self.calibration(case.model, case.seed)),
            output=str(self.root / case.model / "artifacts" / case.name),
            json=str(self.root / case.model / "jobs" / f"{case.name}.json"),
            bits=case.bits,
            group_size=case.group_size,
            method=case.method,
            variant=case.variant,
            batch_size=16,
            offload=False,
            scheme=case.scheme,
            sparsity=case.sparsity,
            pattern=case.pattern,
        )


def wanted_cases(asked: argparse.Namespace) -> Iterator[Case]:
    """In the order of their worth: few bits first, where methods differ, one seed of everything before the next."""
    for model, seed, bits in product(asked.models, asked.seeds, sorted(asked.bits)):
        for tool, group_size in product(asked.tools, asked.groups):
            for variant in VARIANTS[tool]:
                if tool == tools.OURS or not asked.variants or variant in asked.variants:
                    yield Case(model, tool, variant, "gptq", bits, group_size, seed)
            if tool != "gptqmodel" and seed == 0:  # no calibration, no seeds
                yield Case(model, tool, "default", "rtn", bits, group_size, seed)


def quantize(cases: list[Case], place: Workplace, peers: tools.Peers) -> dict[Case, str]:
    """Quantize cases of one tool; the reasons of those that failed."""
    tool = cases[0].tool
    environment = tools.quiet_environment(place.threads)
    log = place.root / f"{tool}.log"
    with log.open("ab") as stream:
        jobs = [place.job(case) for case in cases]
        if tool == tools.OURS:
            quantize_ours(jobs, environment, stream)
            return {case: "no artifact" for case in cases if not Path(place.job(case).output).exists()}
        listed = place.root / f"{tool}-jobs.json"
        listed.write_text(json.dumps([asdict(job) for job in jobs]))
        command = tools.peer_command(peers, tool, "--jobs", str(listed))
        subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False)
    failures = {}
    for case, job in zip(cases, jobs, strict=True):
        record = json.loads(Path(job.json).read_text()) if Path(job.json).exists() else {"failure": "the process died"}
        if "failure" in record:
            failures[case] = record["failure"]
    return failures


def quantize_ours(jobs: list[Job], environment: dict[str, str], log: object) -> None:
    words = []
    for job in jobs:
        recipe = tools.write_recipe(job, SAMPLES, LENGTH, Path(job.json).with_suffix(".yaml"))
        shutil.rmtree(job.output, ignore_errors=True)
        shutil.rmtree(f"{job.output}.report", ignore_errors=True)
        words += [str(recipe), job.output]
    command = [sys.executable, str(tools.HERE / "run_compress.py"), *words]
    subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)


def score(case: Case, place: Workplace, failure: str | None, keep: bool) -> None:
    from perplexity import perplexity

    job = place.job(case)
    record: dict[str, object] = asdict(case)
    if failure is None:
        record["perplexity"] = perplexity(Path(job.output), place.evaluation(case.model))
    else:
        record["failure"] = failure
    if not keep:
        shutil.rmtree(job.output, ignore_errors=True)
        shutil.rmtree(f"{job.output}.report", ignore_errors=True)
    path = place.record(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def score_original(model: str, place: Workplace) -> None:
    from perplexity import perplexity

    path = place.root / model / "original.json"
    if not path.exists():
        figure = perplexity(place.model(model), place.evaluation(model))
        path.write_text(json.dumps({"model": model, "perplexity": figure}) + "\n")


def run(asked: argparse.Namespace) -> None:
    place = Workplace(asked.work.resolve(), asked.data.resolve(), asked.threads)
    peers = tools.Peers(asked.peers.resolve())
    peers.require(asked.tools)
    place.root.mkdir(parents=True, exist_ok=True)
    for model in asked.models:
        score_original(model, place)
    pending = [case for case in wanted_cases(asked) if not place.record(case).exists()]
    done = 0
    for chunk in chunks(pending):
        failures = quantize(chunk, place, peers)
        for case in chunk:
            score(case, place, failures.get(case), asked.keep)
        done += len(chunk)
        print(f"{done} of {len(pending)} cases: {chunk[-1].model} {chunk[-1].name}", flush=True)
        quality_table.write_results(place.root, asked.out)
    quality_table.write_results(place.root, asked.out)


def chunks(cases: list[Case]) -> Iterator[list[Case]]:
    """Cases of one tool, model and seed that one process does; the order of the first of each chunk is kept."""
    groups: dict[tuple[str, str, int, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.model, case.tool, case.seed, case.bits), []).append(case)
    for group in groups.values():
        for start in range(0, len(group), CASES_PER_PROCESS):
            yield group[start : start + CASES_PER_PROCESS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the folder that benchmarks/peers.sh filled")
    parser.add_argument("--data", type=Path, help="the folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tools", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--variants", nargs="+", help="only these settings of the peers")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--groups", nargs="+", type=int, default=[32, 64, 128, -1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=tools.REPOSITORY / ".bench" / "quality")
    parser.add_argument("--out", type=Path, default=tools.HERE / "results" / "quality.json")
    parser.add_argument("--keep", action="store_true", help="keep the artifacts")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.peers is None or asked.data is None:
            parser.error("--peers and --data are needed (benchmarks/README.md says how to make them)")
        run(asked)
    print(quality_table.render(json.loads(asked.out.read_text())))


if __name__ == "__main__":
    main()
