"""Attention heads: key-value heads with all their queries, or as many queries of each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.architectures import ARCHITECTURES
from compress.core.errors import UsageError
from compress.core.passes import Job
from prune._settings_width import WidthPruning
from prune._surgery import Heads as Sizes
from prune._surgery import head_cuts

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.reshaped import ReshapedCheckpoint


class Heads(WidthPruning):
    """Fewer attention heads, as many in all blocks. Whatever goes, every key-value head keeps as many queries."""

    paper: ClassVar = "Meng et al., 2024, arXiv:2403.12983; Muralidharan et al., 2024, arXiv:2407.14679"
    kinds: ClassVar = ("o",)

    unit: Literal["groups", "queries"] = Field(
        "groups",
        description="what goes: key-value heads with the queries that share them (the cache shrinks, too), or as many "
        "query heads of every key-value head",
    )

    @property
    def what(self) -> str:
        return "key-value heads with their queries" if self.unit == "groups" else "query heads"

    def total(self, checkpoint: Checkpoint) -> int:
        sizes = Sizes.of(checkpoint)
        return sizes.groups if self.unit == "groups" else sizes.queries

    def step(self, checkpoint: Checkpoint) -> int:
        return 1 if self.unit == "groups" else Sizes.of(checkpoint).groups

    def shrunk(self, checkpoint: Checkpoint, count: int) -> ReshapedCheckpoint:
        from compress.core.reshaped import ReshapedCheckpoint

        sizes = Sizes.of(checkpoint)
        groups = count if self.unit == "groups" else sizes.groups
        queries = self._queries(checkpoint, count)
        cuts = {}
        for index in range(checkpoint.num_blocks):
            cuts |= head_cuts(checkpoint, index, range(queries), range(groups))
        config = {"num_attention_heads": queries, "num_key_value_heads": groups, "head_dim": sizes.size}
        config |= self.bias_config(checkpoint)
        if self._odd(checkpoint, queries):
            config |= twin_config(checkpoint)
        return ReshapedCheckpoint(checkpoint, config, cuts=cuts)

    def count(self, checkpoint: Checkpoint) -> int:
        count = super().count(checkpoint)
        queries = self._queries(checkpoint, count)
        if self._odd(checkpoint, queries) and not self._has_twin(checkpoint):
            works = [n for n in self._counts(checkpoint) if not self._odd(checkpoint, self._queries(checkpoint, n))]
            brings_bias = bool(self.added_biases(checkpoint))
            instead = "; or another importance, which adds no biases" if brings_bias else ""
            raise UsageError(
                f"with {queries} query heads no loader would open this {checkpoint.model_type} model: its hidden_size "
                f"{checkpoint.config['hidden_size']} must be a multiple of them",
                where="prune.keep",
                hint=f"keep one of {', '.join(map(str, works))} {self.what}{instead}",
            )
        return count

    def notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        queries = self._queries(checkpoint, self.count(checkpoint))
        if not self._odd(checkpoint, queries):
            return super().notices(checkpoint)
        twin = checkpoint.architecture.twin
        return (
            *super().notices(checkpoint),
            f"{queries} query heads do not divide hidden_size {checkpoint.config['hidden_size']}, which {twin} models "
            f"may and {checkpoint.model_type} models may not: config.json will say {twin}, which computes the same",
        )

    def _queries(self, checkpoint: Checkpoint, count: int) -> int:
        return count * Sizes.of(checkpoint).sharing if self.unit == "groups" else count

    def _counts(self, checkpoint: Checkpoint) -> range:
        step = self.step(checkpoint)
        return range(step, self.total(checkpoint) + 1, step)

    def _odd(self, checkpoint: Checkpoint, queries: int) -> bool:
        return checkpoint.architecture.heads_divide and checkpoint.config["hidden_size"] % queries != 0

    def _has_twin(self, checkpoint: Checkpoint) -> bool:
        keys = [key for _, key in checkpoint.architecture.biases]
        biased = any(checkpoint.config.get(key) for key in keys) or bool(self.added_biases(checkpoint))
        return bool(checkpoint.architecture.twin) and not biased

    def read_width(self, checkpoint: Checkpoint) -> tuple[int, int]:
        return checkpoint.matrix_shape(self.changed(checkpoint)[0])

    def run(self, job: Job) -> None:
        from prune._width import prune_heads

        prune_heads(self, job, self.count(job.checkpoint))


def twin_config(checkpoint: Checkpoint) -> dict[str, object]:
    """What makes config.json one of the twin family."""
    twin = checkpoint.architecture.twin
    return {"model_type": twin, "architectures": [ARCHITECTURES[twin].model_class], "sliding_window": None}
