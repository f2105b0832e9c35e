"""Linear layers with zeros among their weights beside dense ones, on a CPU: what is left of the time, by rows of input.

Dense is what the runtime takes for the same bf16 weight: torch's product for bf16 inputs, and the compiled kernel for
fp32 inputs, where a CPU is slow at bf16. `bitmap` is the runtime's own layer for zeros with the same inputs, and `csr`
torch.sparse (MKL, fp32, 32-bit indices). Layers of one shape take turns, and the median of all turns counts. Each
forward takes the next of many copies, together larger than most caches, as a model's layers are. With --threads 1 the
process's CPU time is taken, which waiting for a busy machine leaves out. Ratios are packed :
dense, of the same inputs, below 1 is faster; csr is compared with the faster of the dense ones.
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path
from statistics import median

import tools
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.layers.bitmap import BitmapLinear
from runtime.layers.dense import CompiledDense, DenseLinear
from runtime.native.library import library

SHAPES = [(3072, 576), (576, 1536), (3072, 2048), (16384, 2048), (2048, 8192)]  # [out, in]: 135M, then 1B
ROWS = [1, 16, 512]
SHARES = {"2:4": None, "50 %": 0.5, "60 %": 0.6, "70 %": 0.7, "90 %": 0.9}
COLD_BYTES = 128 << 20
MOST_COPIES = 48
LONG_S = 0.1  # a layer that takes so long is timed once a turn
INPUTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Contestant:
    """A way to hold a weight, and its copies. `inputs`: what it is given. `rivals`: what it is compared with."""

    name: str
    layers: list[Forward]
    inputs: str
    bytes: int
    rivals: tuple[str, ...] = ()
    seconds: list[float] = field(default_factory=list)

    def run(self, x_MK: torch.Tensor, rounds: int) -> None:
        """Some forwards; one, and none later, if a forward is long."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        x_MK, layers = x_MK.to(INPUTS[self.inputs]), cycle(self.layers)
        for _ in range(0 if self.seconds and self.seconds[0] > LONG_S else rounds):
            layer = next(layers)
            started = clock()
            layer(x_MK)
            self.seconds.append(clock() - started)
            if self.seconds[-1] > LONG_S:
                return


class Csr:
    """torch.sparse in its most favourable form."""

    def __init__(self, weight_OK: torch.Tensor) -> None:
        found = weight_OK.float().to_sparse_csr()
        self.parts = found.crow_indices().int(), found.col_indices().int(), found.values()
        self.weight = torch.sparse_csr_tensor(*self.parts, found.shape)
        self.bytes = sum(part.numel() * part.element_size() for part in self.parts)

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x_MK.T).T

    def another(self) -> "Csr":
        """A copy elsewhere in memory."""
        other = copy.copy(self)
        other.parts = tuple(part.clone() for part in self.parts)
        other.weight = torch.sparse_csr_tensor(*other.parts, self.weight.shape)
        return other


def sparse_weight(shape: tuple[int, int], share: float | None, generator: torch.Generator) -> torch.Tensor:
    """bf16 with that share of zeros, anywhere, or two of every four (None)."""
    weight_OK = torch.randn(shape, generator=generator)
    if share is None:
        pairs = torch.tensor([four for four in product((0, 1), repeat=4) if sum(four) == 2])
        kept_OK = pairs[torch.randint(len(pairs), (weight_OK.numel() // 4,), generator=generator)].view(shape)
    else:
        kept_OK = torch.rand(shape, generator=generator) >= share
    return weight_OK.mul_(kept_OK).bfloat16()


def contestants(shape: tuple[int, int], generator: torch.Generator) -> list[Contestant]:
    """Dense layers first."""
    dense = torch.randn(shape, generator=generator).bfloat16()
    count = max(2, min(MOST_COPIES, COLD_BYTES // (2 * dense.numel())))
    rivals = {"bf16": DenseLinear(dense, None, torch.bfloat16), "fp32": CompiledDense(dense, None)}
    found = [
        Contestant(f"dense, {inputs}", [copy.deepcopy(layer) for _ in range(count)], inputs, layer.bytes)
        for inputs, layer in rivals.items()
    ]
    for name, share in SHARES.items():
        weight = sparse_weight(shape, share, generator)
        for inputs in INPUTS:
            layer = BitmapLinear(weight, None)
            layers = [copy.deepcopy(layer) for _ in range(count)]
            found.append(Contestant(f"bitmap {name}, {inputs}", layers, inputs, layer.bytes, (f"dense, {inputs}",)))
        if share is not None:
            layer = Csr(weight)
            layers = [layer.another() for _ in range(max(2, min(count, COLD_BYTES // layer.bytes)))]
            both = tuple(f"dense, {inputs}" for inputs in INPUTS)
            found.append(Contestant(f"csr {name}", layers, "fp32", layer.bytes, both))
    return found


def measure(shape: tuple[int, int], rows: list[int], rounds: int, turns: int, seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    entered = contestants(shape, generator)
    times: dict[str, dict[int, float]] = {one.name: {} for one in entered}
    for count in rows:
        x_MK = torch.randn(count, shape[1], generator=generator)
        for one in entered:
            one.seconds.clear()
            one.run(x_MK, 1)
            one.seconds = [second for second in one.seconds if second > LONG_S]  # the first is not like the others
        for _ in range(turns):
            for one in entered:
                one.run(x_MK, rounds)
        for one in entered:
            times[one.name][count] = median(one.seconds)
    layers = {
        one.name: {
            "bytes": one.bytes,
            "ms": {count: round(1e3 * seconds, 4) for count, seconds in times[one.name].items()},
            "against_dense": {
                count: round(seconds / min(times[rival][count] for rival in one.rivals), 3)
                for count, seconds in times[one.name].items()
                if one.rivals
            },
        }
        for one in entered
    }
    return {"shape": list(shape), "dense_bytes": 2 * shape[0] * shape[1], "layers": layers}


def table(result: dict[str, object], shares: Iterable[str] = SHARES) -> str:
    """Bytes and times as multiples of the dense layer's; below 1 is less."""
    lines = []
    for case in result["cases"]:
        rows = list(next(iter(case["layers"].values()))["ms"])
        lines += [" × ".join(str(side) for side in case["shape"]), ""]
        lines.append("| layer | bytes | " + " | ".join(f"{count} rows" for count in rows) + " |")
        lines.append("|---" * (len(rows) + 2) + "|")
        for name, layer in case["layers"].items():
            if not name.startswith("dense") and not any(share in name for share in shares):
                continue
            figures = [f"{ratio:.2f}" for ratio in layer["against_dense"].values()]
            figures = figures or [f"({time:.3f} ms)" for time in layer["ms"].values()]
            lines.append(f"| {name} | {layer['bytes'] / case['dense_bytes']:.2f} | {' | '.join(figures)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse-linear.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=[f"{out}x{width}" for out, width in SHAPES])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore", message="Sparse")
    load = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
    with torch.inference_mode():
        shapes = [tuple(int(side) for side in text.split("x")) for text in asked.shapes]
        cases = [measure((out, width), asked.rows, asked.rounds, asked.turns, 0) for out, width in shapes]
    clock = "CPU" if asked.threads == 1 else "Wall"
    result = {
        "environment": tools.describe_machine() | {"threads": asked.threads, "load_before": float(load)},
        "kernels": library().reason or "compiled",
        "protocol": f"{clock} time, the median of {asked.turns} turns of {asked.rounds} forwards; what takes more than "
        f"{LONG_S} s goes once.",
        "cases": cases,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
