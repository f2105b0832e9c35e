"""Learned rounding: codes and scales of one block, by signed gradient descent on the block's output.

A layer's codes are round(place), a real number for every weight; its scales are start · stretch. The block runs with
the dequantized weights as ordinary parameters, and their gradient g is handed on in closed form: to places straight
through the rounding (g · scale), to stretches exactly (Σ g · level · start over the group). Nothing else is learned. A
place starts inside the bin of the code that the starting method chose, where the weight itself is nearest.

Shape suffixes: O outputs, K inputs, G groups, S channels of one; B samples, T positions, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.core.passes import Job
from compress.core.tensors import QuantTensor
from compress.core.walk import Block, Site, stream_outputs
from quantize._learned_aim import aim_behind

_HELD_BACK_EVERY, _HELD_BACK_MOST = 8, 8  # samples that are not learned from: on them the result has to be better
_INSIDE = 0.45  # how far from the middle of its bin a place may start: nearer to the edge noise would flip it
_OUTSIDE = 0.499  # how far a place may go beyond the outermost codes
_CACHED_WEIGHTS = 1 << 18
_SEED_STRIDE = 1_000_003  # blocks draw from generators of their own: a resumed run continues as if never stopped


@dataclass(frozen=True, slots=True)
class Learning:
    """steps updates on tokens_per_step tokens each. A place can travel `reach` steps of the grid in all, a scale
    `scale_reach` of itself: the sum of the updates, which shrink linearly."""

    steps: int
    tokens_per_step: int
    reach: float
    scale_reach: float


def original_outputs(job: Job) -> Iterator[list[Tensor]]:
    """The outputs [T, D] of all samples behind every unfinished block of the original model, on its own inputs. Those
    of one block are overwritten by the next one's.

    What learning aims at: a block then makes up for what the compressed blocks before it got wrong.
    """
    done = job.sink.finished()
    if done == job.checkpoint.num_blocks or job.calibration is None:
        return
    outputs = stream_outputs(
        job.checkpoint,
        job.calibration,
        device=job.device,
        dtype=job.dtype,
        micro_batch=job.micro_batch,
        spill_folder=job.spill_folder,
        spill_above_bytes=job.spill_above_bytes,
    )
    for index, output_NTD in enumerate(outputs):
        if index >= done:
            yield list(output_NTD)


def learn_block(block: Block, sites: Sequence[Site], targets: list[Tensor], how: Learning, job: Job) -> float:
    """Improve the codes and scales of `sites`, which hold QuantTensors, so that the block's outputs on its (compressed)
    inputs come near `targets`. Returns what is left of the error on samples held back: 1 where nothing was gained, and
    then the sites are as they were."""
    samples = _Samples(block, targets, job)
    before = samples.error(samples.held_back)
    learned = [_Rounding(site, keep_zeros=job.checkpoint.kind == "masked") for site in sites]
    generator = torch.Generator().manual_seed(job.seed * _SEED_STRIDE + block.index)
    for step, batch in enumerate(samples.draw(how, generator)):
        decay = 2 * (1 - step / how.steps) / (how.steps + 1)
        samples.backward(batch)
        for rounding in learned:
            rounding.update(how.reach * decay, how.scale_reach * decay)
    after = samples.error(samples.held_back)
    better = after < before  # False for what is not finite
    for rounding in learned:
        rounding.settle(keep=better)
    return after / before if better else 1.0


class _Samples:
    """The block's inputs with what its outputs should be, sample by sample."""

    def __init__(self, block: Block, targets: list[Tensor], job: Job) -> None:
        self._block = block
        self._aim = aim_behind(block.index, job)
        self._device = job.device
        self._inputs = [sample for batch in block.inputs for sample in batch]
        self._targets = targets
        self._lengths = None if job.calibration is None else job.calibration.lengths
        everything = list(range(len(self._inputs)))
        self.held_back = everything[::_HELD_BACK_EVERY][:_HELD_BACK_MOST]
        kept = set(self.held_back)
        self._learned_from = [index for index in everything if index not in kept] or everything

    def draw(self, how: Learning, generator: torch.Generator) -> Iterator[list[int]]:
        """Samples of every step: all in a random order, then again."""
        count = len(self._learned_from)
        size = min(count, max(1, how.tokens_per_step // self._inputs[0].shape[0]))
        waiting: list[int] = []
        for _ in range(how.steps):
            if len(waiting) < size:
                waiting = torch.randperm(count, generator=generator).tolist()
            drawn, waiting = waiting[:size], waiting[size:]
            yield [self._learned_from[place] for place in drawn]

    def backward(self, samples: list[int]) -> None:
        """Gradients of the error, up to a factor that signs do not see."""
        y_BTD = self._block.forward(self._stack(self._inputs, samples))
        counted = self._counted(samples)
        y_ND = y_BTD.detach()[counted].float()
        target_ND = self._stack(self._targets, samples)[counted].float()
        gradient_BTD = torch.zeros_like(y_BTD)
        gradient_BTD[counted] = self._aim.gradient(y_ND, target_ND).mul_(max(1, y_ND.numel()) ** -0.5).to(y_BTD.dtype)
        y_BTD.backward(gradient_BTD)

    @torch.no_grad()
    def error(self, samples: list[int]) -> float:
        """Sum of the tokens' errors."""
        total = 0.0
        for index in samples:
            counted = self._counted([index])
            y_BTD = self._block.forward(self._stack(self._inputs, [index]))
            target_BTD = self._stack(self._targets, [index])
            total += self._aim.error(y_BTD[counted].float(), target_BTD[counted].float())
        return total

    def _counted(self, samples: list[int]) -> Tensor:
        """Which positions are tokens and no padding, bool [B, T]."""
        positions = torch.arange(self._inputs[0].shape[0])
        if self._lengths is None:
            return torch.ones(len(samples), len(positions), dtype=torch.bool)
        return positions < self._lengths[samples, None]

    def _stack(self, stream: list[Tensor], samples: list[int]) -> Tensor:
        return torch.stack([stream[index] for index in samples]).to(self._device)


class _Rounding:
    """One layer's codes and scales while they are learned, installed as its weight."""

    def __init__(self, site: Site, *, keep_zeros: bool) -> None:
        if not isinstance(site.replacement, QuantTensor):
            raise TypeError(f"{site.name} has no codes to start from")
        self._site, self._start = site, site.replacement
        scheme, device = self._start.scheme, site.original.device
        self._range = scheme.lowest - _OUTSIDE, scheme.highest + _OUTSIDE
        self._scale_OG1 = self._start.scale.to(device, torch.float32)[..., None]
        zero = self._start.zero
        self._zero_OG1 = None if zero is None else zero.to(device, torch.float32)[..., None]
        self._stretch_OG1 = torch.ones_like(self._scale_OG1)
        self._place_OGS = self._places(site.original.detach())
        self._still_OGS = site.original.detach().view(self._place_OGS.shape) == 0 if keep_zeros else None
        self._weight = nn.Parameter(torch.empty_like(site.module.weight, memory_format=torch.contiguous_format))
        self._weight_OGS = self._weight.detach().view(self._place_OGS.shape)
        self._installed = site.module.weight
        site.module.weight = self._weight
        for rows in self._parts():
            self._write(rows)

    def update(self, rate: float, scale_rate: float) -> None:
        """One step against the sign of the gradient."""
        if self._weight.grad is None:
            return  # an expert that this batch did not reach
        whole_OGS = self._weight.grad.view(self._place_OGS.shape)
        self._weight.grad = None
        for rows in self._parts():
            gradient_OGS, place_OGS = whole_OGS[rows].float(), self._place_OGS[rows]
            if self._still_OGS is not None:
                gradient_OGS.masked_fill_(self._still_OGS[rows], 0)
            slope_OG1 = torch.linalg.vecdot(gradient_OGS, self._level(rows))[..., None]
            sign_OG1 = self._scale_OG1[rows].sign()
            self._stretch_OG1[rows].sub_(slope_OG1.sign_().mul_(sign_OG1), alpha=scale_rate)
            place_OGS.addcmul_(gradient_OGS.sign_(), sign_OG1, value=-rate).clamp_(*self._range)
            self._write(rows)

    def settle(self, *, keep: bool) -> None:
        """Give the site what was learned, or back what it had."""
        if not keep:
            self._site.module.weight = self._installed
            return
        zero = self._start.zero
        codes_OK = self._place_OGS.round_().view(self._start.shape).to("cpu", torch.int8)
        scale_OG = self._scale()[..., 0].to("cpu", self._start.scale.dtype)
        self._site.replace(QuantTensor.from_codes(codes_OK, scale_OG, zero, self._start.scheme))
        self._site.record = replace(self._site.record, method="autoround", error=None)  # it was the start's

    def _places(self, weight_OK: Tensor) -> Tensor:
        codes_OGS = self._start.codes().to(weight_OK.device, torch.float32).unflatten(1, (self._scale_OG1.shape[1], -1))
        exact_OGS = weight_OK.float().reshape(codes_OGS.shape) / self._scale_OG1
        if self._zero_OG1 is not None:
            exact_OGS += self._zero_OG1
        return exact_OGS.sub_(codes_OGS).clamp_(-_INSIDE, _INSIDE).add_(codes_OGS)

    def _parts(self) -> Iterator[slice]:
        """Rows that fit in cache: an update passes over them a dozen times."""
        outputs, *groups = self._place_OGS.shape
        step = max(1, _CACHED_WEIGHTS // math.prod(groups))
        return (slice(start, start + step) for start in range(0, outputs, step))

    def _scale(self, rows: slice = slice(None)) -> Tensor:
        """As it will be stored."""
        return (self._scale_OG1[rows] * self._stretch_OG1[rows]).to(self._start.scale.dtype).float()

    def _level(self, rows: slice) -> Tensor:
        level_OGS = self._place_OGS[rows].round()
        return level_OGS if self._zero_OG1 is None else level_OGS.sub_(self._zero_OG1[rows])

    def _write(self, rows: slice) -> None:
        self._weight_OGS[rows] = self._level(rows).mul_(self._scale(rows))
