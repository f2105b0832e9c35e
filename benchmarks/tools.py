"""The compared tools: how each is started, what has to be installed for it, and where a measurement is taken."""

import json
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from runner import Job

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
OURS = "compress"
STRUCTURES = {
    "channels": {"method": "channels"},
    "groups": {"method": "heads", "unit": "groups"},
    "queries": {"method": "heads", "unit": "queries"},
}
PEERS = ("llmcompressor", "gptqmodel", "autoround", "torchpruning")

RECIPE = """\
model: {model}
calibration: {{dataset: {tokens}, samples: {samples}, length: {length}}}
stages:
  - {kind}: {stage}
export: {{format: compressed-tensors}}
"""


class MissingPeer(SystemExit):
    """A peer's environment is not there: a figure without its rival is not a figure."""

    def __init__(self, peer: str, folder: Path) -> None:
        super().__init__(
            f"benchmarks: {peer} is not installed in {folder}; run `benchmarks/peers.sh {folder.parent} {peer}` first"
        )


@dataclass(frozen=True)
class Peers:
    """The folder that peers.sh filled."""

    root: Path

    def python(self, peer: str) -> Path:
        folder = self.root / peer
        if not (folder / ".ready").is_file():
            raise MissingPeer(peer, folder)
        return folder / "bin" / "python"

    def require(self, names: Iterable[str]) -> None:
        """MissingPeer unless all tools of `names` that are not ours are installed."""
        for name in set(names) - {OURS}:
            self.python(name)


def peer_command(peers: Peers, peer: str, *options: str) -> list[str]:
    return [str(peers.python(peer)), str(HERE / f"run_{peer}.py"), *options]


def job_options(job: Job) -> list[str]:
    """The runner's command line for one job."""
    options = []
    for name, value in asdict(job).items():
        if name == "offload":
            options += [] if value else ["--no-offload"]
        else:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def write_recipe(job: Job, samples: int, length: int, path: Path) -> Path:
    kind = "prune" if job.scheme == "pruned" else "quantize"
    model, tokens, stage = (json.dumps(value) for value in (job.model, job.tokens, our_stage(job)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(model=model, tokens=tokens, samples=samples, length=length, kind=kind, stage=stage))
    return path


def our_stage(job: Job) -> dict[str, object]:
    """The settings of the one stage; what a job does not name has our default."""
    if job.pattern in STRUCTURES:
        return STRUCTURES[job.pattern] | {"importance": job.method, "ratio": job.sparsity}
    if job.scheme == "pruned":
        sparsity = {"sparsity": job.sparsity} if job.pattern == "unstructured" else {}
        allocation = {} if job.variant == "default" else {"allocation": job.variant}
        return {"method": job.method, "pattern": job.pattern} | sparsity | allocation
    if job.scheme == "fp8":
        return {"method": "fp8"}
    if job.method == "smoothquant":
        return {"method": "gptq", "scheme": job.scheme, "prepare": [{"smoothquant": {}}]}
    if job.scheme == "w8a8":
        return {"method": job.method, "scheme": "w8a8"}
    more = {"symmetric": False} if job.variant == "asymmetric" else {}
    more |= {"steps": job.steps} if job.method == "autoround" else {}
    return {"method": job.method, "scheme": f"w{job.bits}a16", "group_size": job.group_size} | more


def our_command(job: Job, recipe: Path) -> list[str]:
    """The command that a user would give; `--fresh`, since a benchmark never goes on from an earlier run."""
    given = {"--recipe": str(recipe), "--output": job.output}
    return [
        sys.executable,
        "-m",
        "compress",
        "run",
        *(word for pair in given.items() for word in pair),
        "--fresh",
        "--quiet",
    ]


def quiet_environment(threads: int) -> dict[str, str]:
    """This process's environment, offline, with a fixed number of threads, and compiled modules kept as Python does."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def describe_machine() -> dict[str, object]:
    import numpy
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
