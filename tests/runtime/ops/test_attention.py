"""Paged attention in torch: against dense attention, to the bit under any chunking, and in linear memory."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from compress.core.compiling import load
from compress.core.errors import EnvironmentRefused
from runtime.native.library import Library, library
from runtime.ops import attention_gathered
from runtime.ops.attention import AttentionBatch, paged_attention
from runtime.ops.backend import torch_only
from runtime.ops.kv_store import store_kv
from tests.runtime.ops.paged import dense, make

Route = Callable[..., torch.Tensor]
ROOT = Path(__file__).resolve().parents[3]

BATCHES = {
    "one token": [(0, 1)],
    "decode": [(40, 1)],
    "whole prompt": [(0, 37)],
    "chunk at a page's edge": [(16, 16)],
    "chunk in the middle of a page": [(21, 30)],
    "decodes of like lengths": [(33, 1), (47, 1), (48, 1), (60, 1)],
    "decodes of unlike lengths": [(0, 1), (3, 1), (300, 1), (17, 1), (299, 1)],
    "decodes and chunks": [(5, 1), (130, 1), (0, 9), (64, 40), (31, 1)],
    "past a tile of keys": [(120, 20), (127, 1), (128, 1), (0, 140)],
}
KINDS = {
    "plain": {},
    "window": {"window": 24},
    "window of one": {"window": 1},
    "window wider than all": {"window": 1000},
    "soft-cap": {"softcap": 2.0},
    "window and soft-cap": {"window": 50, "softcap": 1.5},
}
SHAPES = [(4, 4, 16, 16), (6, 2, 24, 16), (9, 3, 64, 16), (8, 1, 80, 32), (5, 5, 8, 1)]  # heads, groups, width, block


@pytest.fixture(params=["tiled", "gathered", "compiled", "compiled decodes"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Route]:
    """paged_attention by each of its ways on a CPU."""
    if request.param == "compiled decodes":
        monkeypatch.setattr(attention_gathered, "_FEW_SCORES", 0)  # all chunks are long
        monkeypatch.setattr(attention_gathered, "_FEW_QUERIES", 1)
    if request.param.startswith("compiled"):
        if shutil.which("gcc") is None:
            pytest.skip("needs a C compiler")
        assert library().loaded is not None, library().reason
        yield paged_attention
    else:
        with torch_only():
            yield partial(paged_attention, exact=request.param == "tiled")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_dense_attention(name: str, kind: str, route: Route) -> None:
    for heads, groups, width, block in (SHAPES[1], SHAPES[4]) if len(BATCHES[name]) > 1 else SHAPES:
        paged = make(BATCHES[name], heads=heads, groups=groups, width=width, block=block, seed=len(name))
        out = route(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=width**-0.5, **KINDS[kind])
        wanted = dense(paged, scale=width**-0.5, **KINDS[kind])
        assert (out - wanted).abs().max() < 2e-6


def test_takes_strided_queries(route: Route) -> None:
    """q is often a slice of one joint projection of q, k and v."""
    paged = make([(5, 1), (3, 8), (0, 5)], heads=4, groups=2, width=16)
    joint = torch.zeros(len(paged.q_THD), 4 * 16 + 40)
    joint[:, 8:72] = paged.q_THD.flatten(1)
    q_THD = joint[:, 8:72].view(-1, 4, 16)
    out = route(q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=0.3)
    assert torch.equal(out, route(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_dense(dtype: torch.dtype) -> None:
    paged = make(BATCHES["decodes and chunks"], dtype=dtype)
    for settings in KINDS.values():
        out = paged_attention(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=0.25, **settings)
        assert out.dtype == dtype
        wanted = dense(paged, scale=0.25, **settings)
        assert (out - wanted).abs().max() < 8 * torch.finfo(dtype).eps


class Stories:
    """Sequences whose tokens are fed to attention in any chunks, several sequences a step, each in pages of its own."""

    def __init__(self, lengths: list[int], heads: int, groups: int, width: int, block: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block = block
        self.lengths = lengths
        self.q = [torch.randn(length, heads, width, generator=generator) for length in lengths]
        self.kv = [torch.randn(2, length, groups, width, generator=generator) for length in lengths]
        self.shape = (block, groups, width)

    def run(self, chooser: random.Random, most_together: int, settings: dict) -> list[torch.Tensor]:
        """Attention of every token, in random chunks of random sequences per step."""
        needed = [-(-length // self.block) for length in self.lengths]
        pages = list(range(sum(needed)))
        chooser.shuffle(pages)
        tables = [[pages.pop() for _ in range(count)] for count in needed]
        pools = torch.full((2, sum(needed), *self.shape), torch.nan)
        done = [0] * len(self.lengths)
        out = [torch.full_like(q, torch.nan) for q in self.q]
        while open_ := [s for s, length in enumerate(self.lengths) if done[s] < length]:
            chosen = chooser.sample(open_, min(len(open_), chooser.randint(1, most_together)))
            counts = [min(self.lengths[s] - done[s], chooser.choice([1, 1, 2, 7, 8, 50, 1000])) for s in chosen]
            starts = [done[s] for s in chosen]
            batch = AttentionBatch.build(starts, counts, starts, [tables[s] for s in chosen], block_size=self.block)
            spans = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
            k, v = (
                torch.cat([self.kv[s][which, span] for s, span in zip(chosen, spans, strict=True)]) for which in (0, 1)
            )
            store_kv(k, v, pools[0], pools[1], batch.slot_T)
            q = torch.cat([self.q[s][span] for s, span in zip(chosen, spans, strict=True)])
            result = paged_attention(q, pools[0], pools[1], batch, **settings)
            for s, span, part in zip(chosen, spans, result.split(counts), strict=True):
                out[s][span] = part
                done[s] = span.stop
        return out


CUTS = [(shape, kind, 1) for shape in SHAPES for kind in ("plain", "window", "soft-cap")]
CUTS += [(shape, "plain", 2) for shape in SHAPES[:2]]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "kind", "number"), CUTS)
def test_exact_rows_depend_on_nothing_else(shape: tuple[int, int, int, int], kind: str, number: int) -> None:
    """Chunking, batching, neighbours, threads and the places of pages leave every bit as it is."""
    stories = Stories([1, 9, 150, 270, 33], *shape, seed=sum(shape))
    settings = {"scale": shape[2] ** -0.5, "exact": True, **KINDS[kind]}
    with threads(1):
        alone = stories.run(random.Random(0), 1, settings)
    with threads(number):
        for seed in range(1, 4):
            for one, other in zip(alone, stories.run(random.Random(seed), 5, settings), strict=True):
                assert torch.equal(one, other)


def test_exact_in_large_batches_of_decodes() -> None:
    paged = make([(n % 200, 1) for n in range(70)], heads=6, groups=2, width=32)
    settings = {"scale": 0.2, "exact": True}
    together = paged_attention(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, **settings)
    for s in (0, 3, 31, 32, 69):
        start, table = n_and_table(paged.batch, s)
        batch = AttentionBatch.build([start], [1], [start], [table], block_size=16)
        alone = paged_attention(paged.q_THD[s : s + 1], paged.k_PBGD, paged.v_PBGD, batch, **settings)
        assert torch.equal(alone[0], together[s])


def n_and_table(batch: AttentionBatch, sequence: int) -> tuple[int, list[int]]:
    return batch.kv_len[sequence] - 1, batch.table_SP[sequence].tolist()


def test_broken_keys_of_one_sequence_stay_with_it(route: Route) -> None:
    """NaN in one sequence's values, beside the NaN that fills unused slots, reaches no other sequence."""
    paged = make([(30, 1), (31, 1), (20, 5), (40, 1)])
    broken = paged.batch.table_SP[1, 0]
    paged.v_PBGD[broken] = torch.nan
    out = route(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=0.25)
    nan = out.isnan().flatten(1).any(1)
    assert nan.tolist() == [False, True] + [False] * 6


def test_compiled_decodes_depend_on_nothing_else() -> None:
    """Long enough for several segments."""
    paged = make([(2500, 1), (30, 1), (1023, 1), (1024, 1)], heads=6, groups=2, width=20)
    pools = paged.k_PBGD, paged.v_PBGD
    for number in (1, 2):
        with threads(number):
            together = paged_attention(paged.q_THD, *pools, paged.batch, scale=0.2)
        for s, (start, _) in enumerate(paged.parts):
            table = paged.batch.table_SP[s].tolist()
            alone = AttentionBatch.build([start], [1], [start], [table], block_size=16)
            assert torch.equal(paged_attention(paged.q_THD[s : s + 1], *pools, alone, scale=0.2)[0], together[s])
    assert (together - dense(paged, scale=0.2)).abs().max() < 2e-6


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    library.cache_clear()
    try:
        assert library() == Library(None, "there is no C compiler")
        paged = make(BATCHES["decodes and chunks"])
        out = paged_attention(paged.q_THD, paged.k_PBGD, paged.v_PBGD, paged.batch, scale=0.25)
        assert (out - dense(paged, scale=0.25)).abs().max() < 2e-6
    finally:
        library.cache_clear()


def test_c_that_does_not_compile_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int f( {")
    with pytest.raises(EnvironmentRefused, match="fails"):
        load(tmp_path)


MEASURE = """
import json, resource, sys
import torch
from runtime.ops.attention import AttentionBatch, paged_attention
length, exact, settings = json.loads(sys.argv[1])
torch.set_num_threads(1)
pages = length // 16
table = torch.randperm(pages).tolist()
pool = torch.randn(pages, 16, 1, 16)
q = torch.randn(length, 2, 16)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def attend(stored, new):
    batch = AttentionBatch.build([stored], [new], [stored], [table], block_size=16)
    paged_attention(q[:new], pool, pool, batch, scale=0.2, exact=exact, **settings)
attend(0, 64)
before = peak()
attend(0, length)
attend(length - 700, 700)
print(peak() - before)
"""


@pytest.mark.parametrize(("kind", "exact"), [("plain", True), ("plain", False), ("window and soft-cap", False)])
def test_memory_is_linear_in_length(kind: str, exact: bool) -> None:
    """8192 queries over 8192 keys: an fp32 matrix of all scores would take 512 MiB; q takes 1 MiB."""
    arguments = json.dumps([8192, exact, KINDS[kind]])
    command = [sys.executable, "-c", MEASURE, arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 80 * 2**20


def test_a_table_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 2 pages for 33 slots"):
        AttentionBatch.build([0, 32], [1, 1], [0, 32], [[0], [1, 2]], block_size=16)
    with pytest.raises(ValueError, match="at least one token"):
        AttentionBatch.build([0, 4], [1, 0], [0, 4], [[0], [1]], block_size=16)
