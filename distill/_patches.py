"""Patches: a model whose linear layers compute with weights that are made, at each forward, of what is trained.

A patch stands for one parameter of the model. Its parts are the matrices that files know in it: one, or those of all
experts, which transformers keep in one parameter [experts, rows, K]. PyTorch's parametrizations do the rest.

Shape suffixes: O output channels, K input channels of one matrix; E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.core._experts import unfused
from compress.core.checkpoint import Checkpoint
from distill._batches import Batch
from distill._trainer import BatchLoss


class AsItIs(nn.Module):
    """A part that is not trained."""

    def forward(self, weight_OK: Tensor) -> Tensor:
        return weight_OK.detach()


class Patch(nn.Module):
    """A parameter made of parts, which lie behind each other in its rows."""

    def __init__(self, parts: Sequence[nn.Module], rows: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._rows = list(rows)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            return self.parts[0](weight)
        pieces = weight.flatten(0, -2).split(self._rows)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)]).view(weight.shape)


@dataclass(frozen=True)
class Place:
    """A parameter of the model that holds matrices: where it is, and their names on disk with their values."""

    owner: nn.Module
    leaf: str
    path: str
    matrices: Mapping[str, Tensor]

    @property
    def fused(self) -> bool:
        """Whether it is of experts."""
        return len(self.matrices) > 1


def places(checkpoint: Checkpoint, model: Any) -> Iterator[Place]:
    """The parameters that hold the weights of the blocks' linear layers."""
    names = checkpoint.architecture
    for index, block in enumerate(model.get_submodule(names.blocks)):
        sites, prefix = set(checkpoint.sites(index)), checkpoint.block_name(index)
        for path, value in list(block.named_parameters()):
            parts = unfused(path, value.detach(), names.experts)
            on_disk = {f"{prefix}.{names.disk_name(name)}".removesuffix(".weight"): part for name, part in parts}
            if sites >= on_disk.keys():
                owner, _, leaf = path.rpartition(".")
                yield Place(block.get_submodule(owner), leaf, f"{prefix}.{path}", on_disk)


def patch(place: Place, parts: Mapping[str, nn.Module]) -> Patch:
    """Let the parameter be made by `parts`, by disk name; matrices without one stay as they are."""
    rows = [len(matrix) for matrix in place.matrices.values()]
    made = Patch([parts.get(name) or AsItIs() for name in place.matrices], rows)
    parametrize.register_parametrization(place.owner, place.leaf, made.to(place.owner.get_parameter(place.leaf).device))
    return made


def made_once(loss: BatchLoss) -> BatchLoss:
    """The same loss, in which each weight is made once: experts are asked for theirs again and again."""

    def of_batch(batch: Batch) -> Tensor:
        with parametrize.cached():
            return loss(batch)

    return of_batch


Attach = Callable[[Any], Mapping[str, nn.Parameter]]
"""Puts what is trained into a model, and names it."""
