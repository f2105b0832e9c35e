"""`compress level`: a model whose feed-forward networks differ in width becomes one with equally wide ones.

Channels of zeros are added up to the widest: they add nothing to any output, so that the model computes the same, and
every engine opens it. What that costs in parameters and bytes is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import compress
from compress.core.cuts import Cut, Cuts, cut, widen
from compress.core.errors import ArtifactError, InputError
from compress.core.events import Finished, Listener, Progress, Started, silent
from compress.core.files import Written, atomic_write, copy_file, make_folder, write_entries, written_file
from compress.core.manifest import Coverage
from compress.core.model_files import INDEX_NAME, SHARD_METADATA, shard_index, shard_name, write_json
from compress.core.safetensors_io import load_tensor, raw_bytes
from compress.core.safetensors_layout import Entry, tensor_bytes
from compress.core.sizes import PER_LAYER_KEY, width_entries, widths_of
from compress.export_artifact import carry_over, front_matter, open_source, require_verified, staged_at, write_manifest

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Levelled:
    """The new artifact, the common width, and parameters and bytes of tensors before and after."""

    folder: Path
    width: int
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int

    @property
    def sentence(self) -> str:
        """What it costs."""
        more = 100 * (self.parameters / self.parameters_before - 1)
        return (
            f"every feed-forward network is {self.width} wide: {self.parameters_before:,} parameters became "
            f"{self.parameters:,}, {more:.3g} % more"
        )


def level(folder: Path, output: Path, *, fresh: bool = False, events: Listener = silent) -> Levelled:
    """Write the dense model in `folder` to `output`, equally wide in all blocks. InputError if it is that already, or
    quantized. `fresh` may replace an older artifact of ours at `output`."""
    source, manifest = open_source(folder)
    widths = _uneven_widths(source)
    padding = dict(_padding(source, widths))
    with staged_at(output, folder, fresh=fresh) as staged:
        events(Started("level", source.num_blocks, "block"))
        files = _weights(source, padding, max(widths), staged, events)
        carried = carry_over(source, manifest, staged)
        files |= carried
        atomic_write(staged / "README.md", _card(source, max(widths), "evaluation.json" in carried))
        files["README.md"] = written_file(staged / "README.md")
        coverage = None if manifest is None else _coverage(manifest, padding)
        write_manifest(source, manifest, staged, files, work={"level": {}}, coverage=coverage)
        written = _require_same(source, padding, staged)
        require_verified(staged)
    events(Finished("level", str(output)))
    before, after = (_figures(one) for one in (source, written))
    return Levelled(output, max(widths), before[0], after[0], before[1], after[1])


def _uneven_widths(source: Checkpoint) -> list[int]:
    widths = widths_of(source.config)
    if widths is None:
        raise InputError(
            "all layers are equally wide, so there is nothing to level: every engine opens it as it is",
            where=str(source.folder),
        )
    if source.schemes:
        raise InputError(
            "its weights are quantized, and only dense ones are padded",
            where=str(source.folder),
            hint="level the model before it is quantized",
        )
    return widths


def _padding(source: Checkpoint, widths: Sequence[int]) -> Iterator[tuple[str, list[Cut]]]:
    """What would have to be cut from each tensor of an equally wide model to get the source's, by tensor name."""
    widest = max(widths)
    for index, width in enumerate(widths):
        if width == widest:
            continue
        groups = dict(source.groups(index))
        for site in groups["down"]:
            yield f"{site}.weight", [Cut.of(1, range(width), widest)]
        for site in groups["gate_up"]:
            parts = source.matrix_shape(site)[0] // width  # a fused layer has gate and up, one behind the other
            kept = [part * widest + channel for part in range(parts) for channel in range(width)]
            names = (f"{site}.weight", f"{site}.bias")
            yield from ((name, [Cut.of(0, kept, parts * widest)]) for name in names if name in source.tensors)


def _weights(source: Checkpoint, padding: Cuts, widest: int, staged: Path, events: Listener) -> dict[str, Written]:
    """Shards, index, config and what else belongs to the model."""
    files: dict[str, Written] = {}
    for index in range(source.num_blocks + 1):
        inside = index < source.num_blocks
        names = source.block_tensors(index) if inside else source.rest_tensors()
        name = shard_name(index, source.num_blocks)
        files[name] = write_entries(staged / name, _entries(source, padding, names), SHARD_METADATA)
        if inside:
            events(Progress("level", index + 1, source.num_blocks, source.block_name(index)))
    for relative in source.aux_files:
        make_folder((staged / relative).parent)
        copy_file(source.folder / relative, staged / relative)
        files[str(relative)] = written_file(staged / relative)
    config = {key: value for key, value in source.config.items() if key != PER_LAYER_KEY}
    files["config.json"] = write_json(staged / "config.json", config | width_entries([widest]))
    files[INDEX_NAME] = write_json(staged / INDEX_NAME, shard_index(staged, files))
    return files


def _entries(source: Checkpoint, padding: Cuts, names: Iterable[str]) -> list[Entry]:
    return [_entry(source, name, padding.get(name, ())) for name in names]


def _entry(source: Checkpoint, name: str, cuts: Sequence[Cut]) -> Entry:
    """One tensor, padded when its turn comes."""
    info = source.info(name)
    if not cuts:
        return Entry(name, info.dtype, tuple(info.shape), lambda: raw_bytes(info))
    shape = list(info.shape)
    for one in cuts:
        shape[one.dim] = one.size
    return Entry(name, info.dtype, tuple(shape), lambda: tensor_bytes(widen(load_tensor(info), cuts)))


def _require_same(source: Checkpoint, padding: Cuts, staged: Path) -> Checkpoint:
    """What was written; ArtifactError unless it holds the source's weights and zeros beside them."""
    import torch

    from compress.core.checkpoint import Checkpoint

    written = Checkpoint.open(staged)
    for name, cuts in padding.items():
        padded, original = written.tensor(name), source.tensor(name)
        if not torch.equal(cut(padded, cuts), original) or padded.count_nonzero() != original.count_nonzero():
            raise ArtifactError("is not the source's weight with zeros beside it", where=f"{staged}: {name}")
    return written


def _figures(model: Checkpoint) -> tuple[int, int]:
    infos = model.tensors.values()
    return sum(math.prod(info.shape) for info in infos), sum(info.bytes for info in infos)


def _coverage(manifest: Manifest, padding: Mapping[str, object]) -> tuple[Coverage, ...]:
    """What became of the first source's tensors; those that were padded are not as they were."""
    found = []
    for fate in manifest.coverage:
        if fate.tensor in padding:
            status = "changed" if fate.status == "kept" else fate.status
            fate = replace(fate, status=status, reason=f"{fate.reason}, padded with zeros".removeprefix(", "))
        found.append(fate)
    return tuple(found)


def _card(source: Checkpoint, width: int, has_figures: bool) -> str:
    figures = " `evaluation.json` holds the figures of the source, which are its own, too." if has_figures else ""
    lines = [
        f"# {source.source.id}, levelled",
        "",
        f"Written by compress {compress.__version__} from a model whose feed-forward networks differ in width:",
        f"zeros fill all of them up to {width} channels. It computes the same, and every engine opens it.{figures}",
    ]
    return front_matter(source) + "\n".join(lines) + "\n"
