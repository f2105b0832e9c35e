"""Cuts: which rows or columns of a tensor stay when a model becomes smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.core.lazy import lazy_module

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_module("torch")


@dataclass(frozen=True, slots=True)
class Cut:
    """Of dimension `dim` of a tensor, `size` long, the indices `kept` stay, in this order."""

    dim: int
    kept: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, dim: int, kept: Iterable[int], size: int) -> Cut:
        """ValueError unless something is kept and all of it is there, each once."""
        found = tuple(int(index) for index in kept)
        if not found or len(set(found)) != len(found) or min(found) < 0 or max(found) >= size:
            raise ValueError(f"{len(found)} indices of {size} cannot be kept: they are none, repeated or out of range")
        return cls(dim, found, size)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cut:
        """What `dataclasses.asdict` and JSON made of a cut."""
        return cls(data["dim"], tuple(data["kept"]), data["size"])

    @property
    def removed(self) -> tuple[int, ...]:
        """The indices that go, ascending."""
        return tuple(sorted(set(range(self.size)) - set(self.kept)))


Cuts = Mapping[str, Sequence[Cut]]
"""What is cut from each tensor, by its name on disk."""


def cut(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """What stays of a tensor."""
    for one in cuts:
        tensor = tensor.index_select(one.dim, torch.tensor(one.kept, device=tensor.device))
    return tensor


def widen(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """The tensor before it was cut, with zeros for what is gone."""
    for one in cuts:
        shape = list(tensor.shape)
        shape[one.dim] = one.size
        kept = torch.tensor(one.kept, device=tensor.device)
        tensor = tensor.new_zeros(shape).index_copy_(one.dim, kept, tensor)
    return tensor


def shape_after(shape: Sequence[int], cuts: Iterable[Cut]) -> tuple[int, ...]:
    """The shape of what stays."""
    found = list(shape)
    for one in cuts:
        found[one.dim] = len(one.kept)
    return tuple(found)
