"""How much the model minds an error in each linear layer: one forward and one backward pass, one block in memory.

If the outputs of a layer move by E x, the KL divergence of what the model foretells grows, to second order, by
½ E[(g·E x)²], where g is the gradient, at those outputs, of the log-likelihood of tokens drawn from the model itself
(Fisher information; Martens, 2014, arXiv:1412.1193). Inputs and gradients are taken as independent, and gradients of
different outputs, too (K-FAC; Martens & Grosse, 2015, arXiv:1503.05671): ½ Σ_o E[g_o²] (E H Eᵀ)_oo, with H = E[x xᵀ].

Shapes: N tokens, T positions, D hidden width, V vocabulary; O output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core import walk as walking
from compress.core._activations import Activations, room
from compress.core._block import Block, Group
from compress.core._forward import LOGITS_BYTES, advance
from compress.core._trim import trim_memory
from compress.core.events import Finished, Listener, Progress, Started, silent
from compress.core.memory import SPILL_ABOVE_BYTES
from compress.core.statistics import Hessian, SquaredMean, Statistic

if TYPE_CHECKING:
    from pathlib import Path

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint

_STAGE = "sensitivities"


@dataclass(frozen=True, slots=True)
class Curvature:
    """Layers that read one input: its second moments, [K, K] or (of experts and lookups) the diagonal [K], and for each
    layer the mean square [O] of the gradient of the log-likelihood at its outputs, over all tokens."""

    name: str
    inputs: Tensor
    outputs: dict[str, Tensor]

    @property
    def family(self) -> str:
        """What is best treated alike: the group itself; of experts, all groups of one kind in a block."""
        block, marker, rest = self.name.partition(".experts.")
        return f"{block}{marker}{rest.rpartition('.')[2]}" if marker else self.name

    def loss(self, layer: str, error_RK: Tensor, rows: slice) -> float:
        """Nats a token by which KL grows if `error_RK` is what `rows` of a layer's weight are wrong by."""
        if self.inputs.dim() == 1:
            power_R = error_RK.square() @ self.inputs
        else:
            power_R = ((error_RK @ self.inputs) * error_RK).sum(1)
        return 0.5 * float(power_R @ self.outputs[layer][rows])


def curvatures(
    checkpoint: Checkpoint,
    tokens: Tokens,
    *,
    vocabulary: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    micro_batch: int | None = None,
    spill_folder: str | Path | None = None,
    spill_above_bytes: int = SPILL_ABOVE_BYTES,
    events: Listener = silent,
) -> Iterator[Curvature]:
    """The curvature of every group of layers, from the last block to the first; with `vocabulary` of the head before
    them and of the embedding after them. What each block reads is kept, in a file if it is much."""
    walking.reuse_freed_memory()
    compute = walking.compute_dtype(checkpoint, dtype, device)
    kept = walking.stream_dtype(checkpoint, dtype, device)
    stream = walking.fresh_stream(checkpoint, tokens, kept, micro_batch, spill_folder, spill_above_bytes)
    arguments = walking.fill_stream(checkpoint, tokens, stream, compute, device)
    count = checkpoint.num_blocks
    build = partial(_block, checkpoint, compute, device, arguments)
    read = _keep_inputs(build, count, stream, device, spill_folder, spill_above_bytes)
    total = int(tokens.ids.numel() if tokens.lengths is None else tokens.lengths.sum())
    events(Started(_STAGE, count))
    gradient = room(tuple(stream.inputs.shape), torch.float32, spill_folder, above_bytes=spill_above_bytes)
    head = _head(checkpoint, stream, gradient, compute, device, seed, total)
    if vocabulary:
        yield head
    del head
    for index in reversed(range(count)):
        block = build(index)
        yield from _backward(block, stream, read[index], gradient, device, total)
        block.close()
        trim_memory()
        events(Progress(_STAGE, count - index, count, block.name))
    if vocabulary:
        yield _embedding(checkpoint, tokens, stream, gradient, total)
    events(Finished(_STAGE, f"{count} blocks"))


def _block(checkpoint: Checkpoint, dtype: torch.dtype, device: str, arguments: Any, index: int) -> Block:
    return walking.open_block(checkpoint, index, dtype, device, arguments[index], _nothing_to_gather)


def _nothing_to_gather(block: Block, group: Group) -> None:
    group.set_statistics({}, 0)


def _keep_inputs(
    build: Callable[[int], Block],
    count: int,
    stream: Activations,
    device: str,
    spill_folder: str | Path | None,
    spill_above_bytes: int,
) -> Tensor:
    """What each block reads, [blocks, samples, T, D]; the stream ends as what the last one gives."""
    shape = (count, *stream.inputs.shape)
    read = room(shape, stream.inputs.dtype, spill_folder, above_bytes=spill_above_bytes)
    for index in range(count):
        block = build(index)
        read[index] = stream.inputs
        advance(block, stream, device)
        block.close()
        trim_memory()
    return read


class _Taps:
    """Sums over a group of layers: moments of its input, squares of the gradients at its outputs."""

    def __init__(self, group: Group, device: str) -> None:
        kind: type[Statistic] = SquaredMean if group.routed else Hessian
        self.inputs = kind(group.width, device)
        self.squares = {site.name: torch.zeros(site.shape[0], device=device) for site in group.sites}

    def read(self, counted: Tensor | None, x: Tensor) -> None:
        x_NK = x.detach().reshape(-1, x.shape[-1])
        self.inputs.update(x_NK if counted is None or len(counted) != len(x_NK) else x_NK[counted])

    def wrote(self, name: str, gradient: Tensor) -> None:
        self.squares[name] += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)


def _backward(
    block: Block, stream: Activations, read: Tensor, gradient: Tensor, device: str, total: int
) -> Iterator[Curvature]:
    """Pass the gradient back through one block, in place, and give the curvature of its groups."""
    taps = {group.name: _Taps(group, device) for group in block.groups}
    for batch in stream.batches():
        counted = stream.counted(batch)
        with ExitStack() as hooks, torch.enable_grad():
            for group in block.groups:
                for place, site in enumerate(group.sites):
                    hook = _hook(taps[group.name], site.name, counted if place == 0 else None, reads=place == 0)
                    hooks.callback(site.module.register_forward_hook(hook).remove)
            x_BTD = read[batch].to(device, torch.float32).requires_grad_()
            block.forward(x_BTD).backward(gradient[batch].to(device, block.dtype))
        if x_BTD.grad is not None:
            gradient[batch] = x_BTD.grad
    for group in block.groups:
        tap = taps.pop(group.name)
        squares = {name: square_O / total for name, square_O in tap.squares.items()}
        yield Curvature(f"{block.name}.{group.name}", tap.inputs.result(), squares)


def _hook(tap: _Taps, name: str, counted: Tensor | None, *, reads: bool) -> Callable[[Any, Any, Tensor], None]:
    def listen(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if reads:
            tap.read(counted, inputs[0])
        if output.requires_grad:
            output.register_hook(partial(tap.wrote, name))

    return listen


def _head(
    checkpoint: Checkpoint,
    stream: Activations,
    gradient: Tensor,
    dtype: torch.dtype,
    device: str,
    seed: int,
    total: int,
) -> Curvature:
    """Fill `gradient` with that of the log-likelihood of drawn tokens at the last block's outputs; the head's own
    curvature. Positions go some at a time: norm and head work on each by itself."""
    model = checkpoint.build_head(dtype, device)
    name = checkpoint.architecture.head
    head = model.get_submodule(name)
    width = stream.inputs.shape[-1]
    inputs = Hessian(width, device)
    squares_V = torch.zeros(checkpoint.config["vocab_size"], device=device)
    generator = torch.Generator().manual_seed(seed)
    flat_ND, gradient_ND = stream.inputs.view(-1, width), gradient.view(-1, width)
    gradient_ND.zero_()
    for rows_P in _places(stream).split(max(1, LOGITS_BYTES // (4 * len(squares_V)))):
        with ExitStack() as hooks, torch.enable_grad():
            hooks.callback(head.register_forward_pre_hook(lambda _, given: inputs.update(given[0][0].detach())).remove)
            x_PD = flat_ND[rows_P].to(device, dtype).requires_grad_()
            logits = model(inputs_embeds=x_PD[None], use_cache=False).logits[0].float()
            logits_PV, graph = logits.detach().requires_grad_(), logits
            log_PV = torch.log_softmax(logits_PV, -1)
            drawn_P = torch.multinomial(log_PV.detach().exp().cpu(), 1, generator=generator)[:, 0].to(device)
            log_PV.gather(1, drawn_P[:, None]).sum().backward()
            if logits_PV.grad is not None:
                squares_V += logits_PV.grad.square().sum(0)
                graph.backward(logits_PV.grad)
        if x_PD.grad is not None:
            gradient_ND[rows_P] = x_PD.grad.float().cpu()
    return Curvature(name, inputs.result(), {name: squares_V / total})


def _places(stream: Activations) -> Tensor:
    """Flattened positions that are tokens."""
    places_N = torch.arange(stream.inputs.shape[0] * stream.inputs.shape[1])
    every = [stream.counted(batch) for batch in stream.batches()]
    return places_N[torch.cat([part for part in every if part is not None])] if every[0] is not None else places_N


def _embedding(checkpoint: Checkpoint, tokens: Tokens, stream: Activations, gradient: Tensor, total: int) -> Curvature:
    """Of lookups: a row counts as often as its token was read (and once more, for those never seen)."""
    name = checkpoint.architecture.embedding
    scale = float(getattr(checkpoint.skeleton.module(name), "embed_scale", 1.0))
    rows = checkpoint.matrix_shape(checkpoint.embedding_tensor.removesuffix(".weight"))[0]
    ids_N = tokens.ids.reshape(-1)[_places(stream)]
    share_V = (torch.bincount(ids_N, minlength=rows) + 1.0) / (total + rows)
    squares_D = gradient.view(-1, gradient.shape[-1]).square().sum(0) / total
    return Curvature(name, squares_D * scale**2, {name: share_V.float()})
