"""The student: a model in fp32 with its optimizer, a state that can be saved and gone on from, and masks that hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.core.passes import Job
from compress.core.safetensors_layout import tensor_entry
from compress.core.saves import Save
from distill._blocks import prepare_blocks
from distill._optimizers import Optimizer, equally
from distill._shards import Shards

if TYPE_CHECKING:
    from distill._batches import Batch
    from distill._settings import Training
    from distill._trainer import BatchLoss


class Student:
    """What is trained: the parameters of the model, and those of `extra`, which end with the training. Zeros of a
    masked model stay zeros. With `instead` the model is frozen, and what that function makes of it is trained; `share`
    of each of these is its learning rate over that of the settings."""

    def __init__(
        self,
        job: Job,
        settings: Training,
        extra: Mapping[str, nn.Parameter] | None = None,
        *,
        instead: Callable[[Any], Mapping[str, nn.Parameter]] | None = None,
        share: Callable[[str], float] = equally,
    ) -> None:
        self._settings = settings
        self._saves = job.saves
        self._processes = job.processes
        self._checkpoint = job.checkpoint
        self.shards = Shards(job.checkpoint, job.processes, job.device) if settings.sharded else None
        if self.shards is not None:
            self.model, own = self.shards.model, self.shards.own
        else:
            self.model = job.checkpoint.build_model(torch.float32, job.device).requires_grad_(instead is None)
            own = dict(self.model.named_parameters() if instead is None else instead(self.model))
        self._trained: dict[str, Tensor] = {**own, **(extra or {})}
        masked = job.checkpoint.kind == "masked" and instead is None
        self._masks = {name: value.detach() != 0 for name, value in own.items() if masked and value.ndim > 1}
        self._optimizer = Optimizer(settings, self._trained, share)
        prepare_blocks(settings, self.model, job.checkpoint.architecture)
        self.losses: list[float] = []
        self.figures: dict[str, list[float]] = {}

    def resume(self) -> int:
        """Take up the newest save; gives the steps that are done."""
        found = self._saves.latest() if self._saves is not None else None
        data, _ = self._processes.share(lambda: (_progress(found), {}))
        if data["step"]:
            with torch.no_grad():
                for name, value in self._trained.items():
                    self._take_up(name, value, data["step"], {} if found is None else found.tensors)
        self.losses = list(data["losses"])
        self.figures = {name: list(values) for name, values in data["figures"].items()}
        return data["step"]

    def _take_up(self, name: str, value: Tensor, step: int, saved: Mapping[str, Tensor]) -> None:
        """What the main process has saved of one of the tensors."""
        keys = (name, *self._optimizer.keys(name))
        _, tensors = self._processes.share(lambda: ({}, {key: saved[key] for key in keys if key in saved}))
        if self.shards is not None:
            tensors = {key: self.shards.part(each) for key, each in tensors.items()}
        value.copy_(tensors[name])
        self._optimizer.take_up(name, step, tensors)

    def add_up(self, loss: float) -> float:
        """Sum the gradients of all processes; gives the sum of their losses."""
        if self._processes.count == 1:
            return loss
        for value in self._trained.values():
            if value.grad is None and self.shards is None:
                value.grad = torch.zeros_like(value)
        summed = torch.tensor([loss], dtype=torch.float64)
        self._processes.add_up([summed])
        if self.shards is not None:
            self.shards.take_gradients()
        else:
            self._processes.add_up(value.grad for value in self._trained.values() if value.grad is not None)
        return float(summed)

    def loss(self, of_batch: BatchLoss, batch: Batch) -> Tensor:
        """The loss of a batch by the model as it is, with a graph."""
        return of_batch(batch) if self.shards is None else self.shards.loss(of_batch, batch)

    def update(self, step: int, total: int, loss: float) -> None:
        """One step of the optimizer on the gradients that are there."""
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of step {step + 1} is no finite number", hint="lower learning_rate, or look at the teacher"
            )
        settings = self._settings
        if self.shards is not None:
            self.shards.clip(settings.clip)
        else:
            torch.nn.utils.clip_grad_norm_(self._trained.values(), settings.clip)
        self._optimizer.step(settings.learning_rate * rate(settings, step, total))
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._trained[name].mul_(mask)
        self.losses.append(loss)
        if (step + 1) % settings.save_every == 0 or step + 1 == total:
            self._save(step + 1)

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are, fp32 where the model is, by their names on disk: the next step changes them."""
        return {
            name: value.detach() for name, value in self._checkpoint.disk_views(self.model.named_parameters()).items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights, fp32 on the CPU, by their names on disk; in the main process alone."""
        if self.shards is None:
            return {name: value.cpu() for name, value in self.weights().items()}
        saved = self._saves.latest() if self._saves is not None else None
        if saved is None:
            raise RuntimeError("a model in parts is read from its last save, and there is none")
        return self._checkpoint.disk_views((name, saved.tensors[name]) for name in self._trained)

    def _save(self, step: int) -> None:
        held = {key: (name, value) for name in self._trained for key, value in self._state(name)}
        if self.shards is not None and not self._processes.is_main:
            self.shards.answer(held)
        elif self._saves is not None:
            entries = (tensor_entry(key, value) for key, (_, value) in held.items())
            data = {"losses": self.losses, "figures": {name: list(values) for name, values in self.figures.items()}}
            self._saves.add(step, self.shards.entries(held) if self.shards else entries, data)
            if self.shards is not None:
                self.shards.done()

    def _state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield name, self._trained[name].detach()
        yield from self._optimizer.state(name)


def _progress(found: Save | None) -> dict[str, Any]:
    if found is None:
        return {"step": 0, "losses": [], "figures": {}}
    return {"step": found.step, **found.data}


def rate(settings: Training, step: int, total: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    rising = max(1, round(settings.warmup * total))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    if settings.schedule == "wsd":
        return 1 - (1 - settings.final) * max(0.0, (done - 0.8) / 0.2)
    return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))
