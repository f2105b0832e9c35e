"""Export: the last stage's folder becomes the artifact's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.files import Written, link_or_copy, make_folder, remove_tree, write_entries
from compress.core.manifest import Coverage
from compress.core.safetensors_io import load_tensor, raw_bytes, read_header, torch_dtype
from compress.core.safetensors_layout import Entry, dtype_name, tensor_bytes
from compress.core.stage_writer import SHARD_METADATA

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.safetensors_io import TensorInfo

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def export(
    stage: Path, files: Mapping[str, Written], staged: Path, original: Checkpoint, *, rounds: bool
) -> dict[str, Written]:
    """Fill the folder `staged` from `stage`, whose `files` are as recorded: by hard links, nothing is held twice.

    With `rounds` (dense weights, which stages keep in fp32), a shard whose dtypes differ from the original's is
    rounded, once, here.
    """
    remove_tree(staged)
    make_folder(staged)
    exported = {}
    for name, written in files.items():
        make_folder((staged / name).parent)
        if rounds and name.endswith(".safetensors") and _needs_rounding(stage / name, original):
            entries = [_rounded(info, original) for info in read_header(stage / name).values()]
            exported[name] = write_entries(staged / name, entries, SHARD_METADATA)
        else:
            link_or_copy(stage / name, staged / name)
            exported[name] = written
    return exported


def _needs_rounding(shard: Path, original: Checkpoint) -> bool:
    return any(_target_dtype(info, original) != info.dtype for info in read_header(shard).values())


def _target_dtype(info: TensorInfo, original: Checkpoint) -> str:
    """The dtype of the tensor in the original; of most of its weights for a tensor that it lacks."""
    if info.dtype not in _FLOATS:
        return info.dtype
    before = original.tensors.get(info.name)
    return before.dtype if before else dtype_name(original.dtype)


def _rounded(info: TensorInfo, original: Checkpoint) -> Entry:
    dtype = _target_dtype(info, original)
    if dtype == info.dtype:
        return Entry(info.name, info.dtype, info.shape, lambda: raw_bytes(info))
    # The cast happens when the tensor's turn comes, so that one tensor at a time is in memory.
    return Entry(info.name, dtype, info.shape, lambda: tensor_bytes(load_tensor(info).to(torch_dtype(dtype))))


def coverage(original: Checkpoint, artifact: Checkpoint, quantized: Mapping[str, str]) -> tuple[Coverage, ...]:
    """What became of every tensor of the source. `quantized` maps modules to what they are stored as, e.g. w4a16."""
    return tuple(_fate(name, artifact, quantized) for name in original.tensors)


def _fate(name: str, artifact: Checkpoint, quantized: Mapping[str, str]) -> Coverage:
    module = name.removesuffix(".weight")
    if module != name and module in quantized:
        return Coverage(name, "quantized", quantized[module])
    if name in artifact.tensors:
        return Coverage(name, "kept")
    return Coverage(name, "dropped", "removed by a stage of the recipe")
