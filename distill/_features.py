"""Which layers learn from which, the projections between their widths, and the loss of a batch.

Shape suffixes: B rows, T positions, D width of hidden states, C width of queries, keys or values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.architectures import Architecture, lookup
from compress.core.errors import UsageError
from compress.core.passes import Job
from compress.core.sizes import sizes_of
from distill._batches import NO_TARGET, Batch, text_batches
from distill._logits import chunk_tokens, head_of, hidden_states
from distill._losses import chunked
from distill._settings_taught import ORIGINAL
from distill._states import distance, relation_divergence
from distill._student import Student
from distill._teacher import open_teacher
from distill._trainer import BatchLoss, text_of, train

if TYPE_CHECKING:
    from distill.features import Features as Settings


def train_on_features(settings: Settings, job: Job) -> None:
    """Train job.checkpoint towards a teacher's logits and states, and write what became of it."""
    tokens = text_of(job)
    teacher = Inside.of(open_teacher(settings, job))
    kept = job.kept_blocks if settings.teacher == ORIGINAL else None
    pairs = layer_pairs(settings.layers, job.checkpoint.num_blocks, teacher.blocks, kept)
    projections = {}
    if settings.hidden:
        widths = teacher.sizes["hidden"], job.checkpoint.config["hidden_size"]
        projections = {layer: projection(*widths, settings.seed + layer, job.device) for layer in pairs}
    extra = {f"projection.{layer}": value for layer, value in projections.items()}
    student = Student(job, settings, extra)
    inside = Inside.of(student.model)
    if settings.attention:
        require_heads(settings.relation_heads, inside, teacher)
    loss = features_loss(settings, inside, teacher, pairs, projections)
    train(settings, job, student, text_batches(settings, tokens), loss, settings.steps(tokens))


def layer_pairs(asked: Mapping[int, int] | None, ours: int, theirs: int, kept: Sequence[int] | None) -> dict[int, int]:
    """The teacher layer of each student layer that learns: as asked, or the one that it was, or evenly with last to
    last. UsageError for a layer that the teacher does not have."""
    if asked is not None:
        outside = [layer for layer in asked.values() if not 0 <= layer < theirs]
        if outside:
            raise UsageError(
                f"the teacher has no layer {outside[0]}: its layers are 0 to {theirs - 1}", where="distill.layers"
            )
        return dict(sorted(asked.items()))
    if kept is not None:
        return dict(enumerate(kept))
    return {layer: max(0, round((layer + 1) * theirs / ours) - 1) for layer in range(ours)}


def projection(rows: int, columns: int, seed: int, device: str) -> nn.Parameter:
    """From the student's width to the teacher's: the identity where they are equal, else random."""
    if rows == columns:
        return nn.Parameter(torch.eye(rows, device=device))
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.randn(rows, columns, generator=generator) / columns**0.5).to(device))


@dataclass(frozen=True, slots=True)
class Inside:
    """A model whose inner states are looked at."""

    model: Any
    architecture: Architecture
    sizes: dict[str, int]
    entering: list[Tensor]

    @classmethod
    def of(cls, model: Any) -> Inside:
        """Its blocks note what enters them from now on."""
        config = model.config.to_dict()
        found = cls(model, lookup(config), sizes_of(config), [])
        for block in model.get_submodule(found.architecture.blocks):
            block.forward = noting(block.forward, found.entering)
        return found

    @property
    def blocks(self) -> int:
        return self.sizes["layers"]

    @property
    def widths(self) -> list[int]:
        """Of queries, keys and values."""
        kv = self.sizes["kv_heads"] * self.sizes["head_dim"]
        return [self.sizes["heads"] * self.sizes["head_dim"], kv, kv]

    def states(self, ids_BT: Tensor) -> tuple[Tensor, ...]:
        """What enters each block, and last what the head reads, all [B, T, D]: behind block i is states[i + 1]."""
        self.entering.clear()
        last_BTD = hidden_states(self.model, ids_BT)
        states = (*self.entering, last_BTD)
        self.entering.clear()
        return states

    def behind(self, layer: int, states: Sequence[Tensor], *, normed: bool) -> Tensor:
        """What a block leaves, [B, T, D]; `normed`: as the final norm makes it, which is all there is of the last."""
        if not normed or layer == self.blocks - 1:
            return states[layer + 1]
        norm = self.model.get_submodule(self.architecture.final_norm)
        return norm(states[layer + 1].to(norm.weight.dtype))

    def attention_inputs(self, layer: int, entering_BTD: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values [B, T, C] of a block, before anything is turned by its position."""
        names = self.architecture
        block = self.model.get_submodule(names.blocks)[layer]
        group = next(group for group in names.groups if group.name == "qkv")
        norm = next(norm.name for norm in names.norms if group.name in norm.feeds)
        dtype = block.get_submodule(group.sites[0]).weight.dtype
        normed_BTD = block.get_submodule(norm)(entering_BTD.to(dtype))
        found = [block.get_submodule(site)(normed_BTD) for site in group.sites]
        return found if len(found) == 3 else found[0].split(self.widths, dim=-1)


def noting(forward: Callable[..., Tensor], entering: list[Tensor]) -> Callable[..., Tensor]:
    """A block's forward that notes its input. Outside of what is compiled or computed again on the way back, where
    transformers' own recording of states would be inside."""

    @wraps(forward)
    def call(x_BTD: Tensor, *others: Any, **named: Any) -> Tensor:
        entering.append(x_BTD)
        return forward(x_BTD, *others, **named)

    return call


def require_heads(heads: int, *models: Inside) -> None:
    """UsageError if a width of queries, keys or values is no multiple of `heads`."""
    odd = [width for inside in models for width in inside.widths if width % heads]
    if odd:
        raise UsageError(
            f"relation_heads {heads} does not divide a width of {odd[0]} of queries, keys or values",
            where="distill.relation_heads",
            hint=f"widths are {', '.join(str(width) for inside in models for width in inside.widths)}",
        )


def features_loss(
    settings: Settings,
    student: Inside,
    teacher: Inside,
    pairs: Mapping[int, int],
    projections: Mapping[int, Tensor],
) -> BatchLoss:
    """The divergence of logits, and the means over pairs of layers of what is compared inside, as weighted."""
    related = dict([max(pairs.items())]) if settings.relations == "last" else pairs

    def of_batch(batch: Batch) -> Tensor:
        counted_BT = (batch.target_BT != NO_TARGET).to(student.model.device)
        with torch.no_grad():
            taught = teacher.states(batch.ids_BT)
        ours = student.states(batch.ids_BT)
        ends = (ours[-1].flatten(0, 1), head_of(student.model)), (taught[-1].flatten(0, 1), head_of(teacher.model))
        target_N = batch.target_BT.flatten().to(student.model.device)
        total = settings.logits * chunked(settings.loss, *ends, target_N, chunk_tokens(student.model))
        with torch.autocast(student.model.device.type, enabled=False):
            if settings.hidden:
                far = [apart(*pair, ours, taught, counted_BT) for pair in pairs.items()]
                total = total + settings.hidden * torch.stack(far).mean()
            if settings.attention:
                unlike = [relations(i, k, ours[i], taught[k], counted_BT) for i, k in related.items()]
                total = total + settings.attention * torch.stack(unlike).mean()
        return total

    def apart(i: int, k: int, ours: Sequence[Tensor], taught: Sequence[Tensor], counted_BT: Tensor) -> Tensor:
        normed = i == student.blocks - 1 or k == teacher.blocks - 1
        with torch.no_grad():
            theirs_BTD = teacher.behind(k, taught, normed=normed)
        ours_BTD = student.behind(i, ours, normed=normed).float() @ projections[i].T
        return distance(ours_BTD, theirs_BTD, counted_BT, settings.distance)

    def relations(ours: int, theirs: int, ours_BTD: Tensor, theirs_BTD: Tensor, counted_BT: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher.attention_inputs(theirs, theirs_BTD)
        found = zip(student.attention_inputs(ours, ours_BTD), taught, strict=True)
        parts = [relation_divergence(*pair, counted_BT, settings.relation_heads) for pair in found]
        return torch.stack(parts).sum()

    return of_batch
