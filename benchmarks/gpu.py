"""Speed of the runtime's operations on one GPU, against torch's own and against the memory's bandwidth, as one JSON.

    make gpu-bench                                  # or, on a bare machine:
    PYTHONPATH=. python benchmarks/gpu.py --out runs/gpu-bench.json [--minutes 8] [--only decode low_bit]

Random numbers at the shapes of an 8B Llama (32 query heads, 8 key-value heads of 128), bf16, pages of 16. Each figure
is the median of many runs, the L2 cache overwritten before each. `share` is of the bandwidth that a plain copy reaches.
Needs torch, numpy, triton and safetensors; sections that would start after `--minutes` are left out, by name.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime.graphs import DecodeGraphs
from runtime.layers.dense import DenseLinear
from runtime.layers.gpu_timing import layer_milliseconds, milliseconds
from runtime.layers.semi_structured import SemiStructuredLinear
from runtime.ops.attention import AttentionBatch, paged_attention
from runtime.ops.backend import torch_only
from runtime.ops.kv_store import store_kv
from runtime.ops.low_bit import low_bit_matmul
from runtime.ops.norm import rms_norm
from runtime.ops.rotary import apply_rotary
from tests.gpu.toy import Toy

DEVICE = "cuda"
HEADS, GROUPS, WIDTH, BLOCK = 32, 8, 128, 16
DTYPE = torch.bfloat16
Row = dict[str, object]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def copy_gb_s() -> float:
    """What a large copy reads and writes per second: the bandwidth that can be had."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def paged(parts: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
    """q, the pools of keys and values, and the batch of sequences with (stored, new) tokens in scattered pages."""
    stored, new = zip(*parts, strict=True)
    needed = [-(-(before + count) // BLOCK) for before, count in parts]
    pages = torch.randperm(sum(needed)).tolist()
    tables = [[pages.pop() for _ in range(count)] for count in needed]
    batch = AttentionBatch.build(stored, new, stored, tables, block_size=BLOCK, device=DEVICE)
    return random(sum(new), HEADS, WIDTH), random(2, sum(needed), BLOCK, GROUPS, WIDTH), batch


def decode(bandwidth: float) -> Iterator[Row]:
    for sequences, length in [(1, 8192), (1, 32768), (8, 8192), (64, 8192), (256, 1024), (16, 500)]:
        q, pools, batch = paged([(length - 1, 1)] * sequences)
        ours = milliseconds(partial(paged_attention, q, *pools, batch, scale=0.1))
        del pools
        k, v = random(2, sequences, GROUPS, length, WIDTH)
        folded = q.view(sequences, GROUPS, HEADS // GROUPS, WIDTH)
        rival = milliseconds(partial(scaled_dot_product_attention, folded, k, v, scale=0.1))
        gb_s = 2 * k.numel() * 2 / ours / 1e6
        yield {
            "sequences": sequences, "length": length, "ms": ours, "gb_s": gb_s, "share": gb_s / bandwidth,
            "sdpa_contiguous_ms": rival,
        }  # fmt: skip


def prefill(bandwidth: float) -> Iterator[Row]:
    for stored, new in [(0, 1024), (0, 4096), (0, 16384), (8192, 512), (32256, 512)]:
        q, pools, batch = paged([(stored, new)])
        ours = milliseconds(partial(paged_attention, q, *pools, batch, scale=0.1), repeats=10)
        products = 4 * HEADS * WIDTH * sum(range(stored + 1, stored + new + 1))
        row: Row = {"stored": stored, "new": new, "ms": ours, "tflop_s": products / ours / 1e9}
        if not stored:
            q, k, v = q.transpose(0, 1)[None], random(1, HEADS, new, WIDTH), random(1, HEADS, new, WIDTH)
            run = partial(scaled_dot_product_attention, q, k, v, is_causal=True, scale=0.1)
            rival = milliseconds(run, repeats=10)
            row |= {"sdpa_contiguous_ms": rival, "sdpa_tflop_s": products / rival / 1e9}
        yield row


def small(bandwidth: float) -> Iterator[Row]:
    """Operations whose cost is reading and writing, against their torch references."""
    for tokens in (1, 64, 4096):
        x, weight = random(tokens, 4096), random(4096)
        q, k, v = random(tokens, HEADS, WIDTH), random(tokens, GROUPS, WIDTH), random(tokens, GROUPS, WIDTH)
        wave = torch.randn(2, tokens, WIDTH, device=DEVICE)
        pools, slots = random(2, tokens, BLOCK, GROUPS, WIDTH), torch.randperm(tokens * BLOCK, device=DEVICE)[:tokens]
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "rms_norm": (partial(rms_norm, x, weight, 1e-6), 4 * x.numel()),
            "rotary": (partial(apply_rotary, q, k, *wave), 4 * (q.numel() + k.numel())),
            "store_kv": (partial(store_kv, k, v, *pools, slots), 8 * k.numel()),
        }
        for name, (run, moved_bytes) in runs.items():
            ours = milliseconds(run)
            with torch_only():
                reference = milliseconds(run)
            gb_s = moved_bytes / ours / 1e6
            yield {
                "operation": name, "tokens": tokens, "ms": ours, "gb_s": gb_s, "share": gb_s / bandwidth,
                "torch_ms": reference,
            }  # fmt: skip


def low_bit(bandwidth: float) -> Iterator[Row]:
    for outputs, inputs in [(4096, 4096), (28672, 4096), (4096, 14336)]:
        codes = torch.randint(-8, 8, (outputs, inputs), device=DEVICE, dtype=torch.int8)
        weight = QuantTensor.from_codes(codes, random(outputs, inputs // 128), None, Scheme(4, 128))
        dense = random(outputs, inputs)
        for rows in (1, 4, 16, 64, 512):
            x = random(rows, inputs)
            ours = milliseconds(partial(low_bit_matmul, x, weight))
            rival = milliseconds(partial(linear, x, dense))
            gb_s = weight.bytes / ours / 1e6
            yield {
                "outputs": outputs, "inputs": inputs, "rows": rows, "ms": ours, "bf16_linear_ms": rival,
                "speedup": rival / ours, "gb_s": gb_s, "share": gb_s / bandwidth,
            }  # fmt: skip


def sparse(bandwidth: float) -> Iterator[Row]:
    """2:4 weights, dense and as torch packs them, timed as the runtime times them when it loads a pruned model."""
    for outputs, inputs in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]:
        weight = random(outputs, inputs).view(-1, 4)
        weight = weight.scatter(1, torch.rand(weight.shape, device=DEVICE).argsort(dim=1)[:, :2], 0)
        dense = DenseLinear(weight.view(outputs, inputs), None, DTYPE)
        try:
            packed = SemiStructuredLinear(dense.weight, None)
        except RuntimeError as error:
            yield {"outputs": outputs, "inputs": inputs, "refused": str(error).splitlines()[0]}
            continue
        sizes = {"dense_bytes": dense.bytes, "packed_bytes": packed.bytes}
        for rows in (1, 4, 16, 64, 512, 2048):
            x = random(rows, inputs)
            wanted = dense(x).float()
            apart = ((packed(x).float() - wanted).norm() / wanted.norm()).item()
            ours, rival = layer_milliseconds(packed, x), layer_milliseconds(dense, x)
            yield {
                "outputs": outputs, "inputs": inputs, "rows": rows, "ms": ours, "dense_ms": rival,
                "speedup": rival / ours, "apart": apart, **sizes,
            }  # fmt: skip


def steps(bandwidth: float) -> Iterator[Row]:
    """A whole decode step of a 1B shape, launched one operation at a time and as a graph, in bf16 and in 4 bits."""
    shape = {"layers": 16, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 8192, "vocabulary": 128256}
    for packed in (False, True):
        toy = Toy(**shape, pages=64 * 64 + 1, block=BLOCK, packed=packed)
        toy.fill()
        graphs = DecodeGraphs(
            toy.forward, pages=64, trash_page=64 * 64, block_size=BLOCK, device=torch.device(DEVICE), sizes=(1, 8, 64)
        )
        for sequences in (1, 8, 64):
            tables = [list(range(64 * s, 64 * s + 64)) for s in range(sequences)]
            ones, lengths = [1] * sequences, [1000] * sequences
            batch = AttentionBatch.build(lengths, ones, lengths, tables, block_size=BLOCK, device=DEVICE)
            ids = torch.zeros(sequences, dtype=torch.int64, device=DEVICE)
            eager = milliseconds(partial(toy.forward, ids, batch))
            graph = milliseconds(partial(graphs.run, ids, batch, torch.arange(len(ids), device=ids.device)))
            yield {
                "weights": "w4 g128" if packed else "bf16", "sequences": sequences, "eager_ms": eager,
                "graph_ms": graph, "tokens_per_s": sequences / graph * 1e3, "graph_pool_bytes": graphs.bytes,
            }  # fmt: skip
        del toy, graphs
        torch.cuda.empty_cache()


SECTIONS = {"decode": decode, "low_bit": low_bit, "sparse": sparse, "steps": steps, "prefill": prefill, "small": small}


def measure(names: list[str], minutes: float) -> dict[str, object]:
    started = time.monotonic()
    bandwidth = copy_gb_s()
    result: dict[str, object] = {"environment": environment(), "copy_gb_s": bandwidth, "left_out": []}
    for name in names:
        if time.monotonic() - started > minutes * 60:
            result["left_out"] = [*result["left_out"], name]
            continue
        result[name] = [_short(row) for row in SECTIONS[name](bandwidth)]
        print(f"{name}: {len(result[name])} figures, {time.monotonic() - started:.0f} s so far", flush=True)
    return result | {"seconds": round(time.monotonic() - started, 1)}


def _short(row: Row) -> Row:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def environment() -> dict[str, object]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        with torch.inference_mode():
            result = measure(arguments.only, arguments.minutes)
    else:
        result = {"skipped": "no GPU here"}
        print("gpu-bench skipped: no GPU here")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
