"""What the walk yields: a Block with its Groups (one common input) of Sites (linear layers), and its other Parameters.

Shapes: B samples, T positions, D hidden width; N tokens, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core._trim import trim_memory
from compress.core.statistics import Statistic

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.cuts import Cut
    from compress.core.tensors import QuantTensor


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What happened to one site. `error` is its relative weighted output error, `sparsity` the share of its weights
    that a method has left zero, `fallback` says why it got less."""

    name: str
    method: str = ""
    bits: int | None = None
    group_size: int | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    fallback: str = ""
    tokens: int = 0
    sparsity: float | None = None


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What happened to one block. `output_error` is the relative MSE of its output against the original weights, on the
    same inputs, over every sixteenth micro-batch."""

    index: int
    name: str
    output_error: float | None
    sites: tuple[SiteRecord, ...]


class Site:
    """One linear layer: read its weight, replace it, note what happened."""

    def __init__(self, name: str, module: nn.Linear, checkpoint: Checkpoint) -> None:
        self.name = name
        self.record = SiteRecord(name)
        self.replacement: Tensor | QuantTensor | None = None
        self.module = module
        self.original = module.weight
        self._dtype = module.weight.dtype
        self._checkpoint = checkpoint

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.module.out_features, self.module.in_features

    @property
    def weight(self) -> Tensor:
        """The weight as it now is, fp32 [out, in]: a fresh copy at each access."""
        return self.rows(slice(None))

    def rows(self, rows: slice) -> Tensor:
        """Some rows of the weight, fp32: a fresh copy of these alone where the weight is stored dense."""
        value = self.replacement
        if value is None and self.name not in self._checkpoint.schemes:
            value = self.original
        if isinstance(value, Tensor):
            return value[rows].to(self.original.device, torch.float32, copy=True)
        if value is None:
            return self._checkpoint.weight(self.name, torch.float32).to(self.original.device)[rows]
        return value.dequantize(torch.float32).to(self.original.device)[rows]

    def replace(self, value: Tensor | QuantTensor) -> None:
        """Install a new weight [out, in] and keep it for the sink. Later statistics and outputs see what is stored."""
        weight = dense(value, self._dtype).to(self.original.device)
        self.module.weight = nn.Parameter(weight, requires_grad=False)
        self.replacement = value

    def prepare(self, weight: Tensor) -> None:
        """Install a weight fp32 [out, in] for others to start from: it is rounded only if nobody quantizes it."""
        self.module.weight = nn.Parameter(weight.to(self.original.device), requires_grad=False)
        self.replacement = weight

    def close(self) -> None:
        """Let go of the weights; a caller's loop variable may still hold the site."""
        self.replacement = None
        self.module = self.module.to_empty(device="meta")
        self.original = self.module.weight

    def note(
        self,
        *,
        method: str = "",
        bits: int | None = None,
        group_size: int | None = None,
        error: float | None = None,
        damping: float | None = None,
        retries: int = 0,
        fallback: str = "",
        tokens: int = 0,
        sparsity: float | None = None,
    ) -> None:
        """Record what was done, for the report."""
        self.record = SiteRecord(
            self.name, method, bits, group_size, error, damping, retries, fallback, tokens, sparsity
        )


class Parameter:
    """A tensor of the block that is no site's weight: a norm, a bias, a router. What scales fold into."""

    def __init__(self, name: str, owner: nn.Module, leaf: str, stored: torch.dtype) -> None:
        self.name = name
        self.replacement: Tensor | None = None
        self._owner = owner
        self._leaf = leaf
        self._stored = stored

    @property
    def installed(self) -> Tensor:
        """The tensor that the block computes with: another one after each replacement."""
        return self._owner.get_parameter(self._leaf)

    @property
    def value(self) -> Tensor:
        """As it now is, fp32: a fresh copy."""
        value = self.installed if self.replacement is None else self.replacement
        return value.detach().to(torch.float32, copy=True)

    def replace(self, value: Tensor) -> None:
        """Install a new value, rounded as it will be stored: `value` then gives what became of it."""
        before = self.installed
        self.replacement = value.to(before.device, self._stored)
        after = self.replacement.to(before.dtype)
        self._owner._parameters[self._leaf] = nn.Parameter(after, requires_grad=False)


class Statistics(Mapping[type[Statistic], Tensor]):
    """Results by the class of the statistic. `del statistics[Hessian]` and `clear()` free their memory."""

    def __init__(self, running: dict[type[Statistic], Statistic]) -> None:
        self._running = running

    def __getitem__(self, kind: type[Statistic]) -> Tensor:
        return self._running[kind].result()

    def __delitem__(self, kind: type[Statistic]) -> None:
        del self._running[kind]

    def __iter__(self) -> Iterator[type[Statistic]]:
        return iter(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def clear(self) -> None:
        self._running.clear()

    def rescale(self, factor_K: Tensor) -> None:
        for statistic in self._running.values():
            statistic.rescale(factor_K)


class Group:
    """Sites that read the same input, with the statistics of that input (gathered when first read)."""

    def __init__(self, name: str, sites: tuple[Site, ...], depth: int, gather: Callable[[Group], None]) -> None:
        self.name = name
        self.sites = sites
        self.depth = depth
        self._gather = gather
        self._gathered: tuple[Statistics, int] | None = None

    @property
    def width(self) -> int:
        """Input channels."""
        return self.sites[0].shape[1]

    @property
    def kind(self) -> str:
        """Its name without the expert that it belongs to: qkv, o, gate_up, down."""
        return self.name.rpartition(".")[2]

    @property
    def routed(self) -> bool:
        """Whether only some tokens reach it: an expert's group."""
        return self.name.startswith("experts.")

    @property
    def gathered(self) -> bool:
        return self._gathered is not None

    def set_statistics(self, running: dict[type[Statistic], Statistic], tokens: int) -> None:
        """Called by the walk when the group's inputs have been seen."""
        self._gathered = Statistics(running), tokens

    def _read(self) -> tuple[Statistics, int]:
        if self._gathered is None:
            self._gather(self)
            trim_memory()  # what the forward freed is not to lie beside what a method makes of the statistics
        if self._gathered is None:
            raise RuntimeError(f"the statistics of {self.name} were not gathered")
        return self._gathered

    @property
    def statistics(self) -> Statistics:
        return self._read()[0]

    @property
    def tokens(self) -> int:
        """Calibration tokens that reached this group (an expert gets only those routed to it); padding excluded."""
        return self._read()[1]

    def release(self) -> None:
        """Free the statistics, and let the system have their memory."""
        if self._gathered is not None and self._gathered[0]:
            self._gathered[0].clear()
            trim_memory()

    def close(self) -> None:
        """Free the statistics for good, and let go of the walk that gathered them."""
        self.release()
        self._gather = _closed

    def rescale(self, factor_K: Tensor) -> None:
        """Let the statistics, if they are gathered, be those of inputs whose channels are multiplied by `factor_K`."""
        if self._gathered is not None:
            self._gathered[0].rescale(factor_K)

    def forget(self) -> None:
        """Free the statistics; they are gathered again when read."""
        self.release()
        self._gathered = None

    def forget_all_but(self, kinds: Iterable[type[Statistic]]) -> None:
        """Free statistics of other kinds."""
        if self._gathered is not None:
            for kind in set(self._gathered[0]) - set(kinds):
                del self._gathered[0][kind]


def _closed(group: Group) -> None:
    raise RuntimeError(f"{group.name}: the walk has gone on to another block")


class Block:
    """One decoder layer, being worked on. `inputs` and `targets` are streams of micro-batches [B, T, D], if kept."""

    def __init__(
        self, index: int, name: str, module: nn.Module, arguments: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self.index = index
        self.name = name
        self.module = module
        self.groups: tuple[Group, ...] = ()
        self.parameters: dict[str, Parameter] = {}
        self.cuts: dict[str, Sequence[Cut]] = {}
        """What of the block's tensors is not stored, by disk name: what the block computes without it is their caller's
        to see to."""
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self._arguments = arguments
        self.dtype = dtype

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The block's output for `x_BTD`, with this layer's own masks and rotary embeddings; differentiable."""
        return self.module(x_BTD.to(self.dtype), **self._arguments)

    @property
    def sites(self) -> Iterator[Site]:
        return (site for group in self.groups for site in group.sites)

    def replacements(self) -> dict[str, Tensor | QuantTensor]:
        """What was replaced, by disk name: a dense weight under its tensor's name, a QuantTensor under its module's."""
        found: dict[str, Tensor | QuantTensor] = {}
        for site in self.sites:
            if site.replacement is not None:
                name = f"{site.name}.weight" if isinstance(site.replacement, Tensor) else site.name
                found[name] = site.replacement
        for parameter in self.parameters.values():
            if parameter.replacement is not None:
                found[parameter.name] = parameter.replacement
        return found

    def add_bias(self, site: Site, value_R: Tensor) -> None:
        """Give a site without a bias one, [R], stored in the weight's dtype."""
        site.module.bias = nn.Parameter(torch.zeros_like(value_R, dtype=self.dtype), requires_grad=False)
        name = f"{site.name}.bias"
        self.parameters[name] = Parameter(name, site.module, "bias", site.original.dtype)
        self.parameters[name].replace(value_R)

    def install(self, stored: Mapping[str, Tensor | QuantTensor]) -> None:
        """Put back what an earlier run stored; other tensors of the block are ignored, they are as in the source."""
        for site in self.sites:
            value = stored.get(site.name, stored.get(f"{site.name}.weight"))
            if value is not None:
                site.replace(value)
            bias = stored.get(f"{site.name}.bias")
            if isinstance(bias, Tensor) and f"{site.name}.bias" not in self.parameters:
                self.add_bias(site, bias)
        for parameter in self.parameters.values():
            value = stored.get(parameter.name)
            if isinstance(value, Tensor):
                parameter.replace(value)

    def settle(self) -> None:
        """Let what was prepared be the block's original weights from here on."""
        for site in self.sites:
            site.original = site.module.weight

    def round_prepared(self, stored: Callable[[str], torch.dtype]) -> None:
        """Round what was prepared and then left alone as it will be stored: a replay computes with that, too."""
        for site in self.sites:
            if isinstance(site.replacement, Tensor):
                site.replace(site.replacement.to(stored(f"{site.name}.weight")))

    def close(self) -> None:
        """Free weights and statistics: the caller's loop variable keeps the block while the walk goes on."""
        for group in self.groups:
            group.close()
            for site in group.sites:
                site.close()
        self.parameters, self.cuts = {}, {}
        self.inputs, self.targets = [], []
        self.module = nn.Module()

    def record(self, output_error: float | None) -> BlockRecord:
        tokens = {site.name: group.tokens for group in self.groups if group.gathered for site in group.sites}
        sites = (replace(site.record, tokens=site.record.tokens or tokens.get(site.name, 0)) for site in self.sites)
        return BlockRecord(self.index, self.name, output_error, tuple(sites))


def dense(value: Tensor | QuantTensor, dtype: torch.dtype) -> Tensor:
    """A weight as a plain tensor of `dtype`."""
    return value.to(dtype) if isinstance(value, Tensor) else value.dequantize(dtype)
