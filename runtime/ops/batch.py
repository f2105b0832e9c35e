"""AttentionBatch: what a step's attention must know about its sequences. Built once a step, handed to every layer.

A slot is a place for one token's keys and values: slot i of a sequence lies in page table[i // B] at offset i % B. A
position is logical: rotation goes by it. Where keys were evicted, slot i no longer holds position i, so masks go by
slots: a token sees its own and those before it, which hold what is older. New tokens take the last slots, in order.

Shape suffixes: T tokens of the flat batch, S sequences, S1 sequences + 1, P pages of a table, B slots of a page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from runtime.ops.coded_pages import Frames

if TYPE_CHECKING:
    from runtime.ops.head_batch import HeadBatch


@dataclass(eq=False)
class AttentionBatch:
    """The flat batch: the tokens of sequence s are rows starts[s] … starts[s+1] - 1, in order of position.

    starts_S1 int32, kv_len_S int32 (slots stored, this step's tokens included), table_SP int32 (page ids, padded with
    any valid page), position_T int64 (of the queries), index_T int64 (their slots, counted within the sequence), slot_T
    int64 (page * B + offset: where each token's keys and values go). `starts`, `kv_len`: the same on the host.
    `max_query`, `max_kv`: their largest lengths.

    With `frames`, where the first coded_S (int32) pages behind the sinks hold more tokens than others, nothing is ever
    dropped: kv_len and index count tokens, and are positions.
    """

    starts_S1: torch.Tensor
    kv_len_S: torch.Tensor
    table_SP: torch.Tensor
    position_T: torch.Tensor
    index_T: torch.Tensor
    slot_T: torch.Tensor
    starts: list[int]
    kv_len: list[int]
    max_query: int
    max_kv: int
    by_head: "HeadBatch | None" = None  # where some sequences have tables for each layer and head
    after_attention: Callable[[torch.Tensor], None] | None = None  # given each layer's rotated queries [T, H, D]
    frames: Frames | None = None
    coded_S: torch.Tensor | None = None
    plans: dict[tuple, object] = field(default_factory=dict, repr=False)  # what a CPU route worked out, for all layers

    @classmethod
    def build(
        cls,
        positions: Sequence[int],
        counts: Sequence[int],
        stored: Sequence[int],
        tables: Sequence[Sequence[int]],
        *,
        block_size: int,
        device: torch.device | str = "cpu",
        frames: Frames | None = None,
    ) -> "AttentionBatch":
        """Batch from each sequence's first position, number of tokens, slots stored before them, and page table.

        Raises ValueError if a sequence brings no token or its table is too short for its slots.
        """
        position_S, count_S, stored_S = (np.asarray(numbers, dtype=np.int64) for numbers in (positions, counts, stored))
        kv_len_S = stored_S + count_S
        pages_S = np.array([len(table) for table in tables], dtype=np.int64)
        if len(count_S) == 0 or count_S.min() < 1:
            raise ValueError("a batch needs sequences, and each sequence at least one token")
        if (pages_S * block_size < kv_len_S).any():
            short = int(np.argmax(pages_S * block_size < kv_len_S))
            raise ValueError(f"sequence {short} has {pages_S[short]} pages for {kv_len_S[short]} slots")
        table_SP = np.zeros((len(tables), int(pages_S.max())), dtype=np.int32)
        for row, table in zip(table_SP, tables, strict=True):
            row[: len(table)] = table
        starts_S1 = np.concatenate([[0], np.cumsum(count_S)])
        owner_T = np.repeat(np.arange(len(tables)), count_S)
        within_T = np.arange(starts_S1[-1]) - starts_S1[owner_T]
        index_T = stored_S[owner_T] + within_T
        slot_T = table_SP[owner_T, index_T // block_size].astype(np.int64) * block_size + index_T % block_size
        coded_S = None
        if frames is not None:
            coded_S = torch.from_numpy(frames.coded(position_S, stored_S).astype(np.int32)).to(device)
            kv_len_S, index_T = position_S + count_S, position_S[owner_T] + within_T
        return cls(
            starts_S1=torch.from_numpy(starts_S1.astype(np.int32)).to(device),
            kv_len_S=torch.from_numpy(kv_len_S.astype(np.int32)).to(device),
            table_SP=torch.from_numpy(table_SP).to(device),
            position_T=torch.from_numpy(position_S[owner_T] + within_T).to(device),
            index_T=torch.from_numpy(index_T).to(device),
            slot_T=torch.from_numpy(slot_T).to(device),
            starts=starts_S1.tolist(),
            kv_len=kv_len_S.tolist(),
            max_query=int(count_S.max()),
            max_kv=int(kv_len_S.max()),
            frames=frames,
            coded_S=coded_S,
        )

    def pool_slots(self, sequence_N: torch.Tensor, index_NK: torch.Tensor, block: int) -> torch.Tensor:
        """Where in the pool slots [N, K] of these sequences lie (int64)."""
        table_NP = self.table_SP[sequence_N].long()
        if self.frames is not None and self.coded_S is not None:
            return self.frames.slots(table_NP, self.coded_S[sequence_N].long()[:, None], index_NK)
        return table_NP.gather(1, index_NK // block) * block + index_NK % block

    @cached_property
    def indices(self) -> list[int]:
        """`index_T` on the host."""
        return self.index_T.tolist()

    @cached_property
    def decodes(self) -> int:
        """Number of sequences before the first one that has more than one query."""
        for sequence in range(len(self.kv_len)):
            if self.starts[sequence + 1] - self.starts[sequence] > 1:
                return sequence
        return len(self.kv_len)
