"""What the peers' runners share: one command line, one list of jobs, one record per job.

A runner is started by the peer's own interpreter:

    PEERS/llmcompressor/bin/python benchmarks/run_llmcompressor.py --model DIR --tokens FILE --bits 4 --group-size 64 \\
        --output DIR --json FILE
    PEERS/llmcompressor/bin/python benchmarks/run_llmcompressor.py --jobs JOBS.json

JOBS.json is a list of jobs with the fields of `Job`; they are done one after another in one process, which saves the
seconds that the imports take. Speed is measured with single jobs only.
"""

import argparse
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

METHODS = ("gptq", "rtn", "awq", "autoround", "hqq", "smoothquant", "magnitude", "wanda", "sparsegpt", "alps")
METHODS += ("osscar", "activation", "fluctuation")
SCHEMES = ("weights", "w8a8", "fp8", "pruned")


@dataclass(frozen=True)
class Job:
    model: str
    tokens: str  # .safetensors with input_ids [samples, length]
    output: str  # the artifact's folder
    json: str  # the record's file
    bits: int = 4
    group_size: int = 64  # -1: one group per output channel
    method: str = "gptq"  # one of METHODS; a tool refuses what it has not
    variant: str = "default"  # a named set of the peer's settings
    dtype: str = "float32"  # the peer computes in it; auto: the dtype of the weights on disk
    batch_size: int = 1  # samples in a forward pass; both peers' default is 1
    offload: bool = True  # GPTQModel alone: finished modules go to disk, its default
    scheme: str = "weights"  # one of SCHEMES: codes for weights, 8 bits for weights and inputs, or weights set to zero
    sparsity: float = 0.0  # share of the weights that become zero
    steps: int = 200  # of AutoRound in each block; its default and ours
    pattern: str = "unstructured"  # where zeros may lie, or N:M, or the structures that go


def process_age_s() -> float:
    """Seconds since this process was started, interpreter start included."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def rss_anon_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this measurement needs Linux 4.5 or newer")


def parse_jobs(variants: tuple[str, ...]) -> list[Job]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, help="a JSON list of jobs, instead of the options below")
    parser.add_argument("--model")
    parser.add_argument("--tokens")
    parser.add_argument("--output")
    parser.add_argument("--json")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--variant", choices=variants, default="default")
    parser.add_argument("--dtype", choices=("float32", "auto"), default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--scheme", choices=SCHEMES, default="weights")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--no-offload", dest="offload", action="store_false")
    options = vars(parser.parse_args())
    listed = options.pop("jobs")
    if listed is not None:
        return [Job(**job) for job in json.loads(listed.read_text())]
    missing = [f"--{name}" for name in ("model", "tokens", "output", "json") if options[name] is None]
    if missing:
        parser.error(f"give {', '.join(missing)} (or --jobs)")
    return [Job(**{field.name: options[field.name] for field in fields(Job)})]


def run_jobs(
    jobs: list[Job], quantize: Callable[[Job], None], imported: dict[str, float], versions: dict[str, str]
) -> None:
    """Do every job; a job that fails is recorded with its reason and the next one is done."""
    for job in jobs:
        shutil.rmtree(job.output, ignore_errors=True)
        started = time.perf_counter()
        record: dict[str, object] = {"job": asdict(job), "versions": versions, **imported}
        try:
            quantize(job)
        except Exception as failure:  # noqa: BLE001  (a peer may raise anything; the reason is the result of this case)
            traceback.print_exc()
            record["failure"] = f"{type(failure).__name__}: {failure}"[:600]
        record["seconds_after_imports"] = time.perf_counter() - started
        record["seconds_of_process"] = process_age_s()
        Path(job.json).parent.mkdir(parents=True, exist_ok=True)
        Path(job.json).write_text(json.dumps(record, indent=2) + "\n")
