"""The keys and values of all sequences where whole pages are coded: frames of equal bytes, full pages or coded ones.

A frame has the bytes that `block` tokens of all layers take in full. As a coded page the same bytes hold several times
as many tokens: numbers of all layers first, then what is fp16, then codes, so that all lie where their size asks for
and nothing is padded but the end.

Shape suffixes: P frames, B tokens of a full page, N tokens of a coded one, G key-value heads, D channels of a head, C
numbers or bytes of codes of a head, X fp16 numbers beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kv_compress._coded_pages import CodingPoints
from kv_compress._coding import code_dtype
from kv_compress.policy import CODECS, FULL, Coding, KVPolicy
from runtime.cache import KVCache, not_to_be_had, policy_for
from runtime.models.config import LayerConfig, ModelConfig
from runtime.ops.coded_pages import CodedPages, Frames
from runtime.ops.pages import Pages


class FrameCache:
    """What KVCache is, of frames: `layers()` has full pages, and in their `coded` the same frames as coded ones."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
        policy: KVPolicy,
    ) -> None:
        self.pages = pages
        self.block_size = block_size
        self.policy = policy
        self.points = policy.coding_points(sizes_of(config), dtype.itemsize, block_size)
        self.frames = Frames(pages, block_size, self.points.page_tokens, self.points.sinks)
        frame_bytes = sum(2 * _full_bytes(layer, block_size, dtype) for layer in config.layers)
        try:
            self._memory = torch.zeros((pages, frame_bytes), dtype=torch.uint8, device=device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise not_to_be_had(pages * frame_bytes, pages) from error
        coded = iter(self._coded_pages(config, dtype))
        begin, sides = 0, []
        for layer, of in zip(config.layers, policy.layers, strict=True):
            size = _full_bytes(layer, block_size, dtype)
            for coding in (of.keys, of.values):
                codes = _view(self._memory, begin, (block_size, layer.kv_heads, layer.head_dim), dtype)
                sides.append(Pages(codes, rotate=coding.rotate, coded=next(coded)))
                begin += size
        self._layers = list(zip(sides[::2], sides[1::2], strict=True))

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return self._memory.nbytes

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole frames (from, to); a source is read before any frame is written."""
        if copies:
            sources, targets = torch.tensor(copies, device=self._memory.device).T
            self._memory[targets] = self._memory[sources]

    def code_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Code the full pages `sources`, in order, into the frames `targets`, which may be some of them."""
        before = self._memory[torch.tensor(sources, device=self._memory.device)]
        begin = 0
        for sides in self._layers:
            for pages in sides:
                x_NGD = _view(before, begin, pages.codes.shape[1:], pages.codes.dtype).flatten(0, 1)
                begin += x_NGD.nbytes // len(sources)
                if pages.coded is not None:
                    for target, part_NGD in zip(targets, x_NGD.split(pages.coded.tokens), strict=True):
                        pages.coded.write(part_NGD, target)

    def layers(self) -> Iterator[tuple[Pages, Pages]]:
        """Keys and values of each layer."""
        return iter(self._layers)

    def _coded_pages(self, config: ModelConfig, dtype: torch.dtype) -> list[CodedPages]:
        """Keys and values of each layer in turn."""
        tokens = self.points.page_tokens
        sides = [
            (coding, layer)
            for layer, of in zip(config.layers, self.policy.layers, strict=True)
            for coding in (of.keys, of.values)
        ]
        wanted = [_parts(coding, layer, tokens, dtype) for coding, layer in sides]
        views: dict[tuple[int, int], Tensor] = {}
        begin = 0
        for size in (4, 2, 1):  # the widest numbers first
            for index, parts in enumerate(wanted):
                for part, (shape, kind) in enumerate(parts):
                    if kind.itemsize == size:
                        views[index, part] = _view(self._memory, begin, shape, kind)
                        begin += views[index, part][0].nbytes
        found = []
        for index, (coding, layer) in enumerate(sides):
            scale = torch.tensor(coding.scale, dtype=torch.float32, device=self._memory.device)
            scale_G = scale.expand(layer.kv_heads).contiguous() if coding.scale else None
            per_channel = coding.per == "channel"
            found.append(CodedPages(views[index, 0], coding.codec, views.get((index, 1)), scale_G, per_channel))
        return found


def cache_for(
    config: ModelConfig,
    pages: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    policy: KVPolicy | None = None,
    *,
    by_head: bool = False,
) -> KVCache | FrameCache:
    """The cache that a policy asks for. InputError for a policy of another model."""
    if policy is None or not policy.is_paged:
        return KVCache(config, pages, block_size, dtype, device, policy, by_head=by_head)
    return FrameCache(config, pages, block_size, dtype, device, policy_for(config, policy))


def points_for(
    config: ModelConfig, policy: KVPolicy | None, dtype: torch.dtype, block_size: int
) -> CodingPoints | None:
    """Where pages are coded, None where they are not."""
    paged = policy is not None and policy.is_paged
    return policy.coding_points(sizes_of(config), dtype.itemsize, block_size) if paged else None


def sizes_of(config: ModelConfig) -> list[tuple[int, int]]:
    """Key-value heads and their width, of each layer."""
    return [(layer.kv_heads, layer.head_dim) for layer in config.layers]


def _full_bytes(layer: LayerConfig, block: int, dtype: torch.dtype) -> int:
    return block * layer.kv_heads * layer.head_dim * dtype.itemsize


def _parts(
    coding: Coding, layer: LayerConfig, tokens: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the codes of a page, and of the numbers beside them, if there are any."""
    groups, width = layer.kv_heads, layer.head_dim
    if coding.codec == FULL:
        return [((tokens, groups, width), dtype)]
    codec, channels = CODECS[coding.codec], coding.per == "channel"
    codes = ((tokens, groups, codec.code_bytes(width)), torch.uint8 if channels else code_dtype(codec.name))
    numbers = (2, groups, width) if channels else (tokens, groups, codec.numbers)
    return [codes, (numbers, torch.float16)] if numbers[-1] else [codes]


def _view(memory: Tensor, begin: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`shape` numbers of each frame, from byte `begin` of it on."""
    count = dtype.itemsize
    for length in shape:
        count *= length
    return memory[:, begin : begin + count].view(dtype).unflatten(1, tuple(shape))
