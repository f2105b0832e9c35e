"""A checkpoint whose residual stream is turned as its tensors are read: x -> x Q between all layers.

Layers that read the stream become W diag(g) Q (g: the norm before them, which becomes one), layers that write to it
Qᵀ W, the embedding E Q, the head W diag(g) Q. RMS norms do not see Q. Everything is computed in fp32.
Shape suffixes: O output channels, K input channels, D stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core.architectures import FEED_FORWARD_DEPTH
from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.untied import UntiedCheckpoint
from quantize.prepare._hadamard import Rotation

if TYPE_CHECKING:
    from compress.core._skeleton import Skeleton

_WHERE = "quantize.prepare"
Change = Callable[[Tensor], Tensor]


class RotatedCheckpoint(Checkpoint):
    """`source`, turned by rotations that `seed` decides; `heads`: the values inside each head, too."""

    def __init__(self, source: Checkpoint, seed: int, *, heads: bool) -> None:
        final_norm = f"{source.architecture.final_norm}.weight"
        gain_D = source.tensor(final_norm).float() + source.architecture.norm_plus_one
        if source.tied and bool((gain_D != 1).any()):  # it folds into the head, and not the rest
            source = UntiedCheckpoint(source)
        super().__init__(source.folder, source.source, source.config, source.tensors)
        _refuse(self)
        self._head = f"{self.architecture.head}.weight"
        self._final_norm = final_norm
        generator = torch.Generator().manual_seed(seed)
        self._turn = _rotation(self, generator)
        self._head_size = self._width("o") // self.config["num_attention_heads"]
        self._turn_head = Rotation.of(self._head_size, generator) if heads else None

    @cached_property
    def skeleton(self) -> Skeleton:
        skeleton = super().skeleton
        skeleton.config.tie_word_embeddings = self.tied
        return skeleton

    def tensor(self, name: str) -> Tensor:
        stored = super().tensor(name)
        change = self._changes.get(name)
        return stored if change is None else change(stored)

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        row_by_row = name in (self._head, self.embedding_tensor)
        return self._changes[name](super().rows(name, row_ids)) if row_by_row else self.tensor(name)[row_ids]

    def alters(self, name: str) -> bool:
        return name in self._changes

    @cached_property
    def _changes(self) -> dict[str, Change]:
        """What happens to each tensor that is not left as it is."""
        found: dict[str, Change] = {self.embedding_tensor: self._turn, self._final_norm: self._one}
        if not self.tied:
            found[self._head] = self._reading(self._final_norm)
        for index in range(self.num_blocks):
            found |= self._block_changes(index)
        return {name: change for name, change in found.items() if name in self.tensors}

    def _block_changes(self, index: int) -> dict[str, Change]:
        block, experts = self.block_name(index), self.architecture.experts
        norm_of = {kind: f"{block}.{norm.name}.weight" for norm in self.architecture.norms for kind in norm.feeds}
        found: dict[str, Change] = dict.fromkeys(norm_of.values(), self._one)
        for group, sites in self.groups(index):
            kind = group.rpartition(".")[2]
            for site in sites:
                change = self._reading(norm_of[kind]) if kind in norm_of else self._writing(kind)
                found[f"{site}.weight"] = change
                if kind not in norm_of:
                    found[f"{site}.bias"] = self._turn
            if kind == "qkv" and self._turn_head is not None:
                weight, bias = (f"{sites[-1]}.{leaf}" for leaf in ("weight", "bias"))
                found[weight] = self._then_values(found[weight], fused=len(sites) == 1)
                found[bias] = self._then_values(torch.Tensor.float, fused=len(sites) == 1)
        if experts is not None:
            found[f"{block}.{experts.router}.weight"] = self._reading(norm_of["gate_up"])
        return found

    def _reading(self, norm: str) -> Change:
        """W [O, D] -> W diag(g) Q."""
        return lambda weight_OD: self._turn(weight_OD.float() * self._gain(norm))

    def _writing(self, kind: str) -> Change:
        """W [D, K] -> Qᵀ W; of the output projection also the columns, by heads."""

        def change(weight_DK: Tensor) -> Tensor:
            turned_DK = weight_DK.float()
            if kind == "o" and self._turn_head is not None:
                heads = turned_DK.view(len(turned_DK), -1, self._head_size)
                turned_DK = self._turn_head(heads).view(turned_DK.shape)
            return self._turn.rows(turned_DK)

        return change

    def _then_values(self, change: Change, *, fused: bool) -> Change:
        """After `change`, turn the rows that make values, head by head; in a fused layer these are the last ones."""

        def turned(weight: Tensor) -> Tensor:
            weight = change(weight)
            count = (len(weight) - self._width("o")) // 2 if fused else len(weight)
            values = weight[-count:].unflatten(0, (-1, self._head_size)).movedim(1, -1)
            turn = self._turn_head
            if turn is not None:
                weight[-count:] = turn(values).movedim(-1, 1).flatten(0, 1)
            return weight

        return turned

    def _gain(self, norm: str) -> Tensor:
        """What a norm of the source multiplies by, fp32."""
        return super().tensor(norm).float() + self.architecture.norm_plus_one

    def _one(self, weight_D: Tensor) -> Tensor:
        return torch.full_like(weight_D, 0.0 if self.architecture.norm_plus_one else 1.0)

    def _width(self, group: str) -> int:
        return self.info(f"{dict(self.groups(0))[group][0]}.weight").shape[1]


def _rotation(checkpoint: Checkpoint, generator: torch.Generator) -> Rotation:
    width = checkpoint.config["hidden_size"]
    found = Rotation.of(width, generator)
    if found is None:
        raise UsageError(f"rotate knows no Hadamard matrix for any part of hidden_size {width}", where=_WHERE)
    return found


def _refuse(checkpoint: Checkpoint) -> None:
    """UsageError for families in which norms stand where the stream is turned."""
    architecture = checkpoint.architecture
    if architecture.output_norms:
        names = " and ".join(architecture.output_norms)
        raise UsageError(
            f"rotate cannot turn {checkpoint.model_type} models: {names} scale single channels of what a block adds",
            where=_WHERE,
            hint="awq_scale and smoothquant fold inside the block and work with this family",
        )
    fed = {kind for norm in architecture.norms for kind in norm.feeds}
    reading = {group.name for group in architecture.groups if group.depth in (0, FEED_FORWARD_DEPTH)}
    if not reading <= fed:
        raise UsageError(
            f"rotate cannot turn {checkpoint.model_type} models: no norm folds into {', '.join(sorted(reading - fed))}",
            where=_WHERE,
        )
