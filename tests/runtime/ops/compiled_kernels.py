"""Compiles every Triton kernel for GPUs that need not be there, and prints what came out as lines of JSON.

A process of its own, without TRITON_INTERPRET:

    python -m tests.runtime.ops.compiled_kernels 80 90
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.core.gpu import sweep
from runtime.ops.triton import attention, attention_frames, attention_launch, kv_store, low_bit, norm, rotary

TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
INT_POINTERS = {
    "starts_ptr": "*i32",
    "kv_len_ptr": "*i32",
    "table_ptr": "*i32",
    "position_ptr": "*i64",
    "slot_ptr": "*i64",
    "packed_ptr": "*i32",
    "zero_ptr": "*i8",
    "top_ptr": "*fp32",
    "sum_ptr": "*fp32",
    "part_ptr": "*fp32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "k_numbers_ptr": "*fp16",
    "v_numbers_ptr": "*fp16",
    "k_scale_ptr": "*fp32",
    "v_scale_ptr": "*fp32",
    "numbers_ptr": "*fp16",
}
CODES = {"int8": "*i8", "int4": "*u8", "fp8": "*u8"}  # fmt: skip
FLOATS = {"scale", "cap", "eps", "lowest", "highest"}


@dataclass(frozen=True)
class Build:
    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    dots: bool
    pointers: dict[str, str]  # other than the dtype's


def attentions() -> Iterator[Build]:
    for group, width, decode, segments, dtype, window, softcap, coding in [
        (4, 128, True, 8, "bf16", False, False, "full"),
        (3, 96, True, 8, "fp16", True, True, "full"),
        (2, 256, True, 4, "bf16", True, True, "full"),
        (4, 128, False, 1, "bf16", False, False, "full"),
        (2, 256, False, 1, "bf16", True, True, "full"),
        (1, 64, False, 1, "fp32", False, True, "full"),
        (4, 128, True, 8, "bf16", False, False, "int8"),
        (4, 128, True, 8, "bf16", False, False, "int4"),
        (4, 128, True, 8, "bf16", False, False, "fp8"),
        (2, 96, False, 1, "fp16", True, True, "int4"),
    ]:
        tile = attention_launch.tile_for(decode=decode, group=group, width=width, element_bytes=TYPES[dtype])
        constants = {
            "GROUPS": 8, "GROUP": group, "WIDTH": width, "BLOCK": 16, "BLOCK_D": triton.next_power_of_2(width),
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_Q": tile.m // group, "SEGMENTS": segments, "WINDOW": window,
            "SOFTCAP": softcap, "K_CODING": attention.CODINGS[coding], "V_CODING": attention.CODINGS[coding],
            "BLOCK_H": triton.next_power_of_2(width // 2), "PAGE_ROWS": 16 * 8, "SLOT_ROWS": 8,
        }  # fmt: skip
        name = f"attention {'decode' if decode else 'prefill'} {group} x {width} {dtype} segments {segments} {coding}"
        out = {"out_ptr": "*fp32"} if segments > 1 else {}
        out |= dict.fromkeys(("k_ptr", "v_ptr"), CODES[coding]) if coding in CODES else {}
        yield Build(name, attention._attend, dtype, constants, tile.warps, tile.stages, True, out)


def mixtures() -> Iterator[Build]:
    for group, width, decode, segments, dtype, window, softcap, bits in [
        (4, 128, True, 8, "bf16", False, False, 4),
        (3, 96, False, 1, "fp16", True, True, 8),
    ]:
        tile = attention_launch.tile_for(decode=decode, group=group, width=width, element_bytes=TYPES[dtype])
        constants = {
            "GROUPS": 8, "GROUP": group, "WIDTH": width, "BLOCK": 16, "SINKS": 16, "PAGE": 48,
            "BLOCK_E": triton.next_power_of_2(width // 2), "BLOCK_M": tile.m, "BLOCK_N": tile.n,
            "BLOCK_Q": tile.m // group, "SEGMENTS": segments, "WINDOW": window, "SOFTCAP": softcap, "K_BITS": bits,
            "V_BITS": bits,
        }  # fmt: skip
        name = f"frames {'decode' if decode else 'prefill'} {group} x {width} {dtype} segments {segments} {bits} bits"
        out = {"out_ptr": "*fp32"} if segments > 1 else {}
        codes = CODES["int4"] if bits == 4 else CODES["int8"]
        out |= {"k_codes_ptr": "*u8", "v_codes_ptr": codes, "coded_ptr": "*i32"}
        yield Build(name, attention_frames._attend_frames, dtype, constants, tile.warps, tile.stages, True, out)


def low_bits() -> Iterator[Build]:
    for rows, bits, group, zero, splits, dtype in [
        (1, 4, 128, False, 8, "bf16"),
        (16, 4, 64, True, 1, "fp16"),
        (512, 4, 32, False, 1, "fp16"),
        (512, 8, -1, False, 1, "bf16"),
    ]:
        tile = low_bit.tile_for(rows, group)
        constants = {
            "INPUTS": 4096, "OUTPUTS": 4096, "GROUP": 4096 if group == -1 else group, "BITS": bits, "HAS_ZERO": zero,
            "BLOCK_T": tile.t, "BLOCK_O": tile.o, "BLOCK_K": tile.k, "SPLITS": splits,
        }  # fmt: skip
        name = f"low_bit {rows} rows w{bits} g{group} zero {zero} {dtype}"
        out = {"out_ptr": "*fp32"} if splits > 1 else {}
        scale = {"scale_ptr": f"*{dtype}"}
        yield Build(name, low_bit._matmul, dtype, constants, tile.warps, tile.stages, True, out | scale)


def others() -> Iterator[Build]:
    merge = {"HEADS": 32, "WIDTH": 96, "BLOCK_D": 128, "SEGMENTS": 16}
    yield Build("merge", attention_launch._merge, "bf16", merge, 4, 2, False, {})
    yield Build("kv_store", kv_store._store, "bf16", {"WIDTH": 1024, "BLOCK": 1024}, 4, 2, False, {})
    for coding, codes in CODES.items():
        pointers = {"codes_ptr": codes, "scale_ptr": "*fp32"}
        store = {"GROUPS": 8, "WIDTH": 96, "CODING": attention.CODINGS[coding], "BLOCK_D": 128, "BLOCK_H": 64}
        yield Build(f"kv_store {coding}", kv_store._store_codes, "bf16", store, 1, 2, False, pointers)
    one = {"WIDTH": 576, "BLOCK": 1024, "PLUS_ONE": True}
    yield Build("norm", norm._normalise, "bf16", one, 4, 2, False, {})
    turn = {"HEADS": 9, "GROUPS": 3, "WIDTH": 96, "ROTATED": 48, "BLOCK": 128}
    yield Build("rotary", rotary._rotate, "bf16", turn, 1, 2, False, {})


def sweeps() -> Iterator[Build]:
    names = ("group_ptr", "channel_ptr")
    pointers = dict.fromkeys(names, "*i64") | {"codes_ptr": "*i8", "zero_ptr": "*fp32"}
    for zero, floats in ((True, False), (False, True)):
        constants = {"HAS_ZERO": zero, "FLOATS": floats, "BLOCK_B": 128, "BLOCK_R": sweep.STRIP}
        yield Build(f"sweep zero {zero} floats {floats}", sweep._sweep, "fp32", constants, 4, 2, False, pointers)


def compile_for(build: Build, capability: int) -> dict[str, Any]:
    signature, aligned = {}, {}
    for index, name in enumerate(build.kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = build.pointers.get(name) or INT_POINTERS.get(name) or f"*{build.dtype}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name.endswith("_ptr") or "stride" in name:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(build.kernel, signature, build.constants, aligned)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    return {
        "case": build.name,
        "capability": capability,
        "cubin_bytes": len(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "dots": build.dots and build.dtype != "fp32",
        "tensor_cores": len(re.findall(r"\b(?:wg)?mma\.\w*sync|wgmma\.mma_async", ptx)),
        "local_memory": ".local " in ptx,
    }


if __name__ == "__main__":
    for capability in sys.argv[1:]:
        for build in (*attentions(), *mixtures(), *low_bits(), *others(), *sweeps()):
            print(json.dumps(compile_for(build, int(capability))), flush=True)
