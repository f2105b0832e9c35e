"""REAP (Lasby et al., 2025, arXiv:2510.13999): which experts matter, by their weights and outputs.

Shape suffixes: N tokens, K inner channels, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from compress.core.events import Notice
from compress.core.passes import Job
from compress.core.walk import Block, See


@dataclass(slots=True)
class Reached:
    """What one expert did: how many tokens reached it, and the sum of router weight × ‖output‖₂ over them."""

    tokens: int = 0
    added: float = 0.0

    def see(self, x_NK: Tensor, y_ND: Tensor, share_N: Tensor | None) -> None:
        """The inputs and outputs of the expert's last layer, and the weights that the router gives them."""
        length_N = y_ND.float().norm(dim=1)
        self.tokens += len(length_N)
        self.added += float((length_N if share_N is None else length_N * share_N.float()).sum())

    @property
    def saliency(self) -> float:
        """REAP's S: the mean over the tokens that reached it."""
        return self.added / max(self.tokens, 1)


def choose_experts(job: Job, count: int, importance: Literal["reap", "frequency"]) -> list[list[int]]:
    """The `count` experts of each block that stay, ascending; none of a dense block."""
    seen: list[Reached] = []

    def watch(block: Block) -> Iterator[tuple[nn.Module, See]]:
        seen[:] = [Reached() for _ in range(job.checkpoint.expert_count(block.index))]
        lasts = (group.sites[0] for group in block.groups if group.routed and group.kind == "down")
        yield from ((site.module, expert.see) for site, expert in zip(lasts, seen, strict=True))

    found = []
    for block in job.measure(watch=watch):
        kept = _most_important(seen, min(count, len(seen)), importance)
        found.append(kept)
        _tell_unreached(job, block.name, seen, kept)
    return found


def _most_important(seen: Sequence[Reached], count: int, importance: Literal["reap", "frequency"]) -> list[int]:
    """Those that no token reached come last; of equal ones the first stays."""

    def rank(index: int) -> tuple[bool, float, int]:
        score = seen[index].saliency if importance == "reap" else seen[index].tokens
        return seen[index].tokens > 0, score, -index

    return sorted(sorted(range(len(seen)), key=rank, reverse=True)[:count])


def _tell_unreached(job: Job, block: str, seen: Sequence[Reached], kept: Sequence[int]) -> None:
    unreached = [index for index, expert in enumerate(seen) if not expert.tokens]
    if unreached:
        named = ", ".join(map(str, unreached))
        staying = ", ".join(str(index) for index in unreached if index in kept)
        rest = f"; {staying} of them stay all the same" if staying else ""
        job.events(Notice(f"no token reached the experts {named}: they go first{rest}", block, level="warning"))
