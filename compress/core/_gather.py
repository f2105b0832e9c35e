"""Gathering statistics: the only forward hooks of the product.

Shapes: B samples, T positions; N tokens, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.core._activations import Activations
from compress.core._block import Block, Group
from compress.core._experts import UnfusedExperts
from compress.core._playback import Playback
from compress.core._skeleton import keeping_casts
from compress.core.statistics import Statistic

Order = Literal["block", "groups"]
WAVE_BYTES = 512 << 20

See = Callable[[Tensor, Tensor, "Tensor | None"], None]
"""see(x, y, share): inputs [N, K] and outputs [N, R] of a module, one row for each token of a micro-batch that reaches
it; of an expert's layers also the weight that the expert gets for the token, [N]."""

Watch = Callable[[Block], Iterable[tuple[nn.Module, See]]]
"""The modules of a block that somebody wants to see at work, with the original weights on all tokens."""


@dataclass(frozen=True)
class Preparation:
    """Work on each block before anybody else sees it, which leaves the block's function as it is: `apply` gets the
    block with `statistics` of the original weights."""

    statistics: frozenset[type[Statistic]]
    apply: Callable[[Block], None]


class Gathering:
    """Decides which groups' statistics are gathered by which forward.

    "block": before the block is handed out, by the forward that also gives the targets. "groups": when first read, by
    forwards that start where the last one stopped and stop at the group. Either way one forward holds at most
    WAVE_BYTES of statistics (and at least one group's): the experts of a large mixture are gathered in several waves,
    each in the state of the weights that the order asks for.

    A preparation sees all groups' statistics of the original weights. In block order the method's are gathered by the
    same forward and follow what is folded; in group order they are gathered from the prepared weights.
    """

    def __init__(
        self,
        stream: Activations | None,
        collect: tuple[type[Statistic], ...],
        order: Order,
        device: str,
        preparation: Preparation | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self._stream = stream
        self._collect = collect
        self._order: Order = order
        self._device = device
        self._preparation = preparation
        self._preparing = False
        self.playback = None if stream is None else Playback(stream)

    def before(self, block: Block, *, all_targets: bool) -> None:
        """What is due before the caller sees the block: its targets (all, or those of the judged micro-batches), and
        in block order its statistics."""
        self._preparing = self._preparation is not None
        if self.playback is not None:
            self.playback.start(block)
            due = self._order == "block" or self._preparing
            wave = self._wave(block.groups) if due and self._kinds else []
            watched = [] if self._watch is None else list(self._watch(block))
            self._forward(block, wave, targets="all" if all_targets or watched else "judged", watched=watched)

    def prepared(self, block: Block) -> None:
        """What was prepared is what the method works on."""
        self._preparing = False
        block.settle()
        for group in block.groups:
            if self._order == "groups" or group.routed:
                group.forget()
            else:
                group.forget_all_but(self._collect)
        if self.playback is not None:
            self.playback.start(block)

    def done(self) -> None:
        """The block has been worked on: free what is kept of it."""
        if self.playback is not None:
            self.playback.forget()

    @property
    def _kinds(self) -> tuple[type[Statistic], ...]:
        """What is gathered now."""
        if not self._preparing or self._preparation is None:
            return self._collect
        kept = self._collect if self._order == "block" else ()
        return (*kept, *(kind for kind in self._preparation.statistics if kind not in kept))

    def read(self, block: Block, group: Group) -> None:
        """Gather `group`'s statistics now, with whatever else fits in the same forward."""
        if self._stream is None:
            group.set_statistics({}, 0)
            return
        waiting = [other for other in block.groups[block.groups.index(group) :] if not other.gathered]
        if self._preparing:  # folds so far left this group's inputs as they were
            self._forward(block, self._wave(waiting), targets="none")
        elif self._order == "groups":
            waiting = [other for other in waiting if other.depth == group.depth]
            self._forward(block, self._wave(waiting), targets="none")
        else:
            with original_weights(block):
                self._forward(block, self._wave(waiting), targets="none")

    def _wave(self, groups: Sequence[Group]) -> list[Group]:
        wave: list[Group] = []
        room = WAVE_BYTES
        for group in groups:
            room -= sum(kind.bytes_for(group.width) for kind in self._kinds)
            if wave and room < 0:
                break
            wave.append(group)
        return wave

    @torch.no_grad()
    def _forward(
        self,
        block: Block,
        wave: list[Group],
        *,
        targets: Literal["all", "judged", "none"],
        watched: Sequence[tuple[nn.Module, See]] = (),
    ) -> None:
        stream, playback = self._stream, self.playback
        if stream is None or playback is None:
            return
        in_order = self._order == "groups" and not self._preparing
        taps = [_Tap(group, self._kinds, self._device, playback if in_order else None) for group in wave]
        experts = next((module for module in block.module.modules() if isinstance(module, UnfusedExperts)), None)
        deepest = [tap for tap in taps if tap.group.depth == max(group.depth for group in wave)]
        last = deepest[0] if len(deepest) == 1 else None  # behind it nothing is of interest, unless it is a target
        witnesses = [_Witness(see, experts) for _, see in watched]
        with ExitStack() as hooks:
            hooks.enter_context(keeping_casts(block.module))
            for tap in taps:
                hook = tap.hook(experts)
                hooks.callback(tap.group.sites[0].module.register_forward_pre_hook(hook).remove)
            for (module, _), witness in zip(watched, witnesses, strict=True):
                hooks.callback(module.register_forward_hook(witness).remove)
            for batch, judged in stream.judged():
                wanted = targets == "all" or (judged and targets == "judged")
                if not (wanted or taps):
                    continue
                if last is not None:
                    last.stop = not wanted
                counted = stream.counted(batch)
                counted = None if counted is None else counted.to(self._device)
                for tap in taps:
                    tap.counted, tap.batch = counted, batch
                for witness in witnesses:
                    witness.counted = counted
                try:
                    with playback.playing(batch):
                        y_BTD = block.forward(stream.inputs[batch].to(self._device))
                except _Reached:
                    continue
                if wanted:
                    stream.targets[batch] = y_BTD
        for tap in taps:
            tap.group.set_statistics(tap.running, tap.tokens)


class _Reached(Exception):
    """The group was reached and nothing after it is of interest: ends a forward early, never seen outside."""


class _Tap:
    """Collects what flows into one group."""

    def __init__(
        self, group: Group, collect: tuple[type[Statistic], ...], device: str, playback: Playback | None
    ) -> None:
        self.group = group
        self.playback = playback
        self.batch = slice(0)
        self.running = {kind: kind(group.width, device) for kind in collect}
        self.tokens = 0
        self.counted: Tensor | None = None
        self.stop = False

    def hook(self, experts: UnfusedExperts | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.playback is not None:
                self.playback.keep(self.group.name, self.batch, inputs[0])
            x_NK: Tensor = inputs[0].reshape(-1, self.group.width)
            if self.counted is not None:
                routed = experts.rows if experts is not None and self.group.routed else None
                x_NK = x_NK[self.counted if routed is None else self.counted[routed]]
            self.tokens += len(x_NK)
            for statistic in self.running.values():
                statistic.update(x_NK)
            if self.stop:
                raise _Reached

        return listen


class _Witness:
    """Shows somebody what goes through a module, without padding."""

    def __init__(self, see: See, experts: UnfusedExperts | None) -> None:
        self._see = see
        self._experts = experts
        self.counted: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_NK, y_NR = (value.reshape(-1, value.shape[-1]) for value in (inputs[0], output))
        rows, shares = (None, None) if self._experts is None else (self._experts.rows, self._experts.shares)
        if self.counted is not None:
            real = self.counted if rows is None else self.counted[rows]
            x_NK, y_NR, shares = x_NK[real], y_NR[real], None if shares is None else shares[real]
        self._see(x_NK, y_NR, shares)


@contextmanager
def original_weights(block: Block) -> Iterator[None]:
    """The block as it was before its sites were replaced."""
    replaced = {site: site.module.weight for site in block.sites}
    for site in replaced:
        site.module.weight = site.original
    try:
        yield
    finally:
        for site, weight in replaced.items():
            site.module.weight = weight
