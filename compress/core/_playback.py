"""Playback: what a block's forward has computed with its final weights is kept, and not computed a second time.

In group order a group's statistics are gathered after the groups before it were replaced, so every forward could start
at the embedding of the block or where the last one stopped. Kept are the input of the attention's output projection,
then the attention's output, then the input of the down projection: the same values, in the compute dtype, as in a
forward from the start. What follows has the same bits therefore, and a resumed walk may make one plain forward.

Shapes: N samples, T positions, K channels; B samples of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from compress.core._activations import Activations
from compress.core._block import Block, Parameter, Site

Part = Literal["attention input", "attention output", "feed-forward input"]

# the groups whose weights a part was computed with
_MADE_WITH: dict[Part, tuple[str, ...]] = {
    "attention input": ("qkv",),
    "attention output": ("qkv", "o"),
    "feed-forward input": ("qkv", "o", "gate_up"),
}
_INPUT_OF: dict[str, Part] = {"o": "attention input", "down": "feed-forward input"}


class Playback:
    """The parts of the block at hand. A part is played as long as the weights that it was computed with are in place.
    An attention's output takes the place of its input where both have one width."""

    def __init__(self, stream: Activations) -> None:
        self._stream = stream
        self._buffers: dict[Part, Tensor] = {}
        self._kept: dict[Part, _Kept] = {}
        self._module = nn.Module()
        self._groups: dict[str, tuple[Site, ...]] = {}
        self._others: list[Parameter] = []

    def start(self, block: Block) -> None:
        """From here on this block is played."""
        self.forget()
        self._module = block.module
        self._groups = {group.name: group.sites for group in block.groups}
        self._others = list(block.parameters.values())

    def forget(self) -> None:
        """Free what is kept."""
        self._kept.clear()
        self._buffers.clear()

    def keep(self, group: str, batch: slice, x_BTK: Tensor) -> None:
        """Keep the input of a group for a micro-batch, if it is one that is played."""
        part = _INPUT_OF.get(group)
        if part is not None:
            self._keep(part, batch, x_BTK)

    @contextmanager
    def playing(self, batch: slice) -> Iterator[None]:
        """Inside, a forward of this micro-batch takes what is kept instead of computing it."""
        with ExitStack() as undo:
            if self._has("attention output", batch):
                undo.enter_context(self._replaced("o", lambda _: (self._part("attention output", batch), None)))
            elif self._has("attention input", batch):
                undo.enter_context(self._replaced("o", lambda site: (self._attend(site, batch), None)))
            if self._has("feed-forward input", batch):
                undo.enter_context(
                    self._replaced("down", lambda site: site.module(self._part("feed-forward input", batch)))
                )
            yield

    def _attend(self, site: Site, batch: slice) -> Tensor:
        y_BTD = site.module(self._part("attention input", batch))
        if _fits(self._buffers["attention input"], y_BTD):
            self._buffers["attention output"] = self._buffers["attention input"]
        self._keep("attention output", batch, y_BTD)
        return y_BTD

    def _part(self, part: Part, batch: slice) -> Tensor:
        """A copy with an allocation of its own: where numbers lie in memory may change the bits of their product."""
        return self._buffers[part][batch].clone().to(self._groups["o"][0].module.weight.device)

    def _keep(self, part: Part, batch: slice, x_BTK: Tensor) -> None:
        buffer = self._buffers.get(part)
        if buffer is None or not _fits(buffer, x_BTK):
            buffer = self._buffers[part] = self._stream.buffer(x_BTK.shape[-1], x_BTK.dtype)
        buffer[batch] = x_BTK
        for other, kept in self._kept.items():
            if other != part and self._buffers[other] is buffer:
                kept.starts.discard(batch.start)  # it was there until now
        kept = self._kept.get(part)
        if kept is None or not _same(kept.weights, self._made_with(part)):
            kept = self._kept[part] = _Kept(self._made_with(part), set())
        kept.starts.add(batch.start)

    def _has(self, part: Part, batch: slice) -> bool:
        """Whether a part is there for this micro-batch, and still true."""
        kept = self._kept.get(part)
        return kept is not None and batch.start in kept.starts and _same(kept.weights, self._made_with(part))

    def _made_with(self, part: Part) -> list[Tensor]:
        weights = [site.module.weight for name in _MADE_WITH[part] for site in self._groups.get(name, ())]
        return weights + [parameter.installed for parameter in self._others]

    @contextmanager
    def _replaced(self, group: str, play: Callable[[Site], Any]) -> Iterator[None]:
        """The module around a group's layer gives what `play` gives."""
        site = self._groups[group][0]
        around = next(module for module in self._module.modules() if site.module in module.children())
        around.forward = lambda *_, **__: play(site)
        try:
            yield
        finally:
            del around.forward


@dataclass(frozen=True, slots=True)
class _Kept:
    """The weights that a part was computed with, and the micro-batches that are there, by their first sample."""

    weights: list[Tensor]
    starts: set[int]


def _fits(buffer_NTK: Tensor, x_BTK: Tensor) -> bool:
    return buffer_NTK.shape[-1] == x_BTK.shape[-1] and buffer_NTK.dtype is x_BTK.dtype


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))
