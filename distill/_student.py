"""The student: a model in fp32 with its optimizer, a state that can be saved and gone on from, and masks that hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.errors import InputError
from compress.core.passes import Job
from compress.core.saves import Save

if TYPE_CHECKING:
    from distill._settings import Training


class Student:
    """What is trained: the parameters of the model, and those of `extra`, which end with the training. Zeros of a
    masked model stay zeros. With `instead` the model is frozen, and what that function makes of it is trained."""

    def __init__(
        self,
        job: Job,
        settings: Training,
        extra: Mapping[str, nn.Parameter] | None = None,
        *,
        instead: Callable[[Any], Mapping[str, nn.Parameter]] | None = None,
    ) -> None:
        self._settings = settings
        self._saves = job.saves
        self._checkpoint = job.checkpoint
        self.model = job.checkpoint.build_model(torch.float32, job.device).requires_grad_(instead is None)
        own = dict(self.model.named_parameters() if instead is None else instead(self.model))
        self._trained: dict[str, Tensor] = {**own, **(extra or {})}
        masked = job.checkpoint.kind == "masked" and instead is None
        self._masks = {name: value.detach() != 0 for name, value in self._trained.items() if masked and value.ndim > 1}
        matrices = [value for value in self._trained.values() if value.ndim > 1]
        others = [value for value in self._trained.values() if value.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.losses: list[float] = []

    def resume(self) -> int:
        """Take up the newest save; gives the steps that are done."""
        found = self._saves.latest() if self._saves is not None else None
        if found is None:
            return 0
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(found.tensors[name])
                state: dict[str, Any] = {"step": torch.tensor(float(found.step))}
                state |= {key: found.tensors[f"{key}.{name}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[value] = state
        self.losses = list(found.data["losses"])
        return found.step

    def update(self, step: int, total: int, loss: float) -> None:
        """One step of the optimizer on the gradients that are there."""
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of step {step + 1} is no finite number", hint="lower learning_rate, or look at the teacher"
            )
        settings = self._settings
        torch.nn.utils.clip_grad_norm_(self._trained.values(), settings.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(settings, step, total)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._trained[name].mul_(mask)
        self.losses.append(loss)
        if self._saves is not None and ((step + 1) % settings.save_every == 0 or step + 1 == total):
            self._saves.add(Save(step + 1, dict(self._state()), {"losses": self.losses}))

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights, fp32 on the CPU, by their names on disk."""
        return {name: value.detach().cpu() for name, value in self._checkpoint.disk_views(self.model).items()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._trained.items():
            yield name, value.detach().cpu()
            state = self._optimizer.state[value]
            yield from ((f"{key}.{name}", state[key].cpu()) for key in ("exp_avg", "exp_avg_sq"))


def rate(settings: Training, step: int, total: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    rising = max(1, round(settings.warmup * total))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    if settings.schedule == "wsd":
        return 1 - (1 - settings.final) * max(0.0, (done - 0.8) / 0.2)
    return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))
