"""What verify finds out about weights: parts that fit their scheme, finite values, and decoders that agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.core._verify_folder import Contents
from compress.core._verify_parts import FLOATS, check_module_parts
from compress.core._verify_shapes import architecture_of, module_shapes, sizes_at
from compress.core.errors import ArtifactError, InputError
from compress.core.formats import NotKept, Reader, _reference, compressed_tensors
from compress.core.safetensors_io import MappedFiles, TensorInfo, load_tensor
from compress.core.scheme import OWN_GROUPS, Scheme
from compress.core.tensors import words_in

if TYPE_CHECKING:
    from compress.core.adapter import Adapter
    from compress.core.checkpoint import Checkpoint

_ROWS = 32  # output channels compared per large layer
_WHOLE = 1 << 18  # layers of at most this many weights are compared whole
_CHUNK = 1 << 22
# a block of zeros has a scale of zero in bitsandbytes
_SCALES = (".weight_scale", ".weight_global_scale", ".scales", ".input_scale")
_FP8_NAN = 0x7F  # with or without the sign
_E8M0_NAN = 0xFF
LIBRARY_LAYERS = 4
_LIBRARY_ROWS = 256  # a multiple of 32, so that packed zero points can be cut as well


def check_parts(contents: Contents, reader: Reader, schemes: Mapping[str, Scheme]) -> str:
    """Each quantized module has all tensors of its scheme with their shapes and no others; what is dense may be."""
    for module, scheme in schemes.items():
        _check_against_config(contents, module, check_module_parts(reader, module, scheme, contents.tensors))
    _check_dense(contents, reader, schemes)
    return f"{len(schemes)} quantized layers"


def _check_against_config(contents: Contents, module: str, shape: tuple[int, int]) -> None:
    architecture = architecture_of(contents.config)
    if architecture is None:
        return
    sizes = sizes_at(module, contents.config, architecture)
    wanted = module_shapes(sizes, in_expert=".experts." in module).get(module.rpartition(".")[2])
    if module == architecture.head:
        wanted = (sizes["vocab"], sizes["hidden"])
    if wanted is not None and shape != wanted:
        raise ArtifactError(f"is a weight of {list(shape)}, config.json asks for {list(wanted)}", where=module)


def _check_dense(contents: Contents, reader: Reader, schemes: Mapping[str, Scheme]) -> None:
    """A layer that the config calls quantized must not be stored dense (GPTQ's config does not say which are)."""
    architecture = architecture_of(contents.config)
    if architecture is None or reader.method != "compressed-tensors":
        return
    leaves = {site.rpartition(".")[2] for group in architecture.groups for site in group.sites}
    for name in contents.tensors:
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module in schemes or module.rpartition(".")[2] not in leaves:
            continue
        if reader.scheme_of(module) is not None:
            raise ArtifactError("is stored dense, but the config calls the layer quantized", where=name)


def check_values(name: str, info: TensorInfo, files: MappedFiles) -> None:
    """Floats are finite; scales are not zero as well (a symmetric grid may be mirrored by a negative scale)."""
    low, high = check_finite(name, info, files)
    if name.endswith(_SCALES) and low <= 0 <= high and bool((files.tensor(info) == 0).any()):
        raise ArtifactError("holds a scale that is zero", where=name)


def check_finite(name: str, info: TensorInfo, files: MappedFiles) -> tuple[float, float]:
    """Least and largest value of a float tensor, all of it finite; (inf, -inf) where there is nothing to compare."""
    low, high = float("inf"), float("-inf")
    if info.dtype == "F8_E4M3" and info.bytes:
        patterns = files.tensor(info).view(torch.uint8).reshape(-1)
        for start in range(0, patterns.numel(), _CHUNK):
            if bool(((patterns[start : start + _CHUNK] & _FP8_NAN) == _FP8_NAN).any()):
                raise ArtifactError("holds NaN", where=name)
    if info.dtype == "U8" and name.endswith(".weight_scale") and bool((files.tensor(info) == _E8M0_NAN).any()):
        raise ArtifactError("holds NaN", where=name)
    if info.dtype not in FLOATS or info.bytes == 0:
        return low, high
    flat = files.tensor(info).reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        least, most = torch.aminmax(flat[start : start + _CHUNK])  # NaN wins in both
        low, high = min(low, float(least)), max(high, float(most))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ArtifactError("holds NaN or infinite values", where=name)
    return low, high


def require_finite(checkpoint: Checkpoint | Adapter) -> None:
    """InputError that names folder and tensor if a weight is NaN or infinite. Reads every byte, several GB a second."""
    files = MappedFiles()
    for name, info in checkpoint.tensors.items():
        try:
            check_finite(name, info, files)
        except ArtifactError as error:
            hint = "the source is broken: download it again, or convert it anew"
            raise InputError(error.message, where=f"{checkpoint.folder}: {name}", hint=hint) from None


def check_module(
    reader: Reader, module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo], files: MappedFiles
) -> None:
    """The module decodes, and the second decoder gives the same fp32 values, bit for bit (large layers: some rows)."""
    rows, ours = sampled_weight(reader, module, scheme, tensors, files)
    again = _reference.weights(reader, module, tensors, scheme, rows, files.bytes)
    if ours.shape != again.shape or not np.array_equal(ours.numpy().view(np.uint32), again.view(np.uint32)):
        raise ArtifactError("the two decoders disagree on its values", where=module)
    if scheme.static_inputs:
        scale = compressed_tensors.input_scale(module, lambda name: files.tensor(tensors[name]))
        if float(scale) != _reference.input_scale(module, tensors, files.bytes):
            raise ArtifactError("the two decoders disagree on the scale of its inputs", where=module)


def sampled_weight(
    reader: Reader, module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo], files: MappedFiles
) -> tuple[np.ndarray, torch.Tensor]:
    """(row numbers, fp32 weights of these rows) of a module, by the main decoder."""

    def read(name: str) -> torch.Tensor:
        if name not in tensors:
            raise InputError("is missing", where=name)
        return files.tensor(tensors[name])

    try:
        whole = reader.decode(module, read, scheme)
    except NotKept:  # in activation order, say, which only the whole layer can undo
        weight = reader.dequantize(module, read, scheme, torch.float32)
        rows = sampled_rows((weight.shape[0], weight.shape[1]))
        return rows, weight[torch.from_numpy(rows)]
    rows = sampled_rows(whole.shape)
    return rows, whole.at(torch.from_numpy(rows)).dequantize()


@lru_cache(maxsize=64)  # a model has few shapes and many layers
def sampled_rows(shape: tuple[int, int]) -> np.ndarray:
    """All rows of a small matrix, evenly spread ones of a large one. Not to be changed in place."""
    rows, width = shape
    count = rows if rows * width <= _WHOLE else min(rows, _ROWS)
    return np.unique(np.linspace(0, rows - 1, count).astype(np.int64))


def library_version(name: str) -> str | None:
    """Version of a format's own library, None where it is not installed."""
    if find_spec(name.replace("-", "_")) is None:
        return None
    from importlib.metadata import version

    return version(name)


def check_library(reader: Reader, schemes: Mapping[str, Scheme], tensors: Mapping[str, TensorInfo]) -> str:
    """The format's own library reads some layers as we do. Compared in fp32, where both are exact, but 4-bit floats in
    bf16, which it makes of them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from compress.core.formats._compressed_tensors_config import format_of, weight_arguments

    chosen = spread(sorted(schemes), LIBRARY_LAYERS)
    for module in chosen:
        scheme = schemes[module]
        weights = QuantizationArgs.model_validate(weight_arguments(scheme))
        layer = QuantizationScheme(targets=["Linear"], weights=weights)
        parts = _first_rows(reader, module, scheme, tensors)
        theirs = BaseCompressor.get_value_from_registry(format_of(scheme)).decompress(dict(parts), layer)["weight"]
        prefixed = {f"{module}.{part}": value for part, value in parts.items()}
        dtype = torch.bfloat16 if scheme.dtype in OWN_GROUPS else torch.float32
        ours = reader.dequantize(module, prefixed.__getitem__, scheme, dtype)
        if theirs is None or not torch.equal(theirs.to(dtype), ours):
            raise ArtifactError("compressed-tensors reads other values", where=module)
    return f"compressed-tensors {library_version('compressed-tensors')} agrees on {', '.join(chosen)}"


def _first_rows(
    reader: Reader, module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]
) -> dict[str, torch.Tensor]:
    """A module's stored tensors, cut to its first rows; the scale in fp32, so that both decoders are exact."""
    parts = {name.rpartition(".")[2]: load_tensor(tensors[name]) for name in reader.stored_names(module, scheme)}
    rows = min(_LIBRARY_ROWS, parts["weight" if "weight" in parts else "weight_packed"].shape[0])
    for part in ("weight", "weight_packed"):
        if part in parts:
            parts[part] = parts[part][:rows]
    if parts["weight_scale"].numel() > 1:  # one scale may hold for the whole tensor
        parts["weight_scale"] = parts["weight_scale"][: -(-rows // scheme.rows_per_scale)]
    if "weight_zero_point" in parts:
        packed_rows = rows if "weight" in parts else words_in(rows, scheme.bits)
        parts["weight_zero_point"] = parts["weight_zero_point"][:packed_rows]
    if "weight_shape" in parts:
        parts["weight_shape"] = torch.tensor([rows, int(parts["weight_shape"][1])])
    if scheme.dtype not in OWN_GROUPS:
        parts["weight_scale"] = parts["weight_scale"].float()
    return parts


def spread(items: list[str], count: int) -> list[str]:
    """At most `count` of the items, evenly spread, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def quantized_names(reader: Reader, schemes: Mapping[str, Scheme]) -> Iterable[str]:
    """Disk names of all tensors that hold quantized modules."""
    for module, scheme in schemes.items():
        yield from reader.stored_names(module, scheme)
