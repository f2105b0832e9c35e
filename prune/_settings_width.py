"""What heads and channels have in common: inputs of one layer of each network go, and how these are chosen."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.architectures import FEEDERS
from prune._structure import StructuredPruning

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

Importance = Literal["osscar", "activation", "fluctuation", "magnitude"]


class WidthPruning(StructuredPruning):
    """Settings of the methods that make the inside of attention or of the feed-forward networks narrower."""

    needs_calibration: ClassVar = True

    importance: Importance = Field(
        "osscar",
        description="by the error of the outputs, which those that stay make up for (OSSCAR); by mean activation "
        "(Minitron); by how much inputs vary, means becoming biases (FLAP); by the size of weights (a baseline)",
    )
    damping: float = Field(0.01, gt=0, le=10, description="of osscar: part of the Hessian's mean diagonal added to it")
    rounds: int = Field(64, ge=1, le=100_000, description="of osscar: rounds in which structures are eliminated")
    swaps: int = Field(10, ge=0, le=1000, description="of osscar: the most attempts to exchange some of them then")

    @property
    def calibrated(self) -> bool:
        return self.importance != "magnitude"

    @abstractmethod
    def read_width(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Shape [out, in] of the largest layer whose inputs are chosen from."""

    def solver_bytes(self, checkpoint: Checkpoint) -> int:
        rows, width = self.read_width(checkpoint)
        return 8 * (3 * width * width + 4 * rows * width) if self.importance == "osscar" else 4 * 3 * rows * width

    def stage_bytes(self, checkpoint: Checkpoint, smaller: Checkpoint) -> int:
        size = super().stage_bytes(checkpoint, smaller)
        if self.importance != "osscar":
            return size
        rest = (smaller.info(f"{name}.weight") for name in self.changed(smaller))
        return size + sum(4 * info.bytes // smaller.dtype.itemsize - info.bytes for info in rest)

    def changed(self, checkpoint: Checkpoint) -> list[str]:
        """The layers whose weights make up for what goes."""
        kinds = self.kinds
        groups = (checkpoint.groups(index) for index in range(checkpoint.num_blocks))
        return [site for found in groups for name, sites in found if name.rpartition(".")[2] in kinds for site in sites]

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of groups whose inputs are chosen from."""

    def notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        if self.importance == "fluctuation" and not self.bias_key(checkpoint):
            return (f"{checkpoint.model_type} models have no bias there: fluctuation prunes without compensation",)
        return ()

    def bias_key(self, checkpoint: Checkpoint) -> str | None:
        """The entry of config.json that gives the layers a bias, None if the family knows none."""
        return dict(checkpoint.architecture.biases).get(self.kinds[0])

    def added_biases(self, checkpoint: Checkpoint) -> dict[str, int]:
        """The biases, with their lengths, that FLAP's compensation brings: if one layer of attention or of the
        feed-forward network has one, config.json promises one for all of them."""
        if self.importance != "fluctuation" or not self.bias_key(checkpoint):
            return {}
        kinds = (*self.kinds, *(maker for maker, reader in FEEDERS if reader in self.kinds))
        groups = (group for index in range(checkpoint.num_blocks) for group in checkpoint.groups(index))
        sites = [site for name, sites in groups if name in kinds for site in sites]
        lengths = {f"{site}.bias": checkpoint.matrix_shape(site)[0] for site in sites}
        return {name: length for name, length in lengths.items() if name not in checkpoint.tensors}

    def bias_config(self, checkpoint: Checkpoint) -> dict[str, bool]:
        """What config.json says of these biases."""
        key = self.bias_key(checkpoint)
        return {key: True} if key and self.added_biases(checkpoint) else {}

    def added_bytes(self, checkpoint: Checkpoint, smaller: Checkpoint) -> int:
        lengths = self.added_biases(checkpoint)
        shapes = (smaller.matrix_shape(name.removesuffix(".bias")) for name in lengths)
        return sum(shape[0] for shape in shapes) * checkpoint.dtype.itemsize
