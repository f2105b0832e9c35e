"""Transform: what a quantize stage may do to the weights first. The function that a block computes stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from compress.core.scheme import Scheme

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.grid import Clip
    from compress.core.statistics import Statistic
    from compress.core.walk import Block


@dataclass(frozen=True)
class Target:
    """What the weights are prepared for: the scheme of each layer (name, width -> scheme or None), and how spans are
    searched."""

    checkpoint: Checkpoint
    scheme_for: Callable[[str, int], Scheme | None]
    clip: Clip | None


class Transform(BaseModel):
    """One transform: its fields are its settings. A file of this folder holds one, and its name is the word in recipes.

    `reads`: it is applied as weights are read, before anything else (and needs no calibration data).
    `balances`: it moves scales between layers; there can be one such transform in a stage.
    `mixes`: a weight becomes a sum of others, so that none stays zero.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    paper: ClassVar[str]
    reads: ClassVar[bool] = False
    balances: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    def refusal(self, wanted: Scheme) -> str | None:
        """Why it makes no sense for a scheme, in a sentence; None if it does."""
        return None

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as it is read; CompressError names what stands in the way."""
        return checkpoint

    def statistics(self) -> frozenset[type[Statistic]]:
        """What `apply` needs to know about the inputs of the block's layers."""
        return frozenset()

    def apply(self, block: Block, target: Target) -> None:
        """Change the block's weights, not its function."""
