"""Runs Triton kernels over their edge shapes in the interpreter and prints each case's error as a line of JSON.

A process of its own: TRITON_INTERPRET must be set before anything imports triton, and must not leak into other tests.

    TRITON_INTERPRET=1 python -m tests.runtime.ops.kernel_cases attention

Dots on bf16 are silently wrong in the interpreter, so dots are tested there in fp32 and fp16. The tests that need a GPU
run the same cases on it, in bf16 too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from compress.core.levels import table
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from kv_compress._coding import code_dtype, round_trip
from kv_compress.policy import CODECS
from runtime.ops.head_pages import split_layers
from runtime.ops.kv_store import store_reference
from runtime.ops.norm import normalise_reference
from runtime.ops.pages import Pages
from runtime.ops.rotary import rotate_reference
from tests.runtime.ops.mixtures import mixture
from tests.runtime.ops.paged import Paged, dense, make

Case = tuple[str, torch.Tensor, torch.Tensor, float]  # name, result, what it should be, largest error allowed
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
LOOSE = {BF16: 1.6e-2, F16: 2e-3, F32: 2e-6}


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# sequences (stored, new); heads, groups, width, block; dtype; settings
PREFILLS = [
    ([(0, 1), (0, 2)], (1, 1, 16, 16), F32, {}),
    ([(0, 5)], (2, 2, 16, 16), F16, {}),
    ([(0, 16)], (4, 2, 32, 16), F32, {}),
    ([(0, 17)], (4, 1, 32, 16), F16, {}),
    ([(15, 2)], (3, 1, 16, 16), F32, {}),
    ([(16, 2)], (6, 2, 16, 16), F32, {}),
    ([(31, 33)], (9, 3, 64, 16), F32, {}),
    ([(0, 40)], (9, 3, 64, 16), F16, {}),
    ([(7, 30), (0, 3), (50, 2)], (4, 2, 24, 16), F32, {}),
    ([(0, 65)], (2, 1, 80, 16), F32, {}),
    ([(3, 20)], (2, 2, 96, 16), F16, {}),
    ([(0, 9)], (2, 1, 8, 16), F32, {}),
    ([(0, 21)], (8, 1, 16, 16), F32, {}),
    ([(5, 11)], (16, 1, 16, 16), F32, {}),
    ([(5, 11)], (20, 1, 16, 16), F16, {}),
    ([(0, 30)], (2, 1, 16, 1), F32, {}),
    ([(11, 30)], (2, 1, 16, 64), F32, {}),
    ([(60, 10)], (2, 1, 128, 32), F32, {}),
    ([(0, 6), (4, 6)], (2, 1, 256, 16), F16, {}),
    ([(0, 40)], (2, 1, 16, 16), F32, {"window": 1}),
    ([(30, 40)], (2, 1, 16, 16), F32, {"window": 16}),
    ([(70, 20)], (4, 2, 16, 16), F16, {"window": 33}),
    ([(9, 20)], (4, 2, 16, 16), F32, {"window": 1000}),
    ([(0, 20)], (4, 2, 16, 16), F32, {"softcap": 0.5}),
    ([(40, 20)], (4, 2, 16, 16), F16, {"softcap": 30.0}),
    ([(40, 20), (0, 30)], (4, 2, 16, 16), F32, {"softcap": 2.0, "window": 25}),
    ([(5, 1), (9, 1), (0, 12)], (4, 2, 16, 16), F32, {}),
    ([(33, 1), (20, 12), (5, 1)], (4, 2, 16, 16), F32, {}),
    ([(100, 1), (99, 2), (98, 3)], (6, 2, 16, 16), F16, {}),
    ([(0, 7)] * 9, (2, 1, 16, 16), F32, {}),
    ([(3, 1)] * 5 + [(2, 9)] * 2, (3, 1, 16, 8), F32, {"window": 4}),
    ([(250, 8)], (2, 1, 16, 16), F32, {}),
]
DECODES = [
    ([0], (1, 1, 16, 16), F32, 1, {}),
    ([0], (1, 1, 16, 16), F32, 4, {}),
    ([15], (2, 2, 16, 16), F16, 1, {}),
    ([16], (4, 2, 32, 16), F32, 2, {}),
    ([17, 3], (4, 1, 32, 16), F16, 2, {}),
    ([63], (3, 1, 16, 16), F32, 1, {}),
    ([64], (6, 2, 16, 16), F32, 1, {}),
    ([65], (6, 2, 16, 16), F32, 2, {}),
    ([127, 128, 129], (3, 1, 64, 16), F32, 2, {}),
    ([200], (6, 2, 64, 16), F16, 8, {}),
    ([300, 5], (4, 2, 24, 16), F32, 4, {}),
    ([130], (2, 1, 80, 16), F32, 2, {}),
    ([130], (2, 2, 96, 16), F16, 2, {}),
    ([70], (2, 1, 8, 16), F32, 2, {}),
    ([70], (8, 1, 16, 16), F32, 2, {}),
    ([70], (16, 1, 16, 16), F32, 2, {}),
    ([70], (20, 1, 16, 16), F16, 2, {}),
    ([75], (2, 1, 16, 1), F32, 2, {}),
    ([75], (2, 1, 16, 64), F32, 2, {}),
    ([90], (2, 1, 128, 32), F32, 2, {}),
    ([90], (2, 1, 256, 16), F16, 2, {}),
    ([90], (2, 1, 16, 16), F32, 1, {"window": 1}),
    ([200], (2, 1, 16, 16), F32, 4, {"window": 1}),
    ([200, 9], (4, 2, 16, 16), F16, 4, {"window": 70}),
    ([200, 9], (4, 2, 16, 16), F32, 2, {"window": 64}),
    ([100], (4, 2, 16, 16), F32, 2, {"window": 1000}),
    ([100], (4, 2, 16, 16), F32, 2, {"softcap": 0.5}),
    ([100], (4, 2, 16, 16), F16, 1, {"softcap": 30.0}),
    ([150, 149], (4, 2, 16, 16), F32, 4, {"softcap": 2.0, "window": 80}),
    ([1, 2, 3, 5, 8, 13, 21, 80], (2, 1, 16, 16), F32, 2, {}),
    ([1, 2, 3, 5, 8, 80], (3, 3, 16, 16), F16, 1, {}),
    ([260], (2, 1, 16, 16), F32, 32, {}),
]

# parts; heads, groups, width, tokens of a coded page; dtype, segments, settings. Full pages have 4 tokens.
FRAMES = [
    (parts, shape, dtype, segments, settings)
    for parts, dtype in (
        ([(0, 1)], F32), ([(29, 1), (30, 1), (31, 1)], F32), ([(170, 1), (9, 1)], F16), ([(75, 6), (0, 5)], F32),
        ([(33, 1), (90, 17), (160, 1)], F16),
    )
    for shape, segments, settings in (
        ((1, 1, 16, 20), 1, {}), ((6, 2, 24, 40), 2, {}), ((4, 2, 32, 72), 4, {"window": 23}),
        ((3, 1, 80, 20), 1, {"softcap": 2.0}), ((8, 2, 8, 100), 2, {}), ((4, 4, 64, 24), 1, {"window": 70}),
    )
]  # fmt: skip


def attention(device: str = "cpu", only: torch.dtype | None = None) -> Iterator[Case]:
    """`only` replaces the cases' dtypes."""
    from runtime.ops.triton.attention import attend

    everything = [(parts, shape, dtype, None, settings) for parts, shape, dtype, settings in PREFILLS]
    for stored, *rest in DECODES:
        everything.append(([(length, 1) for length in stored], *rest))
    for parts, (heads, groups, width, block), of_case, segments, settings in everything:
        dtype = only or of_case
        name = f"{parts} heads {heads}/{groups} width {width} block {block} {dtype} segments {segments} {settings}"
        paged = make(parts, heads=heads, groups=groups, width=width, block=block, dtype=dtype, seed=len(name))
        kind = {"scale": width**-0.5, "window": None, "softcap": None, **settings}
        there = paged.to(device)
        out = attend(there.q_THD, there.k_PBGD, there.v_PBGD, there.batch, segments=segments, **kind)
        yield name, out, dense(paged, **kind), LOOSE[dtype]


def low_bit(device: str = "cpu", only: torch.dtype | None = None) -> Iterator[Case]:
    from runtime.ops.triton.low_bit import matmul, supports

    # rows, outputs, inputs, bits, group size, symmetric, dtype, splits
    cases = [
        (rows, outputs, inputs, bits, group, symmetric, dtype, splits)
        for (rows, outputs, inputs), dtype in zip(
            [(1, 64, 128), (2, 100, 256), (7, 16, 512), (16, 65, 320), (17, 48, 192), (33, 70, 256)],
            [F32, F16, F16, F32, F32, F16],
            strict=True,
        )
        for bits, group, symmetric, splits in [
            (4, 32, True, 1),
            (4, 64, False, 2),
            (4, 128, True, None),
            (4, -1, False, 1),
            (8, 128, True, 1),
            (2, 96, False, 1),
        ]
    ]
    cases += [
        (3, 40, 100, 4, 32, True, F32, 1),  # the last group is ragged
        (3, 40, 99, 4, 128, False, F32, 1),  # the last word is ragged
        (1, 1, 8, 4, -1, True, F32, 1),
        (5, 33, 1000, 4, 128, True, F16, 8),
        (70, 64, 128, 4, 128, False, F16, None),
    ]
    for rows, outputs, inputs, bits, group, symmetric, of_case, splits in cases:
        dtype = only or of_case
        name = f"{rows} rows {outputs} x {inputs} w{bits} g{group} symmetric {symmetric} {dtype} splits {splits}"
        scheme = Scheme(bits, group, symmetric)
        assert supports(scheme), name
        weight = _weight(outputs, inputs, scheme, device)
        x = random(rows, inputs, dtype=dtype, seed=1).to(device)
        wanted = x.double() @ weight.dequantize(torch.float64).T
        yield name, matmul(x, weight, splits=splits), wanted, wanted.abs().max().item() * LOOSE[dtype]


def _weight(outputs: int, inputs: int, scheme: Scheme, device: str) -> QuantTensor:
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (outputs, inputs), generator=generator, dtype=torch.int8)
    shape = (outputs, scheme.groups_in(inputs))
    zero = torch.randint(scheme.lowest, scheme.highest + 1, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape, generator=generator) + 0.1
    zero = None if scheme.symmetric else zero.to(device)
    return QuantTensor.from_codes(codes.to(device), scale.to(device), zero, scheme)


def kv_store(device: str = "cpu") -> Iterator[Case]:
    from runtime.ops.triton.kv_store import store

    for groups, width, block in [(1, 16, 16), (2, 64, 16), (3, 24, 16), (8, 128, 1), (5, 80, 32), (9, 128, 8)]:
        for tokens, strided in [(1, False), (2, True), (7, False)]:
            for dtype, pool_dtype in [(F32, F32), (BF16, BF16), (F32, F16)]:
                name = f"{tokens} tokens {groups} x {width} block {block} {dtype} -> {pool_dtype} strided {strided}"
                joint = random(tokens, 2 * groups * width + 8, dtype=dtype).to(device)
                k, v = joint[:, : 2 * groups * width].chunk(2, dim=1)
                k, v = (x if strided else x.clone() for x in (k, v))
                k, v = (x.view(tokens, groups, width) for x in (k, v))
                slots = torch.randperm(3 * 8 * block, generator=torch.Generator().manual_seed(tokens))[:tokens]
                slots = slots.to(device)
                shape = (2, 24, block, groups, width)
                mine, wanted = (torch.zeros(shape, dtype=pool_dtype, device=device) for _ in range(2))
                store(k, v, mine[0], mine[1], slots)
                store_reference(k, v, wanted[0], wanted[1], slots)
                yield name, mine, wanted, 0.0


CODED = [  # keys, values, then as PREFILLS and DECODES
    ("int8", "int8", [(31, 33)], (6, 3, 64, 16), F32, None, {}),
    ("int8", "int8", [(7, 30), (0, 3), (50, 2)], (4, 2, 24, 16), F16, None, {}),
    ("int4", "int4", [(31, 33)], (6, 3, 64, 16), F32, None, {}),
    ("int4", "int4", [(7, 30), (0, 3), (50, 2)], (4, 2, 24, 16), F16, None, {"window": 20}),
    ("fp8", "fp8", [(31, 33)], (4, 2, 64, 16), F32, None, {}),
    ("fp8", "fp8", [(7, 30), (50, 2)], (4, 2, 24, 16), F16, None, {"softcap": 2.0}),
    ("int8", "int8", [(127, 1), (128, 1), (3, 1)], (6, 2, 64, 16), F32, 2, {}),
    ("int4", "int4", [(127, 1), (128, 1), (3, 1)], (6, 2, 64, 16), F32, 2, {}),
    ("fp8", "fp8", [(127, 1), (128, 1), (3, 1)], (6, 2, 64, 16), F32, 2, {}),
    ("int8", "int4", [(90, 1)], (2, 1, 80, 32), F32, 1, {}),
    ("int4", "full", [(90, 1), (10, 4)], (4, 1, 96, 16), F16, 1, {}),
    ("full", "fp8", [(90, 1)], (4, 1, 16, 8), F32, 4, {"softcap": 1.0, "window": 40}),
]


def coded(device: str = "cpu", only: torch.dtype | None = None) -> Iterator[Case]:
    """Codes as the kernel stores them, against those of torch; then attention over them."""
    from runtime.ops.triton.attention import attend
    from runtime.ops.triton.kv_store import store

    scale = torch.tensor([0.01, 0.02, 0.5])
    for keys, values, parts, (heads, groups, width, block), of_case, segments, settings in CODED:
        dtype = only or of_case
        name = f"{keys} {values} {parts} {width} {dtype} {settings}"
        paged = make(parts, heads=heads, groups=groups, width=width, block=block, dtype=dtype, seed=len(name))
        mine, wanted = ([_empty(paged.k_PBGD, codec, scale, device) for codec in (keys, values)] for _ in range(2))
        for own, k, v in zip(paged.batch.table_SP.tolist(), paged.keys, paged.values, strict=True):
            slot = torch.tensor([own[i // block] * block + i % block for i in range(len(k))], device=device)
            store(k.to(device), v.to(device), *mine, slot)
            store_reference(k.to(device), v.to(device), *wanted, slot)
        for a, b, codec in zip(mine, wanted, (keys, values), strict=True):
            for x, y in zip(a.tensors(), b.tensors(), strict=True):
                yield f"store {codec} {name}", x.float(), y.float(), 0.0
        kind = {"scale": width**-0.5, "window": None, "softcap": None, **settings}
        there = paged.to(device)
        out = attend(there.q_THD, *mine, there.batch, segments=segments, **kind)
        paged.keys = [round_trip(keys, x, scale[:groups]) for x in paged.keys]
        paged.values = [round_trip(values, x, scale[:groups]) for x in paged.values]
        yield name, out, dense(paged, **kind), 2 * LOOSE[dtype]


BY_HEAD = [  # as CODED, but for (query heads of a head, width, block, heads of a layer)
    ("full", "full", [(31, 9), (0, 3), (50, 2)], (3, 24, 16, 2), F32, None, {}),
    ("full", "full", [(127, 1), (128, 1), (3, 1)], (2, 64, 16, 3), F16, 2, {"window": 40}),
    ("int8", "int8", [(127, 1), (30, 5)], (3, 64, 16, 4), F32, 1, {}),
    ("int4", "int4", [(127, 1), (128, 1), (3, 1)], (2, 16, 16, 2), F32, 2, {"softcap": 2.0}),
    ("fp8", "int8", [(90, 1), (10, 4)], (1, 24, 8, 3), F16, None, {}),
]


def by_head(device: str = "cpu", only: torch.dtype | None = None) -> Iterator[Case]:
    """Pages of single heads that lie anywhere in pages of all heads."""
    from runtime.ops.triton.attention import attend
    from runtime.ops.triton.kv_store import store

    for keys, values, parts, (heads, width, block, columns), of_case, segments, settings in BY_HEAD:
        dtype = only or of_case
        name = f"{keys} {values} {parts} {width} {dtype} {settings}"
        paged = make(parts, heads=heads, groups=1, width=width, block=block, dtype=dtype, seed=len(name))
        k, v, there = scattered(paged, (keys, values), columns, store, device)
        kind = {"scale": width**-0.5, "window": None, "softcap": None, **settings}
        out = attend(there.q_THD, k, v, there.batch, segments=segments, **kind)
        paged.keys = [round_trip(keys, x, torch.ones(1)) for x in paged.keys]
        paged.values = [round_trip(values, x, torch.ones(1)) for x in paged.values]
        yield name, out, dense(paged, **kind), 2 * LOOSE[dtype]


def scattered(
    paged: Paged, codecs: tuple[str, str], columns: int, store: Callable[..., None], device: str
) -> tuple[Pages, Pages, Paged]:
    """Sequences of one head, whose pages are put where heads of a larger memory would have theirs."""
    pages, block, _, width = paged.k_PBGD.shape
    whole = torch.zeros(pages, block, columns, width, dtype=paged.k_PBGD.dtype)
    place = torch.randperm(pages * columns, generator=torch.Generator().manual_seed(pages))[:pages]
    first = place // columns * block * columns + place % columns
    memory = []
    for codec in codecs:
        [its] = split_layers(_empty(whole, codec, torch.ones(columns), device), 1, [torch.ones(columns)], [False])
        one = torch.ones(1, device=device) if codec == "fp8" else None
        memory.append(replace(its.heads, scale_G=one))
    for own, k, v in zip(paged.batch.table_SP.tolist(), paged.keys, paged.values, strict=True):
        rows = torch.tensor([int(first[own[i // block]]) + i % block * columns for i in range(len(k))], device=device)
        store(k.to(device), v.to(device), *memory, rows)
    there = paged.to(device)
    there.batch.table_SP = first[paged.batch.table_SP.long()].int().to(device)
    return memory[0], memory[1], there


def frames(device: str = "cpu", only: torch.dtype | None = None) -> Iterator[Case]:
    """Full and coded pages in one table."""
    from runtime.ops.triton.attention_frames import attend, takes

    kinds = ("int4", "int8", "int8 int4")
    for index, (parts, (heads, groups, width, page), of_case, segments, settings) in enumerate(FRAMES):
        dtype, kind = only or of_case, kinds[index % 3]
        name = f"{parts} {kind} heads {heads}/{groups} width {width} page {page} {dtype} {segments} {settings}"
        paged, k, v, batch = mixture(
            parts, kind, heads=heads, groups=groups, width=width, page_tokens=page, dtype=dtype, device=device
        )
        if not takes(k, v):
            raise ValueError(name)
        asked = {"scale": width**-0.5, "window": None, "softcap": None, **settings}
        out = attend(paged.q_THD.to(device), k, v, batch, segments=segments, **asked)
        yield name, out, dense(paged, **asked), 2 * LOOSE[dtype]


def _empty(like: torch.Tensor, codec: str, scale: torch.Tensor, device: str) -> Pages:
    *shape, groups, width = like.shape
    if codec == "full":
        return Pages(torch.zeros(like.shape, dtype=like.dtype, device=device))
    of = CODECS[codec]
    codes = torch.zeros((*shape, groups, of.code_bytes(width)), dtype=code_dtype(codec), device=device)
    numbers = torch.zeros((*shape, groups, of.numbers), dtype=F16, device=device) if of.numbers else None
    return Pages(codes, codec, numbers, None if of.numbers else scale[:groups].to(device))


def norm(device: str = "cpu") -> Iterator[Case]:
    from runtime.ops.triton.norm import normalise

    for width in (1, 16, 100, 576, 1024):
        for rows in (1, 3):
            for dtype, plus_one in [(F32, False), (F32, True), (F16, True), (BF16, False)]:
                x = random(rows, 2 * width, dtype=dtype).to(device)[:, :width]
                weight = random(width, dtype=dtype, seed=1).to(device)
                wanted = normalise_reference(x, weight, 1e-5, plus_one)
                bound = wanted.abs().max().item() * torch.finfo(dtype).eps * (2 if dtype == BF16 else 4)
                yield f"{rows} x {width} {dtype} {plus_one}", normalise(x, weight, 1e-5, plus_one), wanted, bound
    x, weight = random(3, 4, 24).to(device), random(24, seed=1).to(device)
    wanted = normalise_reference(x, weight, 1e-5, False)
    yield "per head", normalise(x, weight, 1e-5, False), wanted, 2e-6


def rotary(device: str = "cpu") -> Iterator[Case]:
    from runtime.ops.triton.rotary import rotate_both

    for heads, groups, width, rotated in [(1, 1, 16, 16), (2, 1, 64, 64), (3, 1, 80, 32), (1, 1, 96, 96), (2, 1, 8, 2)]:
        for tokens, strided in [(1, False), (3, True)]:
            for dtype, wave_dtype in [(F32, F32), (F16, F32), (BF16, F32), (F16, F16)]:
                both = random(tokens, heads + groups, width, dtype=dtype).to(device)
                q, k = both[:, :heads], both[:, heads:]
                q, k = (q, k) if strided else (q.clone(), k.clone())
                wave = random(2, tokens, rotated, dtype=wave_dtype, seed=1).to(device)
                exact = [rotate_reference(x.double(), *wave.double()) for x in (q, k)]
                bound = 8 * torch.finfo(dtype).eps
                for x, out, wanted in zip("qk", rotate_both(q, k, *wave), exact, strict=True):
                    name = f"{x} {tokens} tokens {heads}/{groups} x {width}, {rotated} {dtype} {wave_dtype} {strided}"
                    yield name, out, wanted, bound


def far_pages(device: str = "cpu") -> Iterator[Case]:
    """Pools of more than 2^31 elements: their memory is never touched except where a page is used."""
    from runtime.ops.triton.attention import attend
    from runtime.ops.triton.kv_store import store

    paged = make([(20, 1), (5, 3)], heads=4, groups=2, width=64, dtype=F16)
    kind = {"scale": 0.125, "window": None, "softcap": None}
    paged.values = paged.keys  # one pool holds both
    wanted = dense(paged, **kind)
    pages = 2**31 // (16 * 2 * 64) + 8
    far = torch.empty(pages, 16, 2, 64, dtype=F16, device=device)
    for page in paged.batch.table_SP.unique().tolist():
        far[pages - 1 - page] = paged.k_PBGD[page].to(device)
    paged.batch.table_SP.apply_(lambda page: pages - 1 - page)
    there = paged.to(device)
    assert int(there.batch.table_SP.min()) * far.stride(0) > 2**31
    for segments in (1, 2):
        out = attend(there.q_THD, far, far, there.batch, segments=segments, **kind)
        yield f"attention, {segments} segments", out, wanted, LOOSE[F16]
    rows = random(2, 2, 64, dtype=F16).to(device)
    slots = torch.tensor([(pages - 1) * 16 + 15, (pages - 1) * 16 + 3], device=device)
    store(rows, rows, far, far, slots)
    yield "store", far.view(-1, 2, 64)[slots], rows, 0.0


# columns, rows, scheme, zeros
SWEEPS = [
    (columns, rows, scheme, zeros)
    for columns, rows in ((1, 1), (3, 17), (16, 16), (50, 5), (100, 40), (128, 33))
    for scheme, zeros in (
        (Scheme(4, 16), False), (Scheme(3, 16, symmetric=False), True), (Scheme(2, 16), False), (Scheme(8, 16), False),
        (Scheme(4, 16, dtype="nvfp4"), False),
    )
]  # fmt: skip


def sweep(device: str = "cpu") -> Iterator[Case]:
    """No twin beside it, whose ties may fall elsewhere: every code must be the nearest to what its column should be."""
    from compress.core.gpu.sweep import sweep_block

    for columns, rows, scheme, zeros in SWEEPS:
        floats = scheme.dtype != "int"
        width, groups = columns + 30, -(-(columns + 30) // 16)
        channel = torch.randperm(width, generator=torch.Generator().manual_seed(1))[:columns]
        original = random(columns, rows)
        keep_zeros = columns > 16
        original[random(columns, rows, seed=7) > 0.5] = 0  # which have to stay where that is asked for
        target = original + 0.1 * random(columns, rows, seed=2)
        feedback = 0.3 * random(columns, columns, seed=3)  # above the diagonal; the rest must not be read
        feedback += torch.full_like(feedback, torch.nan).tril()
        scale = random(groups, rows, seed=4).abs() * (3 / 2**scheme.bits) + 0.1
        zero = random(groups, rows, seed=5).mul(2).round().clamp(scheme.lowest, scheme.highest) if zeros else None
        group, cost, loss = channel // 16, random(columns, seed=6).square(), torch.ones(rows)
        error, codes = torch.zeros(columns, rows), torch.full((width, rows), 99, dtype=torch.int8)
        there = [
            None if each is None else each.to(device)
            for each in (target, original, feedback, scale, zero, group, channel, cost, error, codes, loss)
        ]
        names = "target_BR original_BR feedback_BB scale_GR zero_GR group_B channel_B cost_B error_BR codes_KR loss_R"
        levels = None if floats else (scheme.lowest, scheme.highest)
        sweep_block(**dict(zip(names.split(), there, strict=True)), levels=levels, keep_zeros=keep_zeros)
        error, codes, found_loss = (each.cpu() for each in there[-3:])
        untouched = torch.ones(width, dtype=torch.bool)
        untouched[channel] = False
        assert bool((codes[untouched] == 99).all())
        points = table(scheme.dtype) if floats else torch.arange(scheme.lowest, scheme.highest + 1).float()
        codes, scale = codes[channel], scale[group].double()
        zero = torch.zeros_like(scale) if zero is None else zero[group].double()
        chosen = ((table(scheme.dtype)[codes.int()] if floats else codes.double()) - zero) * scale
        should = target + feedback.triu(1).nan_to_num(0).double() @ error.double()
        distance = (should[..., None] - (points - zero[..., None]) * scale[..., None]).abs().amin(-1)
        worse = ((should - chosen).abs() - distance) / scale
        if keep_zeros:
            worse = torch.where(original == 0, chosen.abs(), worse)
        loss += ((should - chosen).square() * cost[:, None]).sum(0)
        result = torch.cat((error - (original - chosen), worse, (found_loss / loss - 1)[None]))
        yield f"{columns} x {rows} {scheme.name} {scheme.dtype} zeros {zeros}", result, torch.zeros_like(result), 1e-5


CASES = {
    "attention": attention, "low_bit": low_bit, "kv_store": kv_store, "norm": norm, "rotary": rotary, "sweep": sweep,
    "far_pages": far_pages, "coded": coded, "by_head": by_head, "frames": frames,
}  # fmt: skip


def error_of(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return (result.double().cpu() - wanted.double().cpu()).abs().max().item()


def main(kernels: list[str]) -> None:
    for kernel in kernels:
        for name, result, wanted, bound in CASES[kernel]():
            error = error_of(result, wanted)
            print(json.dumps({"kernel": kernel, "case": name, "error": error, "bound": bound}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
