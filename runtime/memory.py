"""How much memory the runtime takes, and how many pages of keys and values that leaves room for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compress.core.errors import ResourceError, UsageError
from kv_compress.policy import FULL
from runtime.blocks import BlockPool
from runtime.cache import KVCache, page_bytes
from runtime.frames import FrameCache, cache_for, points_for
from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.page import PageType
from runtime.scheduler import SchedulerSettings

_CPU_SHARE = 0.25  # of the memory that is free: a CPU is shared with everything else
_GPU_SHARE = 0.9
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Ledger:
    """Bytes by what they are for. Activations are an estimate of the largest step."""

    weights_bytes: int
    kv_pool_bytes: int
    activations_bytes: int
    graphs_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_pool_bytes + self.activations_bytes + self.graphs_bytes


def allocate(
    model: Decoder,
    block_size: int,
    max_length: int,
    settings: SchedulerSettings,
    memory_bytes: int | None = None,
    kv_bytes: int | None = None,
    *,
    by_head: bool = False,
) -> tuple[KVCache | FrameCache, BlockPool, Ledger]:
    """The cache, the pool that hands its pages out, and what all takes.

    The pool gets `kv_bytes`, or what weights and activations leave of `memory_bytes`, or by default a modest share of
    what is free; but for `kv_bytes`, never more than the most sequences at their longest need. On a GPU the cache has
    one page more than the pool: captured graphs write their padding there. `by_head`: see KVCache. ResourceError if
    not one page fits.
    """
    if block_size < 1:
        raise UsageError(f"block_size must be at least 1, not {block_size}")
    bytes_of_page = page_bytes(model.config, block_size, model.dtype, model.kv_policy)
    page = PageType(_page_name(model), bytes_of_page, block_size)
    is_gpu = torch.device(model.device).type == "cuda"
    weights = weight_bytes(model)
    activations = activation_bytes(model.config, settings, model.dtype.itemsize)
    if kv_bytes is not None:
        budget, source = kv_bytes, "kv_bytes"
    elif memory_bytes is not None:
        budget, source = memory_bytes - weights - activations, "memory"
    else:
        share = _GPU_SHARE if is_gpu else _CPU_SHARE
        budget, source = int(share * free_bytes(model.device)) - activations, "what is free"
    pages = budget // page.bytes - is_gpu
    most = settings.max_sequences * _longest_pages(model, max_length, block_size)
    if kv_bytes is None:
        pages = min(pages, most)
    if pages < 1:
        least = page.bytes * (1 + is_gpu)
        if kv_bytes is not None:
            useful = (most + is_gpu) * page.bytes
            hint = f"kv_bytes must be at least {least:,}; more than {useful:,} is never used"
        else:
            hint = (
                f"weights take {weights:,} bytes, a step's activations up to {activations:,}, less with a smaller "
                f"token_budget: in all at least {weights + activations + least:,}"
            )
        raise ResourceError(
            f"{source} leaves {max(budget, 0):,} bytes for keys and values; a page of {block_size} tokens takes "
            f"{page.bytes:,}",
            hint=hint,
        )
    cache = cache_for(
        model.config, pages + is_gpu, block_size, model.dtype, model.device, model.kv_policy, by_head=by_head
    )
    pool = BlockPool(pages, page, prefix_cache=settings.prefix_cache)
    pool.memory_pages = cache.pages
    return cache, pool, Ledger(weights, cache.bytes, activations)


def _longest_pages(model: Decoder, max_length: int, block_size: int) -> int:
    """Pages that the longest sequence takes at any one time, nothing evicted."""
    points = points_for(model.config, model.kv_policy, model.dtype, block_size)
    slots = max_length if points is None else points.peak(0, 0, max_length, max_length)
    return -(-slots // block_size)


def _page_name(model: Decoder) -> str:
    """What pages hold: float32, int8, int8+int4 where layers differ, "float32 or int4" where pages are coded whole."""
    codecs = (FULL,) if model.kv_policy is None else model.kv_policy.codecs
    full = str(model.dtype).removeprefix("torch.")
    name = "+".join(full if name == FULL else name for name in codecs)
    return f"{full} or {name}" if model.kv_policy is not None and model.kv_policy.is_paged else name


def weight_bytes(model: nn.Module) -> int:
    """What parameters and buffers take; what is shared counts once."""
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in _tensors(model)}
    return sum(tensors.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def activation_bytes(config: ModelConfig, settings: SchedulerSettings, itemsize: int) -> int:
    """The largest step's temporaries: a layer's inputs, projections and feed-forward for every token of the budget,
    and logits, with as much again for sampling, for every sequence."""
    widest = max(
        4 * config.hidden + layer.head_dim * (2 * layer.heads + 2 * layer.kv_heads) + 3 * layer.ffn
        for layer in config.layers
    )
    return settings.token_budget * widest * itemsize + 2 * settings.max_sequences * config.vocab * 4


def free_bytes(device: str | torch.device) -> int:
    """Memory that can be had now: of the GPU, or of the machine within the limits of our control group."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_system_bytes(), _group_bytes())


def _system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _group_bytes() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        cached = _reclaimable((_CGROUP / "memory.stat").read_text(encoding="ascii"))
    except OSError:
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used + cached)


def _reclaimable(statistics: str) -> int:
    counts = dict(line.split() for line in statistics.splitlines())
    return int(counts.get("inactive_file", 0))
