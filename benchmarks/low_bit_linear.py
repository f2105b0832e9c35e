"""Linear layers with low-bit weights beside dense ones, on a CPU: milliseconds a forward, by rows of input.

Layers of one shape take turns for some rounds, and the fastest round of each counts: other work on the machine only
ever adds. With --threads 1 the process's CPU time is taken, which waiting for a busy machine leaves out. Each forward
takes the next of many copies, together larger than the caches, as a model's layers are. Ratios are to the faster of the
dense layers, fp32 and bf16.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import tools
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compress.core.numerics import runtime_dtype
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime.layers.dense import DenseLinear
from runtime.layers.linear import LinearLayer, make_linear
from runtime.native.library import library

SHAPES = [(1536, 576), (4864, 896), (2048, 2048), (8192, 2048)]  # [out, in]
ROWS = [1, 2, 4, 8, 16, 32, 128]
SCHEMES = [
    Scheme(4, 128),
    Scheme(4, 32),
    Scheme(2, 64),
    Scheme(8, 128),
    Scheme(8),
    Scheme(8, activation_bits=8),
    Scheme(4, 64, dtype="nf4"),
    Scheme(8, dtype="fp8"),
]
COLD_BYTES = 96 << 20
MOST_COPIES = 48
LONG_S = 0.1  # a layer that takes so long is timed once a turn


@dataclass
class Contestant:
    """A way to hold a weight, and its copies."""

    name: str
    layers: list[LinearLayer]
    dtype: torch.dtype
    seconds: float = float("inf")

    def run(self, x: torch.Tensor, rounds: int) -> None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        x, layers = x.to(self.dtype), cycle(self.layers)
        for _ in range(rounds):
            layer = next(layers)
            started = clock()
            layer(x)
            self.seconds = min(self.seconds, clock() - started)
            if clock() - started > LONG_S:
                return


def copies(layer: LinearLayer) -> list[LinearLayer]:
    count = max(2, min(MOST_COPIES, COLD_BYTES // layer.bytes))
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def random_weight(shape: tuple[int, int], scheme: Scheme, generator: torch.Generator) -> QuantTensor:
    codes_OK = torch.randint(0, 120, shape, generator=generator).to(torch.uint8)
    if scheme.bits < 8:
        codes_OK &= (1 << scheme.bits) - 1
    scale_OG = torch.rand((shape[0], scheme.groups_in(shape[1])), generator=generator).bfloat16()
    return QuantTensor.from_stored(codes_OK, scale_OG, None, scheme)


def contestants(shape: tuple[int, int], generator: torch.Generator) -> list[Contestant]:
    """Dense layers first."""
    weight, compute = torch.randn(shape, generator=generator), runtime_dtype("fast", "cpu")
    dtypes = {"dense fp32": torch.float32, "dense bf16": torch.bfloat16}
    found = [Contestant(name, copies(DenseLinear(weight, None, dtype)), dtype) for name, dtype in dtypes.items()]
    for scheme in SCHEMES:
        if scheme.group_size != -1 and shape[1] % scheme.group_size:
            continue
        packed = random_weight(shape, scheme, generator)
        group = "" if scheme.group_size == -1 else f" g{scheme.group_size}"
        for compiled in (True, False):
            layer = make_linear(packed, numerics="fast", compiled=compiled)
            name = f"{scheme.name}{group}, {'compiled' if compiled else 'torch'}"
            found.append(Contestant(name, copies(layer), compute))
    return found


def measure(shape: tuple[int, int], rounds: int, turns: int, generator: torch.Generator) -> dict[str, object]:
    entered = contestants(shape, generator)
    times: dict[str, dict[int, float]] = {one.name: {} for one in entered}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=generator)
        for one in entered:
            one.seconds = float("inf")
        for _ in range(turns):
            for one in entered:
                one.run(x, rounds)
        for one in entered:
            times[one.name][rows] = round(1e3 * one.seconds, 4)
    layers = {
        one.name: {
            "bytes": one.layers[0].bytes,
            "slow_reason": one.layers[0].slow_reason,
            "ms": times[one.name],
        }
        for one in entered
    }
    return {"shape": list(shape), "layers": layers}


def table(result: dict[str, object]) -> str:
    """Times as multiples of the faster dense layer; below 1 is faster."""
    lines = []
    for case in result["cases"]:
        layers = case["layers"]
        dense = {rows: min(layers["dense fp32"]["ms"][rows], layers["dense bf16"]["ms"][rows]) for rows in ROWS}
        out, width = case["shape"]
        lines += [f"{out} × {width}", "", "| layer | MiB | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |"]
        lines.append("|---" * (len(ROWS) + 2) + "|")
        for name, layer in layers.items():
            figures = " | ".join(f"{layer['ms'][rows] / dense[rows]:.2f}" for rows in ROWS)
            lines.append(f"| {name} | {layer['bytes'] / 2**20:.2f} | {figures} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "low-bit-linear.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=[f"{out}x{width}" for out, width in SHAPES])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    generator = torch.Generator().manual_seed(0)
    load = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
    with torch.inference_mode():
        shapes = [tuple(int(side) for side in text.split("x")) for text in asked.shapes]
        cases = [measure((out, width), asked.rounds, asked.turns, generator) for out, width in shapes]
    clock = "CPU time" if asked.threads == 1 else "Wall time"
    result = {
        "environment": tools.describe_machine() | {"threads": asked.threads, "load_before": float(load)},
        "kernels": library().reason or "compiled",
        "protocol": f"{clock} of the fastest of {asked.turns} turns of {asked.rounds} rounds.",
        "cases": cases,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
