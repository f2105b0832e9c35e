"""walk(): the calibration generator. It takes a model through memory one block at a time, measures what reaches each
linear layer, lets the caller replace weights, and feeds the compressed block's output to the next block.

    for block in walk(checkpoint, tokens, collect={Hessian}, sink=sink):
        for group in block.groups:
            for site in group.sites:
                site.replace(method(site.weight, group.statistics[Hessian]))

Per block: forwards gather statistics, the caller works, the block's outputs with the new weights overwrite its inputs,
and the sink makes the block durable. In block order one forward with the original weights gathers everything, and a
second one makes the outputs. In group order (true sequential) every group sees the layers before it as they were
replaced, and a forward starts where the last one stopped: in all they cost one. A resumed walk loads finished blocks
from the sink and makes one plain forward: the same products on the same shapes, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from compress.core._activations import Activations, default_micro_batch
from compress.core._block import Block, BlockRecord, Group, Parameter, Site, SiteRecord
from compress.core._forward import advance, embed, layer_arguments, logits
from compress.core._gather import Gathering, Order, Preparation, See, Watch
from compress.core._trim import reuse_freed_memory, trim_memory
from compress.core.cpu import fast_on_cpu
from compress.core.errors import InputError, UsageError
from compress.core.events import Finished, Listener, Metric, Progress, Started, silent
from compress.core.memory import SPILL_ABOVE_BYTES
from compress.core.safetensors_io import torch_dtype
from compress.core.statistics import Statistic

if TYPE_CHECKING:
    from pathlib import Path

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.cuts import Cuts
    from compress.core.tensors import QuantTensor

__all__ = [
    "Block",
    "BlockRecord",
    "BlockSink",
    "Group",
    "Preparation",
    "See",
    "Site",
    "SiteRecord",
    "Watch",
    "compute_dtype",
    "default_micro_batch",
    "measure",
    "stream_dtype",
    "stream_logits",
    "stream_outputs",
    "walk",
]


class BlockSink(Protocol):
    """Keeps finished blocks. commit() gets only what was replaced: the rest of the block is as in the source. Of what
    is stored, `cuts` leaves something out; load() gives it with zeros there. become(): the source is another one.
    attach(): a file beside the weights. add(): what config.json becomes, and tensors beside those of the blocks."""

    def finished(self) -> int: ...
    def load(self, index: int) -> Mapping[str, Tensor | QuantTensor]: ...
    def record(self, index: int) -> BlockRecord: ...
    def commit(self, index: int, tensors: dict[str, Tensor | QuantTensor], record: BlockRecord, cuts: Cuts) -> None: ...
    def become(self, source: Checkpoint) -> None: ...
    def attach(self, name: str, content: str | Mapping[str, Tensor]) -> None: ...
    def add(self, describe: Callable[[dict[str, Any]], dict[str, Any]], tensors: Mapping[str, Tensor]) -> None: ...


def walk(
    checkpoint: Checkpoint,
    batches: Tokens | None,
    *,
    collect: Iterable[type[Statistic]] = (),
    order: Order = "block",
    keep: Iterable[str] = (),
    preparation: Preparation | None = None,
    watch: Watch | None = None,
    sink: BlockSink | None = None,
    stored_like: Checkpoint | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    micro_batch: int | None = None,
    spill_folder: str | Path | None = None,
    spill_above_bytes: int = SPILL_ABOVE_BYTES,
    events: Listener = silent,
) -> Iterator[Block]:
    """Yield the blocks that the sink has not finished yet, in order; after each loop body the block is committed.

    `batches` None walks the weights without any forward. `order="groups"` gathers a group's statistics when they are
    first read, after earlier groups were replaced (true sequential). `keep` names what a block offers as streams:
    "inputs", "targets". `preparation` works on each block before it is yielded; what it leaves dense is rounded to the
    dtypes of `stored_like` (None: the checkpoint itself). `watch` sees modules at work, before a block is yielded.
    `micro_batch` samples go through a block at once (None: about 1024 tokens).
    """
    reuse_freed_memory()
    compute = compute_dtype(checkpoint, dtype, device)
    done = sink.finished() if sink is not None else 0
    if done == checkpoint.num_blocks:
        return
    stream = None
    arguments: Sequence[Mapping[str, Any]] = [{}] * checkpoint.num_blocks
    if batches is not None:
        kept = stream_dtype(checkpoint, dtype, device)
        stream = fresh_stream(checkpoint, batches, kept, micro_batch, spill_folder, spill_above_bytes)
        arguments = fill_stream(checkpoint, batches, stream, compute, device)
    gathering = Gathering(stream, tuple(collect), order, device, preparation, watch)
    stored = partial(_stored_dtype, stored_like or checkpoint)
    read_only = sink is None
    events(Started("walk", checkpoint.num_blocks))
    for index in range(checkpoint.num_blocks):
        if index < done and stream is None:
            continue
        block = open_block(checkpoint, index, compute, device, arguments[index], gathering.read)
        block.parameters = {found.name: found for found in _parameters(checkpoint, block, stored)}
        last = index == checkpoint.num_blocks - 1
        if sink is not None and index < done:
            block.install(sink.load(index))
            advance(block, stream, device, last=last)
        else:
            gathering.before(block, all_targets=read_only or "targets" in keep)
            if preparation is not None:
                preparation.apply(block)
                gathering.prepared(block)
            _offer(block, stream, frozenset(keep))
            trim_memory()
            yield block
            trim_memory()
            if preparation is not None:
                block.round_prepared(stored)
            if read_only and stream is not None and not block.replacements():
                stream.swap()  # the targets are the outputs
                error = 0.0
            else:
                playback = gathering.playback
                error = advance(block, stream, device, playback=playback, compare=True, last=last)
                gathering.done()
            record = block.record(error)
            _require_finite(record, checkpoint)
            if error is not None:
                events(Metric("walk", "output_error", error, block.name))
            if sink is not None:
                sink.commit(index, block.replacements(), record, block.cuts)
        events(Progress("walk", index + 1, checkpoint.num_blocks, block.name))
        block.close()
        trim_memory()
    events(Finished("walk", f"{checkpoint.num_blocks} blocks"))


def _require_finite(record: BlockRecord, checkpoint: Checkpoint) -> None:
    """InputError if an error is no finite number: then values of the model overflowed on the way to it."""
    errors = {record.name: record.output_error} | {site.name: site.error for site in record.sites}
    overflowing = next((name for name, error in errors.items() if error is not None and not isfinite(error)), None)
    if overflowing is not None:
        raise InputError(
            f"{overflowing}: the error of its outputs is no finite number, so its weights or inputs overflow fp32",
            where=str(checkpoint.folder),
            hint="check that the original model computes finite numbers: look at its weights and at rope_theta and "
            "rms_norm_eps in config.json",
        )


def measure(
    checkpoint: Checkpoint,
    batches: Tokens | None,
    collect: Iterable[type[Statistic]],
    *,
    keep: Iterable[str] = (),
    watch: Watch | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    micro_batch: int | None = None,
    spill_folder: str | Path | None = None,
    spill_above_bytes: int = SPILL_ABOVE_BYTES,
    events: Listener = silent,
) -> Iterator[Block]:
    """Yield every block with its original weights and statistics, for methods that must see all layers first. `keep`:
    as in walk()."""
    for block in walk(
        checkpoint,
        batches,
        collect=collect,
        keep=keep,
        watch=watch,
        device=device,
        dtype=dtype,
        micro_batch=micro_batch,
        spill_folder=spill_folder,
        spill_above_bytes=spill_above_bytes,
        events=events,
    ):
        yield block
        if block.replacements() or block.cuts:
            raise UsageError(f"{block.name} was changed inside measure(), which only reads: use walk()")


def stream_logits(
    checkpoint: Checkpoint,
    tokens: Tokens,
    *,
    dtype: str | torch.dtype = "auto",
    micro_batch: int | None = None,
    device: str = "cpu",
    spill_folder: str | Path | None = None,
    spill_above_bytes: int = SPILL_ABOVE_BYTES,
) -> Iterator[Tensor]:
    """Yield logits [B, T, V] of all samples in order, with one block in memory at a time (models larger than RAM)."""
    compute = compute_dtype(checkpoint, dtype, device)
    kept = stream_dtype(checkpoint, dtype, device)
    stream = fresh_stream(checkpoint, tokens, kept, micro_batch, spill_folder, spill_above_bytes)
    for _ in _advancing(checkpoint, tokens, stream, compute, device):
        pass
    yield from logits(checkpoint, stream, compute, device)


def stream_outputs(
    checkpoint: Checkpoint,
    tokens: Tokens,
    *,
    dtype: str | torch.dtype = "auto",
    micro_batch: int | None = None,
    device: str = "cpu",
    spill_folder: str | Path | None = None,
    spill_above_bytes: int = SPILL_ABOVE_BYTES,
) -> Iterator[Tensor]:
    """Yield the outputs [N, T, D] of every block with its original weights: one buffer, which the next block's
    outputs overwrite."""
    kept = stream_dtype(checkpoint, dtype, device)
    stream = fresh_stream(checkpoint, tokens, kept, micro_batch, spill_folder, spill_above_bytes)
    compute = compute_dtype(checkpoint, dtype, device)
    for _ in _advancing(checkpoint, tokens, stream, compute, device):
        yield stream.inputs


def _advancing(
    checkpoint: Checkpoint, tokens: Tokens, stream: Activations, compute: torch.dtype, device: str
) -> Iterator[int]:
    """Yield each index when the stream holds that block's outputs."""
    arguments = fill_stream(checkpoint, tokens, stream, compute, device)
    for index in range(checkpoint.num_blocks):
        block = open_block(checkpoint, index, compute, device, arguments[index])
        advance(block, stream, device)
        block.close()
        trim_memory()
        yield index


def compute_dtype(checkpoint: Checkpoint, dtype: str | torch.dtype, device: str) -> torch.dtype:
    """The dtype of the forward. "auto" is the checkpoint's own, but fp32 where a CPU is slow at that."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" and not fast_on_cpu(checkpoint.dtype) else checkpoint.dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    return found


def stream_dtype(checkpoint: Checkpoint, dtype: str | torch.dtype, device: str) -> torch.dtype:
    """The dtype of hidden states between blocks: that of the forward, but bf16 models keep bf16 when left to choose."""
    automatic = dtype == "auto" and checkpoint.dtype is torch.bfloat16
    return torch.bfloat16 if automatic else compute_dtype(checkpoint, dtype, device)


def fresh_stream(
    checkpoint: Checkpoint,
    tokens: Tokens,
    kept: torch.dtype,
    micro_batch: int | None,
    spill_folder: str | Path | None,
    spill_above_bytes: int,
) -> Activations:
    """Room for the hidden states of all samples."""
    samples, length = tokens.ids.shape
    return Activations(
        (samples, length, checkpoint.config["hidden_size"]),
        tokens.lengths,
        dtype=kept,
        micro_batch=micro_batch or default_micro_batch(length),
        spill_folder=spill_folder,
        spill_above_bytes=spill_above_bytes,
    )


def fill_stream(
    checkpoint: Checkpoint, tokens: Tokens, stream: Activations, compute: torch.dtype, device: str
) -> Sequence[Mapping[str, Any]]:
    """Fill the stream with embeddings; return each layer's own keyword arguments."""
    embed(checkpoint, tokens.ids, stream, compute)
    return layer_arguments(checkpoint, tokens.ids.shape[1], compute, device)


def open_block(
    checkpoint: Checkpoint,
    index: int,
    compute: torch.dtype,
    device: str,
    arguments: Mapping[str, Any],
    gather: Callable[[Block, Group], None] | None = None,
) -> Block:
    """Block `index` with its weights; with `gather`, which reads a group's statistics, also with its groups."""
    module = checkpoint.build_block(index, compute, device)
    block = Block(index, checkpoint.block_name(index), module, arguments, compute)
    if gather is not None:
        block.groups = tuple(
            Group(name, _sites(checkpoint, block, sites), depth, partial(gather, block))
            for name, sites, depth in checkpoint.groups_by_depth(index)
        )
    return block


def _parameters(checkpoint: Checkpoint, block: Block, stored: Callable[[str], torch.dtype]) -> Iterator[Parameter]:
    weights = {f"{site.name}.weight" for site in block.sites}
    for path, _ in block.module.named_parameters():
        name = f"{block.name}.{checkpoint.architecture.disk_name(path)}"
        if name not in weights:
            owner, _, leaf = path.rpartition(".")
            yield Parameter(name, block.module.get_submodule(owner), leaf, stored(name))


def _stored_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    info = checkpoint.tensors.get(name)
    return checkpoint.dtype if info is None else torch_dtype(info.dtype)


def _sites(checkpoint: Checkpoint, block: Block, names: list[str]) -> tuple[Site, ...]:
    inside = (checkpoint.architecture.module_name(name.removeprefix(f"{block.name}.")) for name in names)
    modules = (block.module.get_submodule(path) for path in inside)
    return tuple(Site(name, cast(nn.Linear, module), checkpoint) for name, module in zip(names, modules, strict=True))


def _offer(block: Block, stream: Activations | None, keep: frozenset[str]) -> None:
    if stream is not None and "inputs" in keep:
        block.inputs = [stream.inputs[batch] for batch in stream.batches()]
    if stream is not None and "targets" in keep:
        block.targets = [stream.targets[batch] for batch in stream.batches()]
