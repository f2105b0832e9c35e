"""The keys and values of all sequences, in pages that the block pool hands out.

Shape suffixes: P pages, B slots of a page, G key-value heads, D channels of a head. A page id stands for the same range
of tokens in every layer; layers may differ in heads and channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compress.core.errors import ResourceError
from runtime.models.config import ModelConfig


class KVCache:
    """`k[layer]`, `v[layer]`: [P, B, G, D]. Keys are stored rotated; slots that were never written hold zeros."""

    def __init__(
        self, config: ModelConfig, pages: int, block_size: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self.pages = pages
        self.block_size = block_size
        shapes = [(pages, block_size, layer.kv_heads, layer.head_dim) for layer in config.layers]
        try:
            self.k = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
            self.v = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            wanted = pages * page_bytes(config, block_size, dtype)
            raise ResourceError(
                f"{wanted} bytes for {pages} pages of keys and values cannot be had", hint="give the cache less memory"
            ) from error

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(pages.numel() * pages.element_size() for pages in (*self.k, *self.v))

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) in every layer; a source is read before any page is written."""
        if not copies:
            return
        sources = torch.tensor([source for source, _ in copies], device=self.k[0].device)
        targets = torch.tensor([target for _, target in copies], device=self.k[0].device)
        for pages in (*self.k, *self.v):
            pages[targets] = pages[sources]

    def read_slots(self, layer: int, slot_S: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 keys and values [S, G, D] of slots (page * B + offset)."""
        return self.k[layer].flatten(0, 1)[slot_S].float(), self.v[layer].flatten(0, 1)[slot_S].float()

    def move_slots(self, layer: int, source_NG: Tensor, target_N: Tensor) -> None:
        """Move each head's keys and values from its slots to the slots `target_N`; all are read before one is
        written."""
        head_G = torch.arange(source_NG.shape[1], device=source_NG.device)
        for pages in (self.k[layer], self.v[layer]):
            slots = pages.flatten(0, 1)
            slots[target_N] = slots[source_NG, head_G]

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer."""
        return zip(self.k, self.v, strict=True)


def page_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    channels = sum(2 * layer.kv_heads * layer.head_dim for layer in config.layers)
    return channels * block_size * dtype.itemsize
