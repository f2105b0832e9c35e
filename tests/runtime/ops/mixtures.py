"""Batches over frames, of which some are coded pages, and dense attention over what lies in them.

Imports nothing but torch and the product's pages, so that it also serves tests that run without pytest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_compress.policy import CODECS
from runtime.ops.batch import AttentionBatch
from runtime.ops.coded_pages import CodedPages, Frames
from runtime.ops.pages import Pages
from tests.runtime.ops.paged import Paged, make

BLOCK, SINKS, RECENT = 4, 4, 6
KINDS = {  # codec, per channel; of keys and of values
    "int4": (("int4", True), ("int4", False)),
    "int8": (("int8", True), ("int8", False)),
    "int8 int4": (("int8", True), ("int4", False)),
    "tokens": (("int8", False), ("fp8", False)),
    "full": (("full", False), ("int4", False)),
}


def mixture(
    parts: Sequence[tuple[int, int]],
    kind: str,
    *,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    page_tokens: int = 20,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Paged, Pages, Pages, AttentionBatch]:
    """Random sequences (stored, new), their blocks coded as far as RECENT tokens lay behind them before the new ones;
    `dense` of the first result sees what the codes mean. Frames lie in random order, what nobody wrote is NaN."""
    paged = make(parts, heads=heads, groups=groups, width=width, block=BLOCK, dtype=dtype, seed=len(kind) + width)
    generator = torch.Generator().manual_seed(1)
    counts = [max(0, (stored - SINKS - RECENT) // page_tokens) for stored, _ in parts]
    slots = [stored - coded * (page_tokens - BLOCK) for (stored, _), coded in zip(parts, counts, strict=True)]
    needed = [-(-(of + new) // BLOCK) for of, (_, new) in zip(slots, parts, strict=True)]
    ids = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    sides = [_side(len(ids), page_tokens, of, groups, width, dtype, device) for of in KINDS[kind]]
    frames = Frames(len(ids), BLOCK, page_tokens, SINKS)
    tables, seen = [], ([], [])
    for s, coded in enumerate(counts):
        table = [ids.pop() for _ in range(needed[s])]
        tables.append(table)
        end = SINKS + coded * page_tokens  # of what is coded
        for side, x_KGD, found in zip(sides, (paged.keys[s], paged.values[s]), seen, strict=True):
            mean_KGD = x_KGD.clone()
            for index in range(coded):
                begin, frame = SINKS + index * page_tokens, table[SINKS // BLOCK + index]
                side.coded.write(x_KGD[begin : begin + page_tokens].to(device), frame)
                places = torch.arange(page_tokens, device=device) + frame * page_tokens
                mean_KGD[begin : begin + page_tokens] = side.coded.read(places).to(mean_KGD)
            at = torch.tensor([*range(min(SINKS, len(x_KGD))), *range(end, len(x_KGD))])
            slot = torch.where(at < SINKS, at, at - coded * (page_tokens - BLOCK))
            side.codes[torch.tensor(table)[slot // BLOCK].to(device), slot.to(device) % BLOCK] = x_KGD[at].to(device)
            found.append(mean_KGD)
    stored, new = zip(*parts, strict=True)
    batch = AttentionBatch.build(stored, new, slots, tables, block_size=BLOCK, device=device, frames=frames)
    return replace(paged, keys=seen[0], values=seen[1]), *sides, batch


def _side(
    pages: int, tokens: int, kind: tuple[str, bool], groups: int, width: int, dtype: torch.dtype, device: str
) -> Pages:
    """Keys or values of a layer, in the midst of frames that hold more."""
    codec, channels = kind
    of = CODECS.get(codec)
    shapes = [((BLOCK, groups, width), dtype)]
    if of is None:
        shapes.append(((tokens, groups, width), dtype))
    else:
        codes = torch.uint8 if channels or codec != "int8" else torch.int8
        shapes.append(((tokens, groups, of.code_bytes(width)), codes))
        if of.numbers:
            shapes.append(((2, groups, width) if channels else (tokens, groups, of.numbers), torch.float16))
    sizes = [kind.itemsize * torch.Size(shape).numel() for shape, kind in shapes]
    memory = torch.full((pages, 64 + max(sizes[0], sum(sizes[1:])) // 64 * 64 + 64), 255, dtype=torch.uint8)
    memory = memory.to(device)

    def view(begin: int, index: int) -> torch.Tensor:
        shape, kind = shapes[index]
        return memory[:, begin : begin + sizes[index]].view(kind).unflatten(1, shape)

    full, codes = view(32, 0), view(32 + (0 if len(shapes) < 3 else sizes[2]), 1)
    scale_G = torch.tensor([0.01, 0.02, 0.01])[:groups].to(device) if codec == "fp8" else None
    return Pages(full, coded=CodedPages(codes, codec, view(32, 2) if len(shapes) > 2 else None, scale_G, channels))
