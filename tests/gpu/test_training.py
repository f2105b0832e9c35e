"""Settings of training that need a GPU to show what they do. Needs transformers, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pydantic")


def train(place: Path, **settings: Any) -> tuple[list[float], int]:
    """The losses of some steps from another model's start, and the most bytes that the GPU held."""
    from compress.core.checkpoint import Checkpoint
    from compress.core.passes import Job
    from distill._batches import Batch
    from distill._logits import online_loss
    from distill._student import Student
    from distill._trainer import precision
    from distill.logits import Logits
    from tests.contracts.shelf import Shelf
    from tests.tiny import build

    if not place.exists():
        build(place / "student", "llama", seed=0)
        build(place / "teacher", "llama", seed=1)
    asked = Logits(learning_rate=1e-2, **settings)
    torch.cuda.reset_peak_memory_stats()
    student = Student(Job(Checkpoint.open(place / "student"), None, Shelf(), device="cuda"), asked)
    teacher = Checkpoint.open(place / "teacher").build_model(torch.float32, "cuda")
    loss, device = online_loss(asked.loss, student.model, teacher), torch.device("cuda")
    ids = torch.arange(8 * 128).view(8, 128) % 256
    for number in range(12):
        with precision(asked, device):
            value = loss(Batch(ids, ids.roll(-1, 1)))
        value.backward()
        student.update(number, 12, float(value.detach()))
    return student.losses, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16"}, {"checkpointing": True}, {"optimizer": "adamw8bit"}],
    ids=lambda settings: next(iter(settings)),
)
def test_losses_fall_as_without(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> None:
    if "optimizer" in settings:
        pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.getbasetemp() / "training"
    plain, held = train(place)
    losses, less = train(place, **settings)
    assert plain[-1] < 0.8 * plain[0]
    assert losses == pytest.approx(plain, rel=0.05)
    if "checkpointing" in settings:
        assert less < held
