"""Distillation of what happens inside: hidden states and attention relations, beside the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.errors import UsageError
from compress.core.passes import Job, Plan
from distill.logits import Logits

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


class Features(Logits):
    """As logits, and the student's hidden states and attention relations are drawn to those of teacher layers, too: for
    a student of another depth or width. The projections between the widths end with the training."""

    paper: ClassVar = "Romero et al., 2015, arXiv:1412.6550; Wang et al., 2021, arXiv:2012.15828 (MiniLMv2)"

    reads_caches: ClassVar = False
    can_shard: ClassVar = False

    logits: float = Field(1.0, ge=0, description="weight of the divergence of the distributions")
    hidden: float = Field(1.0, ge=0, description="weight of the distance of hidden states, 0: they are not compared")
    distance: Literal["mse", "cosine"] = Field(
        "mse", description="of hidden states: squared, over the squared length of the teacher's; or 1 - cosine"
    )
    attention: float = Field(
        0.0, ge=0, description="weight of the divergence of attention relations, 0: they are not compared"
    )
    relation_heads: int = Field(
        8, ge=1, description="heads of the relations: divides the widths of queries, keys and values on both sides"
    )
    relations: Literal["last", "all"] = Field("last", description="compared in the last pair of layers, or in all")
    layers: dict[int, int] | None = Field(
        None,
        description="teacher layer of each student layer, from 0: {3: 7}; none: the layers that they were before depth "
        "pruning in the same run, else evenly spread with last to last",
    )

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        if not self.hidden and not self.attention:
            raise UsageError("neither hidden states nor attention are compared", hint="method: logits does the rest")
        outside = [layer for layer in self.layers or () if not 0 <= layer < checkpoint.num_blocks]
        if outside:
            raise UsageError(
                f"the student has no layer {outside[0]}: its layers are 0 to {checkpoint.num_blocks - 1}",
                where="distill.layers",
            )
        return super().plan(checkpoint, calibration)

    def extra_numbers(self, checkpoint: Checkpoint) -> int:
        """Of the projections, if the teacher is as wide as the student."""
        pairs = checkpoint.num_blocks if self.layers is None else len(self.layers)
        return pairs * checkpoint.config["hidden_size"] ** 2 if self.hidden else 0

    def run(self, job: Job) -> None:
        from distill._features import train_on_features

        train_on_features(self, job)
