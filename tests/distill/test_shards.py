"""Several processes that each hold a part of the student: they train like one, and go on to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.files import sha256_file
from compress.core.processes import Processes
from compress.core.quantities import format_bytes
from compress.pipeline import RunOptions, run
from distill import _memory
from distill._batches import NO_TARGET, Batch
from distill._cache_settings import Cache
from distill._memory import parameters_of
from distill._trainer import parts_of
from distill.features import Features
from distill.logits import Logits
from distill.recover import Recover
from tests.conftest import TinyModel
from tests.contracts.shelf import tokens_for
from tests.distill.test_logits import Losses, lessons, recipe_of
from tests.distill.test_scale import losses_in, processes, said_by

SETTINGS = {"rows_at_once": 2, "batch": 5, "clip": 0.05, "shard": True}
STAGES = {"prune": {"method": "wanda", "pattern": "2:4"}}, lessons(7, **SETTINGS)
COMPLETING = {"method": "sequence", "loss": "logits", "prompt_tokens": 8, "new_tokens": 12, "tokens": 300}
WRITTEN = STAGES[0], lessons(3, **SETTINGS | COMPLETING)
THRICE = """
import json, os, signal, sys
from compress.core.processes import current
from compress.core.recipe import load_recipe
from compress.core.workers import serve
from compress.pipeline import RunOptions, run
from distill._student import Student
from pathlib import Path
resume, update, steps = Student.resume, Student.update, []
def counted(self):
    if current().rank: print(sum(value.numel() for value in self._trained.values()), flush=True)
    return resume(self)
def killed(self, step, total, loss):
    update(self, step, total, loss)
    steps.append(step)
    if not current().rank: print(json.dumps({"name": "loss", "value": loss}), flush=True)
    if current().rank and len(steps) == 13:
        os.kill(os.getpid(), signal.SIGKILL)
Student.resume, Student.update = counted, killed
if current().rank:
    sys.exit(serve())
run(load_recipe("written.yaml"), RunOptions(Path("written")))
recipe = load_recipe("recipe.yaml")
run(recipe, RunOptions(Path("whole")))
run(recipe, RunOptions(Path("two")))
"""


def require_alike(*folders: Path) -> None:
    """The same zeros, and the same weights but for rounding."""
    one, two = map(Checkpoint.open, folders)
    for name in one.tensors:
        assert torch.allclose(one.tensor(name), two.tensor(name), atol=1e-3, rtol=0.01), name
        assert torch.equal(one.tensor(name) == 0, two.tensor(name) == 0), name


def test_a_model_in_parts_trains_like_a_whole_one_though_a_process_was_killed(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    written, alone = Losses(), Losses()
    experts, model = tiny_model("qwen3_moe"), tiny_model("llama", False, "bfloat16")
    by_experts = run(recipe_of(tmp_path, experts, *WRITTEN), RunOptions(tmp_path / "alone-written"), written).artifact
    artifact = run(recipe_of(tmp_path, model, *STAGES), RunOptions(tmp_path / "alone"), alone).artifact
    text = {"calibration": {"dataset": "text.txt", "samples": 6, "length": 32}}
    for name, source, stages in (("recipe", model, STAGES), ("written", experts, WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(text | {"model": str(source), "stages": stages}))

    started = processes(tmp_path, f"-c {THRICE}", f"-c {THRICE}")
    first, other = said_by(started)
    assert started[1].returncode == -signal.SIGKILL, (first, other)
    assert "another process of this run has ended" in first[1]
    held = [int(line) for line in other[0].splitlines()]
    assert held == [parameters_of(Checkpoint.open(each)) // 2 for each in (experts, model, model)]
    assert losses_in(first[0]) == pytest.approx(written.values + alone.values + alone.values[:4], abs=1e-5)
    require_alike(by_experts, tmp_path / "written")

    again, _ = said_by(processes(tmp_path, "-m compress", "-m compress"))
    assert losses_in(again[0]) == pytest.approx(alone.values[3:], abs=1e-5), again
    require_alike(artifact, tmp_path / "two")
    whole = {path.name: sha256_file(path) for path in (tmp_path / "whole").iterdir()}
    assert whole == {path.name: sha256_file(path) for path in (tmp_path / "two").iterdir()}


def test_all_processes_gather_as_often_as_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rows in range(1, 12):
        ids_BT = torch.arange(rows)[:, None].repeat(1, 4)
        batch, settings = Batch(ids_BT, ids_BT), Logits(rows_at_once=2, shard=True)
        found = [list(parts_of(batch, settings, Processes(rank, 3))) for rank in range(3)]
        assert len({len(parts) for parts in found}) == 1
        targets = torch.cat([part.target_BT[:, 0] for parts in found for part in parts])
        assert sorted(targets[targets != NO_TARGET].tolist()) == list(range(rows))


def test_what_cannot_be_cut_up_is_refused_by_name(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    tokens = tokens_for(checkpoint, 16, 32)
    with pytest.raises(UsageError, match="features does not cut a model up"):
        Features(shard=True).plan(checkpoint, tokens)
    with pytest.raises(UsageError, match="recover does not cut a model up"):
        Recover(shard=True).plan(checkpoint, tokens)
    with pytest.raises(UsageError, match="one process trains"):
        Logits(shard=True, cache=Cache()).plan(checkpoint, tokens)
    assert any("there is one" in said for said in Logits(shard=True).plan(checkpoint, tokens).notices)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="8 bits are not cut up") as refused:
        Logits(shard=True, optimizer="adamw8bit").plan(checkpoint, tokens)
    assert "hold 4 bytes a parameter each" in refused.value.hint
    assert not Features().sharded and not Logits().sharded
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Logits().sharded
    assert "does not cut a model up" in Features().plan(checkpoint, tokens).notices[-1]


def test_the_plan_counts_a_part_for_each_process(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    tokens, numbers = tokens_for(checkpoint, 16, 32), 10 * parameters_of(checkpoint)
    monkeypatch.setattr(_memory, "parameters_of", lambda _: numbers)
    monkeypatch.setattr(_memory, "block_numbers", lambda _: [numbers // 10] * 9)
    alone = Logits().plan(checkpoint, tokens).peak_memory_bytes
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    whole, part = (Logits(shard=shard).plan(checkpoint, tokens) for shard in (False, True))
    assert whole.peak_memory_bytes == 2 * alone
    assert dict(whole.leaner)["shard: true"] == part.peak_memory_bytes
    saved = (16 - 16 / 4 - 20 / 10 - 12 / 10) * numbers  # the student
    saved += 4 * (9 / 10) * (3 / 4) * numbers  # the teacher's blocks
    assert whole.peak_memory_bytes - part.peak_memory_bytes == pytest.approx(2 * saved, rel=1e-3)
    each = (
        f"each of 4 processes trains a part of the student and takes up to {format_bytes(part.peak_memory_bytes // 2)}"
    )
    assert each in part.notices
    assert "shard: true" not in dict(Logits(optimizer="adamw8bit").plan(checkpoint, tokens).leaner)
