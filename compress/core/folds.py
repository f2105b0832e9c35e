"""Folds: where the input channels of layers can be divided by scales without changing what a block computes.

What makes the inputs is divided (a norm's weight, the rows of another linear layer with their bias), the columns of
the layers that read them are multiplied. Nothing folds across a block's border.

Shape suffixes: K input channels of a group, C scales of a fold, O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core._block import Block, Group, Parameter, Site
from compress.core.architectures import FEEDERS

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class NormMaker:
    """A norm that scales the channels by its weight plus `offset` (Gemma: 1)."""

    norm: Parameter
    offset: float

    def divide(self, scale_C: Tensor) -> Tensor:
        """Divide; gives the scales that came about once the norm is rounded to what is stored."""
        before_C = self._weight()
        self.norm.replace(before_C / scale_C - self.offset)
        after_C = self._weight()
        return torch.where(after_C == 0, torch.ones_like(before_C), before_C / after_C)

    def _weight(self) -> Tensor:
        return self.norm.value + self.offset


@dataclass(frozen=True, slots=True)
class RowsMaker:
    """The last rows of a linear layer (all of them, but for fused ones), with their bias."""

    site: Site
    bias: Parameter | None

    def divide(self, scale_C: Tensor) -> Tensor:
        weight_OK = self.site.weight
        weight_OK[-len(scale_C) :] /= scale_C[:, None]
        self.site.prepare(weight_OK)
        if self.bias is not None:
            bias_O = self.bias.value
            bias_O[-len(scale_C) :] /= scale_C
            self.bias.replace(bias_O)
        return scale_C


@dataclass(frozen=True)
class Fold:
    """`groups` read the channels that `maker` makes; channel k takes scale `channel_K[k]` of `count`. `routers` are
    further readers that are no sites."""

    name: str
    groups: tuple[Group, ...]
    maker: NormMaker | RowsMaker
    count: int
    channel_K: Tensor
    routers: tuple[Parameter, ...] = ()

    def spread(self, scale_C: Tensor) -> Tensor:
        """The scale of every input channel [K]."""
        return scale_C[self.channel_K.to(scale_C.device)]

    def mean(self, value_K: Tensor) -> Tensor:
        """The mean over the input channels of each scale [C]."""
        sums_C = torch.zeros(self.count, device=value_K.device)
        sums_C.index_add_(0, self.channel_K.to(value_K.device), value_K)
        return sums_C * (self.count / len(value_K))

    def largest(self, value_K: Tensor) -> Tensor:
        """The largest over the input channels of each scale [C]."""
        largest_C = torch.zeros(self.count, device=value_K.device)
        return largest_C.scatter_reduce_(0, self.channel_K.to(value_K.device), value_K, "amax")

    def divide_inputs(self, scale_C: Tensor) -> None:
        """Divide the inputs by `scale_C` (positive, finite), multiply the weights; gathered statistics follow."""
        scale_K = self.spread(self.maker.divide(scale_C))
        for group in self.groups:
            for site in group.sites:
                site.prepare(site.weight * scale_K)
            group.rescale(1 / scale_K)
        for router in self.routers:
            router.replace(router.value * scale_K)


def folds_of(block: Block, checkpoint: Checkpoint) -> list[Fold]:
    """All folds of a block, along its forward. No fold changes the inputs of another's groups."""
    return [*_from_norms(block, checkpoint), *_from_rows(block, checkpoint)]


def _from_norms(block: Block, checkpoint: Checkpoint) -> list[Fold]:
    architecture, found = checkpoint.architecture, []
    for norm in architecture.norms:
        groups = tuple(group for group in block.groups if group.kind in norm.feeds)
        if not groups:
            continue
        maker = NormMaker(block.parameters[f"{block.name}.{norm.name}.weight"], float(architecture.norm_plus_one))
        routers: tuple[Parameter, ...] = ()
        if architecture.experts is not None and groups[0].routed:
            routers = (block.parameters[f"{block.name}.{architecture.experts.router}.weight"],)
        width = groups[0].width
        found.append(Fold(norm.name, groups, maker, width, torch.arange(width), routers))
    return found


def _from_rows(block: Block, checkpoint: Checkpoint) -> list[Fold]:
    by_name = {group.name: group for group in block.groups}
    found = []
    for source, fed in FEEDERS:
        for group in block.groups:
            if group.kind != fed:
                continue
            source_group = by_name[group.name.removesuffix(fed) + source]
            site = source_group.sites[-1]
            maker = RowsMaker(site, block.parameters.get(f"{site.name}.bias"))
            count = site.shape[0]
            if len(source_group.sites) == 1:  # fused: queries, keys and values, or gate and up
                count = (count - group.width) // 2 if fed == "o" else group.width
            heads = checkpoint.config["num_attention_heads"] if fed == "o" else 1
            name = site.name.removeprefix(f"{block.name}.")
            found.append(Fold(name, (group,), maker, count, _rows(group, count, heads)))
    return found


def _rows(group: Group, count: int, heads: int) -> Tensor:
    """Which of `count` rows makes input channel k: heads of queries share the values of one key-value head."""
    head_size = group.width // heads
    sharing = group.width // count
    channel_K = torch.arange(group.width)
    return channel_K // head_size // sharing * head_size + channel_K % head_size
