"""Surgery: which rows and columns of a block's tensors go together, as cuts by disk name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.core.cuts import Cut
from compress.core.errors import InputError
from compress.core.sizes import sizes_of

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

BlockCuts = dict[str, list[Cut]]
NormKind = Literal["input", "output", "final"]


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention divides its channels: `queries` heads of `size` channels, `sharing` of them to a key-value head."""

    queries: int
    groups: int
    size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Heads:
        sizes = sizes_of(checkpoint.config)
        return cls(sizes["heads"], sizes["kv_heads"], sizes["head_dim"])

    @property
    def sharing(self) -> int:
        return self.queries // self.groups


def expert_prefixes(checkpoint: Checkpoint, block: int) -> list[str]:
    """What the names of a block's feed-forward groups begin with: "experts.0.", … or nothing in a dense block."""
    return [name.removesuffix("down") for name, _ in checkpoint.groups(block) if name.rpartition(".")[2] == "down"]


def channel_width(checkpoint: Checkpoint, block: int, prefix: str) -> int:
    """How many channels a feed-forward network (see expert_prefixes) has inside."""
    return checkpoint.matrix_shape(dict(checkpoint.groups(block))[f"{prefix}down"][0])[1]


def channel_cuts(checkpoint: Checkpoint, block: int, prefix: str, kept: Sequence[int]) -> BlockCuts:
    """Of the inner channels of a feed-forward network those in `kept` stay: rows of gate and up, columns of down."""
    sites = dict(checkpoint.groups(block))
    (down,) = sites[f"{prefix}down"]
    width = checkpoint.matrix_shape(down)[1]
    found: BlockCuts = {f"{down}.weight": [Cut.of(1, kept, width)]}
    for site in sites[f"{prefix}gate_up"]:
        rows = checkpoint.matrix_shape(site)[0]  # a fused layer has gate and up, one behind the other
        found |= _rows(site, (start + index for start in range(0, rows, width) for index in kept), rows)
    return found


def head_cuts(checkpoint: Checkpoint, block: int, queries: Sequence[int], groups: Sequence[int]) -> BlockCuts:
    """Of attention's heads these query heads and these key-value heads stay."""
    heads = Heads.of(checkpoint)
    sites = dict(checkpoint.groups(block))
    (output,) = sites["o"]
    asked = list(_channels(queries, heads.size))
    shared = list(_channels(groups, heads.size))
    found: BlockCuts = {f"{output}.weight": [Cut.of(1, asked, heads.queries * heads.size)]}
    makers = sites["qkv"]
    if len(makers) == 1:
        starts = (heads.queries * heads.size, (heads.queries + heads.groups) * heads.size)
        rows = [*asked, *(start + index for start in starts for index in shared)]
        return found | _rows(makers[0], rows, (heads.queries + 2 * heads.groups) * heads.size)
    counts = (heads.queries, heads.groups, heads.groups)
    for maker, kept, count in zip(makers, (asked, shared, shared), counts, strict=True):
        found |= _rows(maker, kept, count * heads.size)
    return found


def _rows(site: str, kept: Iterable[int], size: int) -> BlockCuts:
    """Rows of a linear layer, with its bias."""
    one = Cut.of(0, kept, size)
    return {f"{site}.weight": [one], f"{site}.bias": [one]}


def _channels(heads: Iterable[int], size: int) -> Iterator[int]:
    return (head * size + channel for head in heads for channel in range(size))


def expert_cuts(checkpoint: Checkpoint, block: int, kept: Sequence[int]) -> BlockCuts:
    """Of a block's experts these stay: rows of its router."""
    experts = checkpoint.architecture.experts
    if experts is None:
        raise InputError(f"{checkpoint.model_type} models have no experts")
    return _rows(f"{checkpoint.block_name(block)}.{experts.router}", kept, checkpoint.expert_count(block))


def expert_names(checkpoint: Checkpoint, kept: Mapping[int, Sequence[int]]) -> dict[str, str]:
    """Every tensor that is left where of some blocks' experts these stay, numbered anew: new name -> old name."""
    experts = checkpoint.architecture.experts
    if experts is None:
        raise InputError(f"{checkpoint.model_type} models have no experts")
    found = {name: name for name in checkpoint.rest_tensors()}
    for block in range(checkpoint.num_blocks):
        before = f"{checkpoint.block_name(block)}.{experts.on_disk}."
        places = {str(old): new for new, old in enumerate(kept.get(block, ()))}
        for name in checkpoint.block_tensors(block):
            number, _, path = name.removeprefix(before).partition(".")
            if not name.startswith(before):
                found[name] = name
            elif number in places:
                found[f"{before}{places[number]}.{path}"] = name
    return found


def hidden_cuts(checkpoint: Checkpoint, kept: Sequence[int]) -> BlockCuts:
    """Of the residual stream's channels these stay, in everything that reads it, writes to it or scales it."""
    names, width = checkpoint.architecture, sizes_of(checkpoint.config)["hidden"]
    rows, columns = Cut.of(0, kept, width), Cut.of(1, kept, width)
    found: BlockCuts = {f"{module}.weight": [columns] for module in (names.embedding, names.head)}
    found |= {name: [rows] for name in norm_weights(checkpoint)}
    for index in range(checkpoint.num_blocks):
        block = checkpoint.block_name(index)
        if names.experts is not None:
            found[f"{block}.{names.experts.router}.weight"] = [columns]
        for group, sites in checkpoint.groups(index):
            for site in sites:
                if _reads_stream(group):
                    found[f"{site}.weight"] = [columns]
                else:
                    found |= _rows(site, kept, width)
    return found


def stream_norms(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The norms inside a block that read the residual stream."""
    return tuple(norm.name for norm in checkpoint.architecture.norms)


def norm_weights(checkpoint: Checkpoint) -> dict[str, NormKind]:
    """The weights of all norms with a channel for each of the stream's: what reads it, and on what blocks add to it."""
    names = checkpoint.architecture
    found: dict[str, NormKind] = {}
    for index in range(checkpoint.num_blocks):
        block = checkpoint.block_name(index)
        found |= {f"{block}.{name}.weight": "input" for name in stream_norms(checkpoint)}
        found |= {f"{block}.{name}.weight": "output" for name in names.output_norms}
    found[f"{names.final_norm}.weight"] = "final"
    return found


def _reads_stream(group: str) -> bool:
    return group.rpartition(".")[2] in ("qkv", "gate_up")
