"""The loop: batches in an order that the seed decides, AdamW, and a state that can be saved and gone on from.

A step's batch follows from its number, there is no other randomness, and gradients are summed in a fixed order: a run
that was killed and started again ends with the same weights, on a CPU to the bit.

Shape suffixes: B rows, T positions; N tokens, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.events import Finished, Metric, Progress, Started
from compress.core.passes import Job
from compress.core.replaced import ReplacedCheckpoint
from compress.core.saves import Save
from distill._losses import Logits, Loss, chunked
from distill._teacher import open_teacher

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from distill._settings import Training
    from distill.logits import Logits as LogitsSettings

CHUNK_TOKENS = 1024
STAGE = "train"


def train_on_logits(settings: LogitsSettings, job: Job) -> None:
    """Train job.checkpoint towards a teacher, and write what became of it."""
    tokens = job.calibration
    if tokens is None:
        raise InputError("there is no text to train on")
    student = Student(job, settings)
    teacher = open_teacher(settings.teacher, job)
    loss = Loss(
        settings.divergence, settings.temperature, settings.mix, settings.alpha, settings.beta, settings.cross_entropy
    )
    total = settings.steps(tokens)
    job.events(Started(STAGE, total, "step"))
    for step in range(student.resume(), total):
        value = 0.0
        rows_B = batch_rows(settings, len(tokens.ids), step)
        scored = sum(int((targets_of(tokens, rows) != -100).sum()) for rows in rows_B.split(settings.rows_at_once))
        for rows in rows_B.split(settings.rows_at_once):
            ids_BT, target_N = tokens.ids[rows], targets_of(tokens, rows).flatten()
            with torch.no_grad():
                taught_ND = hidden_states(teacher, ids_BT).flatten(0, 1)
            hidden_ND = hidden_states(student.model, ids_BT).flatten(0, 1)
            pairs = (hidden_ND, head_of(student.model)), (taught_ND, head_of(teacher))
            part = chunked(loss, *pairs, target_N, CHUNK_TOKENS) * (int((target_N != -100).sum()) / max(scored, 1))
            part.backward()
            value += float(part.detach())
        student.update(step, total, value)
        job.events(Metric(STAGE, "loss", value, f"step {step + 1}"))
        job.events(Progress(STAGE, step + 1, total))
    job.events(Finished(STAGE, f"{total} steps, loss {student.losses[-1]:.4f}" if student.losses else f"{total} steps"))
    job = job.onto(ReplacedCheckpoint(job.checkpoint, student.tensors()))
    for _ in job.walk(calibrate=False):
        pass


class Student:
    """The model in fp32 with its optimizer. Zeros of a masked model stay zeros."""

    def __init__(self, job: Job, settings: Training) -> None:
        self._settings = settings
        self._saves = job.saves
        self.model = job.checkpoint.build_model(torch.float32, job.device).requires_grad_(True)
        self._by_name = {name: value for name, value in self.model.named_parameters() if name in job.checkpoint.tensors}
        if job.checkpoint.tied and job.checkpoint.embedding_tensor not in self._by_name:
            (tied,) = (value for value in self.model.parameters() if value is self.model.get_input_embeddings().weight)
            self._by_name[job.checkpoint.embedding_tensor] = tied
        masked = job.checkpoint.kind == "masked"
        self._masks = {name: value.detach() != 0 for name, value in self._by_name.items() if masked and value.ndim == 2}
        matrices = [value for value in self._by_name.values() if value.ndim == 2]
        others = [value for value in self._by_name.values() if value.ndim != 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.losses: list[float] = []

    def resume(self) -> int:
        """Take up the newest save; gives the steps that are done."""
        found = self._saves.latest() if self._saves is not None else None
        if found is None:
            return 0
        with torch.no_grad():
            for name, value in self._by_name.items():
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
        torch.nn.utils.clip_grad_norm_(self._by_name.values(), settings.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(settings, step, total)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._by_name[name].mul_(mask)
        self.losses.append(loss)
        if self._saves is not None and ((step + 1) % settings.save_every == 0 or step + 1 == total):
            self._saves.add(Save(step + 1, dict(self._state()), {"losses": self.losses}))

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights, fp32 on the CPU, by their names on disk."""
        return {name: value.detach().cpu() for name, value in self._by_name.items()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._by_name.items():
            yield name, value.detach().cpu()
            state = self._optimizer.state[value]
            yield from ((f"{key}.{name}", state[key].cpu()) for key in ("exp_avg", "exp_avg_sq"))


def batch_rows(settings: Training, rows: int, step: int) -> Tensor:
    """Which rows step `step` is trained on, [B]: each pass over them has an order of its own."""
    places = torch.arange(step * settings.batch, (step + 1) * settings.batch)
    found = []
    for epoch in torch.unique(places // rows).tolist():
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(rows, generator=generator)
        found.append(order[places[places // rows == epoch] % rows])
    return torch.cat(found)


def targets_of(tokens: Tokens, rows: Tensor) -> Tensor:
    """The next token of each position, [B, T]; -100 behind the last one, and in padding."""
    ids_BT = tokens.ids[rows]
    target_BT = torch.full_like(ids_BT, -100)
    target_BT[:, :-1] = ids_BT[:, 1:]
    if tokens.lengths is not None:
        inside_BT = torch.arange(ids_BT.shape[1]) < (tokens.lengths[rows] - 1)[:, None]
        target_BT[~inside_BT] = -100
    return target_BT


def rate(settings: Training, step: int, total: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    rising = max(1, round(settings.warmup * total))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    if settings.schedule == "wsd":
        return 1 - (1 - settings.final) * max(0.0, (done - 0.8) / 0.2)
    return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))


def hidden_states(model: Any, ids_BT: Tensor) -> Tensor:
    """What the head reads, [B, T, D]."""
    return model.model(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state


def head_of(model: Any) -> Logits:
    """Hidden states to logits, with the soft cap that some families put on them."""
    cap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden_ND: Tensor) -> Tensor:
        logits_NV = model.get_output_embeddings()(hidden_ND)
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    return head
