"""A stage without files: runs one pass on a folder and keeps what it makes of each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.cuts import Cut, Cuts
from compress.core.passes import Job, Pass
from compress.core.tensors import QuantTensor
from compress.core.walk import BlockRecord


class Shelf:
    """A BlockSink in memory, with the first `done` blocks of an earlier run."""

    def __init__(self, earlier: Shelf | None = None, done: int = 0) -> None:
        self.blocks: list[Mapping[str, torch.Tensor | QuantTensor]] = earlier.blocks[:done] if earlier else []
        self.records: list[BlockRecord] = earlier.records[:done] if earlier else []
        self.cuts: dict[str, Sequence[Cut]] = {}
        self.source: Checkpoint | None = None
        self.attached: dict[str, str | Mapping[str, torch.Tensor]] = {}

    def finished(self) -> int:
        return len(self.blocks)

    def load(self, index: int) -> Mapping[str, torch.Tensor | QuantTensor]:
        return self.blocks[index]

    def record(self, index: int) -> BlockRecord:
        return self.records[index]

    def commit(
        self, index: int, tensors: dict[str, torch.Tensor | QuantTensor], record: BlockRecord, cuts: Cuts
    ) -> None:
        assert index == len(self.blocks)
        self.blocks.append(tensors)
        self.records.append(record)
        self.cuts |= cuts

    def become(self, source: Checkpoint) -> None:
        self.source = source

    def attach(self, name: str, content: str | Mapping[str, torch.Tensor]) -> None:
        self.attached[name] = content

    def add(self, describe: Callable[[dict[str, Any]], dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
        self.describe, self.added = describe, tensors

    @property
    def dense(self) -> dict[str, torch.Tensor]:
        return {
            name: value for block in self.blocks for name, value in block.items() if isinstance(value, torch.Tensor)
        }

    @property
    def quantized(self) -> dict[str, QuantTensor]:
        return {name: value for block in self.blocks for name, value in block.items() if isinstance(value, QuantTensor)}


def tokens_for(checkpoint: Checkpoint, samples: int = 6, length: int = 48) -> Tokens:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, checkpoint.config["vocab_size"], (samples, length), generator=generator)
    return Tokens(ids, None, sha256="", source="random")


def run(folder: Path, settings: Pass, shelf: Shelf, tokens: Tokens | None = None) -> Shelf:
    checkpoint = Checkpoint.open(folder)
    settings.run(Job(checkpoint, tokens or tokens_for(checkpoint), shelf))
    return shelf
