"""What lets training scale: memory for time, fewer bits, several processes; and a plan that knows of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import ResourceError, UsageError
from compress.core.passes import Job
from compress.core.processes import end_with_launcher, require_launched
from compress.pipeline import RunOptions, run
from distill._batches import Batch
from distill._logits import hidden_states, online_loss
from distill._optimizers import Optimizer
from distill._student import Student
from distill._trainer import precision
from distill.logits import Logits
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for
from tests.distill.test_logits import CUT, Losses, lessons, recipe_of, require_the_same_after_a_stop

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RUN = ["run", "--recipe", "recipe.yaml", "-o", "two", "--json", "--device", "cpu"]
KILLED = """
import os, signal
from distill._student import Student
update = Student.update
def killed(self, step, total, loss):
    update(self, step, total, loss)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Student.update = killed
from compress.cli import main
main()
"""


def step(model: Path, **settings: Any) -> tuple[Student, torch.Tensor, int]:
    """A student with the gradients of one batch, the loss, and the bytes kept for the way back."""
    asked, checkpoint = Logits(**settings), Checkpoint.open(model)
    student = Student(Job(checkpoint, None, Shelf()), asked)
    teacher = checkpoint.build_model(torch.float32)
    ids = tokens_for(checkpoint, 4, 64).ids
    kept: dict[int, int] = {}
    weights = {value.untyped_storage().data_ptr() for value in student.model.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    targets = ids.roll(-1, 1)
    with precision(asked, torch.device("cpu")):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            hidden_states(student.model, ids)
        with torch.no_grad():
            teacher.model.embed_tokens.weight.mul_(1.5)
        loss = online_loss(asked.loss, student.model, teacher)(Batch(ids, targets))
    loss.backward()
    return student, loss.detach(), sum(kept.values())


def gradients(student: Student) -> torch.Tensor:
    return torch.cat([value.grad.flatten() for value in student.model.parameters()])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_checkpointing_keeps_less_and_changes_nothing(tiny_model: TinyModel, family: str) -> None:
    plain, loss, held = step(tiny_model(family))
    other, same_loss, less = step(tiny_model(family), checkpointing=True)
    assert torch.allclose(loss, same_loss, rtol=1e-6)
    assert torch.allclose(gradients(plain), gradients(other), rtol=1e-4, atol=1e-6)
    assert less < 0.25 * held


def test_bf16_is_of_the_products_alone(tiny_model: TinyModel) -> None:
    plain, loss, _ = step(tiny_model())
    other, near, _ = step(tiny_model(), precision="bf16")
    assert near.dtype == torch.float32 and near != loss
    assert float(near) == pytest.approx(float(loss), rel=0.02)
    assert {value.dtype for value in other.model.parameters()} == {torch.float32}
    cosine = torch.cosine_similarity(gradients(plain), gradients(other), dim=0)
    assert 0.99 < float(cosine) < 0.99999


def test_moments_of_8_bits_begin_like_adamw_and_take_a_quarter() -> None:
    found = {}
    for name in ("adamw", "adamw8bit"):
        generator = torch.Generator().manual_seed(0)
        trained = {
            key: torch.nn.Parameter(torch.randn(*shape, generator=generator))
            for key, shape in {"matrix": (96, 64), "norm": (64,)}.items()
        }
        optimizer = Optimizer(Logits(optimizer=name, weight_decay=0.1), trained)
        for value in trained.values():
            value.grad = torch.randn(value.shape, generator=generator)
        optimizer.step(1e-2)
        states = dict(optimizer.state("matrix"))
        found[name] = [value.detach().clone() for value in trained.values()], states
    first, second = (found[name][0] for name in ("adamw", "adamw8bit"))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(first, second, strict=True))
    moments = found["adamw8bit"][1]
    assert moments["state1.matrix"].dtype == moments["state2.matrix"].dtype == torch.uint8
    assert sum(moments[f"{key}.matrix"].nbytes for key in ("state1", "state2", "absmax1", "absmax2")) < 2.1 * 96 * 64


def test_all_settings_together_stop_and_go_on_to_the_bit(tiny_model: TinyModel, tmp_path: Path) -> None:
    settings = lessons(7, optimizer="adamw8bit", precision="bf16", checkpointing=True)
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), CUT, settings)
    require_the_same_after_a_stop(recipe, tmp_path)


def test_what_does_not_fit_is_told_what_would(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", False, "bfloat16")
    settings, checkpoint = Logits(rows_at_once=32), Checkpoint.open(folder)
    plan = settings.plan(checkpoint, tokens_for(checkpoint, 32, 256))
    less = dict(plan.leaner)
    assert plan.peak_memory_bytes > less["optimizer: adamw8bit"] > less["checkpointing: true"] > less["rows_at_once: 1"]
    numbers = sum(info.bytes for info in checkpoint.tensors.values()) // 2
    both = less["rows_at_once: 1 and checkpointing: true"]
    assert both - less["rows_at_once: 1 and checkpointing: true and optimizer: adamw8bit"] == pytest.approx(
        6 * numbers - 4 * 4 * 320 * 64, abs=1
    )
    recipe = recipe_of(tmp_path, folder, lessons(2, rows_at_once=64))
    short = Logits(rows_at_once=64).plan(checkpoint, tokens_for(checkpoint, 4, 32)).peak_memory_bytes - 1
    with pytest.raises(ResourceError) as refused:
        run(recipe, RunOptions(tmp_path / "out", max_memory_bytes=short))
    assert "or set rows_at_once: 1 in stages[0], which then needs about 3" in refused.value.hint


def processes(place: Path, *scripts: str) -> list[subprocess.Popen[str]]:
    """Processes as a launcher would start them, each with its own arguments of Python."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(len(scripts))
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *script.split(" ", 1), *RUN],
            env=os.environ | ALONE | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, script in enumerate(scripts)
    ]


def said_by(started: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    try:
        return [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()


class Finalized:
    """Told to end while it is being freed."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("inside", [False, True])
def test_a_launcher_that_ends_the_run_is_heard(inside: bool) -> None:
    """Where an exception would be lost, it comes a moment later."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        end_with_launcher()
        with pytest.raises(ResourceError, match="the launcher has ended this run"):
            if inside:
                Finalized()
                time.sleep(30)
            else:
                signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_process_in_place_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_launched()
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="starts one process, however many"):
        require_launched()
    monkeypatch.setenv("RANK", "0")
    require_launched()


def losses_in(output: str) -> list[float]:
    events = [json.loads(line) for line in output.splitlines()]
    return [event["value"] for event in events if event.get("name") == "loss"]


def test_two_processes_train_like_one_though_one_was_killed(tiny_model: TinyModel, tmp_path: Path) -> None:
    stages = CUT, lessons(7, rows_at_once=2, batch=5)
    alone = Losses()
    artifact = run(recipe_of(tmp_path, tiny_model(), *stages), RunOptions(tmp_path / "alone"), alone).artifact
    text = {"model": str(tiny_model()), "calibration": {"dataset": "text.txt", "samples": 6, "length": 32}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(text | {"stages": stages}))

    started = processes(tmp_path, "-m compress", f"-c {KILLED}")
    first, other = said_by(started)
    assert [process.returncode for process in started] == [ResourceError.exit_code, -signal.SIGKILL], (first, other)
    assert losses_in(first[0]) == pytest.approx(alone.values[:4], abs=1e-5)
    end = json.loads(first[0].splitlines()[-1])
    assert "another process of this run has ended" in json.dumps(end)

    command = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 -m compress"
    again = subprocess.run(
        [sys.executable, *command.split(), *RUN],
        env=os.environ | ALONE,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert again.returncode == 0, again
    assert losses_in(again.stdout) == pytest.approx(alone.values[3:], abs=1e-5)
    one, two = Checkpoint.open(artifact), Checkpoint.open(tmp_path / "two")
    assert all(torch.allclose(one.tensor(name), two.tensor(name), atol=1e-4) for name in one.tensors)
