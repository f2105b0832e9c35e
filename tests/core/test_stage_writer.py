"""A stage's folder: blocks come back as they were given, in order, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError
from compress.core.grid import fit_grid
from compress.core.journal import Journal
from compress.core.scheme import Scheme
from compress.core.stage_writer import StageWriter
from compress.core.tensors import QuantTensor
from compress.core.walk import BlockRecord, SiteRecord


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(tiny_model(dtype="bfloat16"))


def writer(folder: Path, source: Checkpoint, *, rounds: bool = True, format: str = "compressed-tensors") -> StageWriter:
    journal = Journal(folder / "journal.jsonl", {"test": 1})
    return StageWriter(
        folder / "stage", journal=journal, stage=0, source=source, original=source, rounds=rounds, format=format
    )


def record(index: int, source: Checkpoint) -> BlockRecord:
    site = SiteRecord(source.sites(index)[0], "rtn", bits=3, error=0.1 + 0.2, fallback="too few tokens", retries=2)
    return BlockRecord(index, source.block_name(index), 1e-3, (site,))


def quantized(shape: tuple[int, int], scheme: Scheme, seed: int) -> QuantTensor:
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    codes = torch.randint(scheme.lowest, scheme.highest + 1, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, scheme.groups_in(width), generator=generator).add(0.1).to(torch.bfloat16)
    zero = None if scheme.symmetric else codes[:, : scheme.groups_in(width)].contiguous()
    return QuantTensor.from_codes(codes, scale, zero, scheme)


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3, 32, symmetric=False), Scheme(8, -1, activation_bits=8)])
def test_a_block_comes_back_as_it_was_given(tmp_path: Path, source: Checkpoint, scheme: Scheme) -> None:
    site, other, *_ = source.sites(0)
    given: dict[str, torch.Tensor | QuantTensor] = {
        site: quantized(tuple(source.tensors[f"{site}.weight"].shape), scheme, 1),
        f"{other}.weight": torch.full(source.tensors[f"{other}.weight"].shape, 0.5, dtype=torch.bfloat16),
    }
    writer(tmp_path, source).commit(0, given, record(0, source))
    again = writer(tmp_path, source)
    assert again.finished() == 1
    assert again.record(0) == record(0, source)
    stored = again.load(0)
    assert stored.keys() == given.keys()
    before, after = given[site], stored[site]
    assert isinstance(before, QuantTensor) and isinstance(after, QuantTensor)
    assert after.scheme == before.scheme and torch.equal(after.codes(), before.codes())
    assert torch.equal(after.dequantize(), before.dequantize())
    assert torch.equal(stored[f"{other}.weight"], given[f"{other}.weight"])


@pytest.mark.parametrize("double", [False, True])
def test_nf4_comes_back_in_bitsandbytes_format(tmp_path: Path, source: Checkpoint, double: bool) -> None:
    site = source.sites(0)[0]
    weight = source.weight(site, torch.float32)
    given = fit_grid(weight, Scheme(4, 64, dtype="nf4"), scale_dtype=torch.bfloat16).round(weight)
    given = given.with_nested_scales() if double else given
    writer(tmp_path, source, format="bitsandbytes").commit(0, {site: given}, record(0, source))
    stored = writer(tmp_path, source, format="bitsandbytes").load(0)[site]
    assert isinstance(stored, QuantTensor) and stored.scheme == given.scheme
    assert torch.equal(stored.packed, given.packed) and torch.equal(stored.scale, given.scale)
    assert stored.scale.dtype == given.scale.dtype and (stored.nested is None) != double


def test_what_was_not_given_is_as_in_the_source(tmp_path: Path, source: Checkpoint) -> None:
    stage = writer(tmp_path, source)
    for index in range(source.num_blocks):
        stage.commit(index, {}, record(index, source))
    files = stage.finish()
    written = Checkpoint.open(tmp_path / "stage")
    assert written.tensors.keys() == source.tensors.keys()
    for name, info in source.tensors.items():
        assert written.tensors[name].dtype == info.dtype
        assert torch.equal(written.tensor(name), source.tensor(name))
    index = json.loads((tmp_path / "stage" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.bytes for info in source.tensors.values())
    assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}


@pytest.mark.parametrize("rounds", [True, False])
def test_only_a_rounding_stage_gives_the_originals_dtype(tmp_path: Path, source: Checkpoint, rounds: bool) -> None:
    name = f"{source.sites(0)[0]}.weight"
    stage = writer(tmp_path, source, rounds=rounds)
    stage.commit(0, {name: torch.full(source.tensors[name].shape, 1 / 3)}, record(0, source))
    stored = stage.load(0)[name]
    assert isinstance(stored, torch.Tensor)
    assert stored.dtype == (torch.bfloat16 if rounds else torch.float32)


def test_blocks_come_in_order_and_all_of_them(tmp_path: Path, source: Checkpoint) -> None:
    stage = writer(tmp_path, source)
    with pytest.raises(ArtifactError, match="block 1 was committed where block 0 is due"):
        stage.commit(1, {}, record(1, source))
    stage.commit(0, {}, record(0, source))
    with pytest.raises(ArtifactError, match="1 of 3 blocks are written"):
        stage.finish()
