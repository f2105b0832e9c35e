"""Hidden states of all samples between two blocks: in memory, or in files that vanish with the process.

Shapes: N samples, T positions, D hidden width; B samples of one micro-batch.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compress.core.errors import ResourceError

JUDGED_EVERY = 16
MICRO_BATCH_TOKENS = 1024


def default_micro_batch(length: int) -> int:
    """Samples per forward: about 1024 tokens, where a matrix product is efficient and its intermediates are small."""
    return max(1, MICRO_BATCH_TOKENS // length)


class Activations:
    """Two buffers [N, T, D]: `inputs` of the block at hand and `targets`, its outputs with the original weights.

    Buffers over `spill_above_bytes` live in files under `spill_folder`, mapped shared: the system keeps them in memory
    as long as there is some to spare. The files are unlinked at once, so that nothing is left behind however the
    process ends; their bytes are allocated first, so that a full disk is an error here and not a signal later. Where a
    buffer lives changes no bit of any result.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        lengths: Tensor | None,
        *,
        dtype: torch.dtype,
        micro_batch: int,
        spill_folder: str | Path | None,
        spill_above_bytes: int,
    ) -> None:
        self._spill_folder, self._spill_above_bytes = spill_folder, spill_above_bytes
        self.inputs = self._room(shape, dtype)
        self._targets: Tensor | None = None
        self.micro_batch = micro_batch
        positions = torch.arange(shape[1])
        self._counted_NT = None if lengths is None else positions < lengths[:, None]

    @property
    def targets(self) -> Tensor:
        if self._targets is None:
            self._targets = self._room(self.inputs.shape, self.inputs.dtype)
        return self._targets

    def buffer(self, width: int, dtype: torch.dtype) -> Tensor:
        """Room for [N, T, width] beside the stream, which is written once and read once for each block."""
        return self._room((*self.inputs.shape[:2], width), dtype)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return room(shape, dtype, self._spill_folder, above_bytes=self._spill_above_bytes)

    def batches(self) -> Iterator[slice]:
        """Samples of each micro-batch, in order."""
        for start in range(0, len(self.inputs), self.micro_batch):
            yield slice(start, start + self.micro_batch)

    def counted(self, batch: slice) -> Tensor | None:
        """Which flattened positions of a micro-batch are tokens, bool [B·T]; None if all are."""
        return None if self._counted_NT is None else self._counted_NT[batch].reshape(-1)

    def judged(self) -> Iterator[tuple[slice, bool]]:
        """The micro-batches, and whether the block's output error is measured on it: on every sixteenth is enough."""
        return ((batch, index % JUDGED_EVERY == 0) for index, batch in enumerate(self.batches()))

    def swap(self) -> None:
        """Let the targets be the next block's inputs."""
        self.inputs, self._targets = self.targets, self.inputs


def room(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None, *, above_bytes: int) -> Tensor:
    """A buffer: in memory, or if it is larger than `above_bytes`, in a file under `folder` that vanishes."""
    large = math.prod(shape) * dtype.itemsize > above_bytes
    return _buffer(shape, dtype, folder if large else None)


def _buffer(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    elements = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(prefix="activations-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, elements * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=elements, dtype=dtype).view(shape)
    except OSError as error:
        gigabytes = elements * dtype.itemsize / 1e9
        raise ResourceError(
            f"no room for {gigabytes:.1f} GB of activations: {error.strerror}",
            where=str(folder),
            hint="free the disk, or use fewer calibration tokens",
        ) from error
