"""Running parts of a model: embedding, each layer's keyword arguments, a block over all samples, the head.

Shapes: B samples, T positions, D hidden width, V vocabulary; N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core._activations import Activations
from compress.core._block import Block
from compress.core._playback import Playback
from compress.core._skeleton import fill, keeping_casts
from compress.core.errors import InputError

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

LOGITS_BYTES = 64 << 20


@torch.no_grad()
def embed(checkpoint: Checkpoint, ids_NT: Tensor, stream: Activations, dtype: torch.dtype) -> None:
    """Fill the stream's inputs with embeddings. Only the rows of tokens that occur are read."""
    name = checkpoint.embedding_tensor
    module = checkpoint.skeleton.module(checkpoint.architecture.embedding)
    vars(module)["padding_idx"] = None  # rows are renumbered below
    largest = int(ids_NT.max())
    rows = checkpoint.matrix_shape(name.removesuffix(".weight"))[0]
    if largest >= rows or int(ids_NT.min()) < 0:
        raise InputError(f"token {largest} is outside of the vocabulary of {rows} rows", where=name)
    for batch in stream.batches():
        ids_BT = ids_NT[batch]
        occurring, places = torch.unique(ids_BT, return_inverse=True)
        fill(module, "weight", checkpoint.rows(name, occurring), dtype, "cpu")
        stream.inputs[batch] = module(places)


class _Recorder(nn.Module):
    """A layer that does nothing but remember with which keyword arguments it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: Mapping[str, Any] = {}

    def forward(self, x_BTD: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return x_BTD


@torch.no_grad()
def layer_arguments(checkpoint: Checkpoint, length: int, dtype: torch.dtype, device: str) -> list[Mapping[str, Any]]:
    """What the model passes to each of its layers: masks and rotary embeddings differ between layers.

    The model's own forward runs once over layers that only record, for one sample: masks and rotary embeddings of one
    sample broadcast over a batch.
    """
    layers = [_Recorder() for _ in range(checkpoint.num_blocks)]
    model = checkpoint.skeleton.without_layers(list(layers))
    x_BTD = torch.zeros(1, 1, 1, dtype=dtype).expand(1, length, checkpoint.config["hidden_size"])
    model(inputs_embeds=x_BTD, use_cache=False)
    return [_on_device(layer.arguments, device) for layer in layers]


def _on_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on_device(item, device) for name, item in value.items()}
    return tuple(_on_device(item, device) for item in value) if isinstance(value, tuple) else value


@torch.no_grad()
def advance(
    block: Block,
    stream: Activations | None,
    device: str,
    *,
    playback: Playback | None = None,
    compare: bool = False,
    last: bool = False,
) -> float | None:
    """Overwrite the stream's inputs with the block's outputs; what `playback` has is not computed again. `compare`:
    return their relative error to the targets, on the judged micro-batches. Behind the `last` block nobody reads the
    outputs: only judged ones are computed."""
    if stream is None:
        return None
    wrong = size = 0.0
    with keeping_casts(block.module):
        for batch, judged in stream.judged():
            if last and not (compare and judged):
                continue
            with nullcontext() if playback is None else playback.playing(batch):
                stream.inputs[batch] = block.forward(stream.inputs[batch].to(device))
            if compare and judged:
                wrong_here, size_here = _squares(stream.inputs[batch], stream.targets[batch], stream.counted(batch))
                wrong, size = wrong + wrong_here, size + size_here
    return wrong / size if compare and size else None


def _squares(y_BTD: Tensor, target_BTD: Tensor, counted: Tensor | None) -> tuple[float, float]:
    """Sums of (y - target)² and target² over tokens."""
    y_ND, target_ND = (t.reshape(-1, t.shape[-1]).float() for t in (y_BTD, target_BTD))
    if counted is not None:
        y_ND, target_ND = y_ND[counted], target_ND[counted]
    return float((y_ND - target_ND).square_().sum()), float(target_ND.square().sum())


@torch.no_grad()
def logits(checkpoint: Checkpoint, stream: Activations, dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """Final norm and head over the stream, a few samples at a time, by the model's own forward (soft-capping …)."""
    model = checkpoint.build_head(dtype, device)
    bytes_per_sample = stream.inputs.shape[1] * checkpoint.config["vocab_size"] * dtype.itemsize
    step = max(1, LOGITS_BYTES // bytes_per_sample)
    for start in range(0, len(stream.inputs), step):
        yield model(inputs_embeds=stream.inputs[start : start + step].to(device, dtype), use_cache=False).logits
