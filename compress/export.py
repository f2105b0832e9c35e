"""Export: the last stage's folder becomes the artifact's files, in the format that is asked for.

Stages keep quantized weights in the format that their method names (Pass.formats). `rewrite` puts codes and scales into
another, one block at a time; nothing is rounded, so that every weight means the same number to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.core.compatibility import formats_for, refusals
from compress.core.errors import ArtifactError, InputError
from compress.core.files import (
    Written,
    copy_file,
    link_or_copy,
    make_folder,
    remove_tree,
    write_entries,
    written_file,
)
from compress.core.formats import method_of, stored_modules, writer_for
from compress.core.formats._checks import exact_as
from compress.core.kv_scheme import scheme_in, with_scheme
from compress.core.manifest import Coverage
from compress.core.model_files import INDEX_NAME, SHARD_METADATA, shard_index, shard_name, unquantized, write_json
from compress.core.safetensors_io import load_tensor, raw_bytes, read_header, torch_dtype
from compress.core.safetensors_layout import Entry, dtype_name, tensor_bytes, tensor_entry

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.compatibility import Shape
    from compress.core.safetensors_io import TensorInfo
    from compress.core.scheme import Scheme

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SETTINGS_OF_OTHERS = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})


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
    if rounds:
        (staged / INDEX_NAME).unlink()
        exported[INDEX_NAME] = write_json(staged / INDEX_NAME, shard_index(staged, exported))
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


def rewrite(source: Checkpoint, staged: Path, format: str) -> dict[str, Written]:
    """Fill the folder `staged` with the quantized model `source` in `format`, a shard per block and one for the rest.

    InputError if `format` cannot hold it as it is. Every weight is read back and compared, so that ArtifactError says
    of a fault of ours, too.
    """
    require_writable(source, format)
    remove_tree(staged)
    make_folder(staged)
    files: dict[str, Written] = {}
    blocks = [source.block_tensors(index) for index in range(source.num_blocks)]
    for index, names in enumerate([*blocks, source.rest_tensors()]):
        name = shard_name(index, source.num_blocks)
        files[name] = write_entries(staged / name, _encoded(source, names, format), SHARD_METADATA)
    for relative in source.aux_files:
        if relative.name not in _SETTINGS_OF_OTHERS:
            make_folder((staged / relative).parent)
            copy_file(source.folder / relative, staged / relative)
            files[str(relative)] = written_file(staged / relative)
    schemes = source.schemes
    config = source.config | {
        "quantization_config": writer_for(format).quantization_config(schemes, unquantized(source, schemes))
    }
    if format == "compressed-tensors" and scheme_in(source.config):
        config = with_scheme(config)
    files["config.json"] = write_json(staged / "config.json", config)
    files[INDEX_NAME] = write_json(staged / INDEX_NAME, shard_index(staged, files))
    _require_equal(source, staged)
    return files


def require_writable(source: Checkpoint, format: str) -> None:
    """InputError, with the reason and what would work, unless `format` can hold the quantized model as it is."""
    method = method_of(source.config)
    if method is None:
        raise InputError(
            f"the weights are dense, and {format} would hold them quantized",
            where=str(source.folder),
            hint="quantize them by a recipe first; only --format gguf takes dense weights",
        )
    schemes, shapes = source.schemes, shapes_of(source)
    require_held(schemes, shapes, format, where=str(source.folder))


def require_held(schemes: Mapping[str, Scheme], shapes: Mapping[str, Shape], format: str, where: str) -> None:
    """InputError that names layer, reason and the formats that would do, unless `format` can hold these layers."""
    found = refusals(schemes, shapes, format)
    if not found:
        return
    module, reason = next(iter(found.items()))
    more = f" (and {len(found) - 1} more layers)" if len(found) > 1 else ""
    others = [name for name in formats_for(schemes, shapes) if name != format]
    names = [f"{name} (where its fp16 scales hold theirs)" if name == "gguf" else name for name in others]
    hint = f"as they are, these weights can be written as {', '.join(names)}" if names else None
    raise InputError(f"{module} cannot be written as {format}: {reason}{more}", where=where, hint=hint)


def shapes_of(source: Checkpoint) -> dict[str, Shape]:
    """Shape [out, in] of every quantized module, from headers."""
    return {module: source.matrix_shape(module) for module in source.schemes}


def _encoded(source: Checkpoint, names: Iterable[str], format: str) -> list[Entry]:
    """Entries of one shard: quantized modules encoded anew, all else byte for byte, when its turn comes."""
    writer, module_of = writer_for(format), stored_modules(source)
    entries = []
    for name in names:
        if name not in module_of:
            entries.append(_as_it_is(source.info(name)))
    for module in dict.fromkeys(module_of[name] for name in names if name in module_of):
        tensor = source.quant_tensor(module)
        if tensor is None:
            raise ArtifactError("is stored both quantized and dense", where=module)
        if tensor.scale.dtype.itemsize > 1:  # 8-bit scales are as their format has them
            # As a run would write it: scales in the model's dtype. Formats that want another one change it themselves.
            tensor = replace(tensor, scale=exact_as(tensor.scale, source.dtype))
        entries += [tensor_entry(name, part) for name, part in writer.encode(module, tensor).items()]
    return entries


def _as_it_is(info: TensorInfo) -> Entry:
    return Entry(info.name, info.dtype, info.shape, lambda: raw_bytes(info))


def _require_equal(source: Checkpoint, staged: Path) -> None:
    """ArtifactError unless the written folder means the same weights, to the bit."""
    import torch

    from compress.core.checkpoint import Checkpoint

    written = Checkpoint.open(staged)
    if written.schemes.keys() != source.schemes.keys():
        raise ArtifactError("other layers are quantized than in the source", where=str(staged))
    for module in source.schemes:
        if not torch.equal(written.weight(module, torch.float32), source.weight(module, torch.float32)):
            raise ArtifactError("does not mean the same weights as the source", where=f"{staged}: {module}")


def coverage(
    original: Checkpoint, artifact: Checkpoint, quantized: Mapping[str, str], transforms: Sequence[str] = ()
) -> tuple[Coverage, ...]:
    """What became of every tensor of the source. `quantized` maps modules to what they are stored as, e.g. w4a16;
    `transforms` are what changed the weights before."""
    after = f" after {', '.join(transforms)}" if transforms else ""
    fates = [_fate(name, original, artifact, quantized, after) for name in original.tensors]
    for module in (original.architecture.embedding, original.architecture.head):
        name = f"{module}.weight"
        if name not in original.tensors and (name in artifact.tensors or module in artifact.schemes):
            stored = f", {quantized[module]}" if module in artifact.schemes else ""
            fates.append(Coverage(name, "added", f"embedding and head are two tensors now{stored}{after}"))
    said = {fate.tensor for fate in fates}
    packed = stored_modules(artifact)
    names = [f"{packed[name]}.weight" if name in packed else name for name in artifact.tensors]
    fates += [Coverage(name, "added", after.strip()) for name in dict.fromkeys(names) if name not in said]
    return tuple(fates)


def _fate(name: str, original: Checkpoint, artifact: Checkpoint, quantized: Mapping[str, str], after: str) -> Coverage:
    module = name.removesuffix(".weight")
    if module != name and module in quantized:
        return Coverage(name, "quantized", quantized[module] + after)
    if name in artifact.tensors:
        if after and raw_bytes(original.tensors[name]) != raw_bytes(artifact.tensors[name]):
            return Coverage(name, "changed", after.strip())
        return Coverage(name, "kept")
    return Coverage(name, "dropped", "removed by a stage of the recipe")
