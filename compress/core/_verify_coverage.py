"""What verify finds out by comparing with the source: every tensor quantized, kept or dropped with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path

import numpy as np
import torch

from compress.core._verify_folder import Contents, read_json
from compress.core._verify_shapes import architecture_of
from compress.core._verify_weights import quantized_names, sampled_weight
from compress.core.errors import ArtifactError, InputError
from compress.core.formats import Reader, method_of, reader_for
from compress.core.kv_scheme import is_scale, scheme_in
from compress.core.manifest import MANIFEST_NAME, Manifest
from compress.core.safetensors_io import MappedFiles, TensorInfo, raw_bytes
from compress.core.scheme import Scheme

# Relative error |w - quantized| / |w| that no honest quantization exceeds; zeros instead of weights have 1.
_WORST_ERROR = {2: 0.95, 3: 0.75}
_WORST_OTHERS = 0.5
_CHUNK_BYTES = 1 << 24


def check_coverage(
    contents: Contents,
    manifest: Manifest | None,
    source: Contents | None,
    schemes: Mapping[str, Scheme],
    stored: Set[str],
) -> str:
    """By names: what the manifest says became of each source tensor is what lies here, and nothing beyond."""
    if manifest is None and source is None:
        raise InputError("needs a manifest or the source to compare with", where=str(contents.folder))
    fates = _fates(contents, manifest, source, schemes)
    expected: set[str] = set(stored)
    for tensor, (status, reason) in fates.items():
        module = tensor.removesuffix(".weight")
        if status == "quantized" and module not in schemes:
            raise ArtifactError("is said to be quantized, but is not", where=tensor)
        if status in ("kept", "changed", "added"):
            if tensor not in contents.tensors and not (status == "added" and module in schemes):
                raise ArtifactError(f"is said to be {status}, but is missing", where=tensor)
            expected.add(tensor)
        if status == "dropped" and not reason:
            raise ArtifactError("was dropped without a reason", where=tensor)
        if status == "dropped" and (tensor in contents.tensors or module in schemes):
            raise ArtifactError("is said to be dropped, but is here", where=tensor)
    scales = filter(is_scale, contents.tensors if scheme_in(contents.config) else ())  # looked at by themselves
    extra = sorted(contents.tensors.keys() - expected - set(scales))
    if extra:
        raise ArtifactError("has no counterpart in the source", where=extra[0])
    unsaid = sorted(module for module in schemes if f"{module}.weight" not in fates)
    if unsaid:
        raise ArtifactError("is quantized, but the source has no such weight", where=unsaid[0])
    counts = Counter(status for status, _ in fates.values())
    always = ("quantized", "kept", "dropped")
    told = [*always, *(status for status in ("changed", "added") if counts[status])]
    return ", ".join(f"{counts[status]} {status}" for status in told)


def transformed(manifest: Manifest | None) -> set[str]:
    """Tensors that do not resemble the source's, since a transform came before, as the manifest says."""
    entries = () if manifest is None else manifest.coverage
    return {
        entry.tensor
        for entry in entries
        if entry.status in ("changed", "added") or (entry.status == "quantized" and " after " in entry.reason)
    }


def _fates(
    contents: Contents, manifest: Manifest | None, source: Contents | None, schemes: Mapping[str, Scheme]
) -> dict[str, tuple[str, str]]:
    """Source tensor -> (status, reason), as the manifest says; without one, as the files show."""
    names = None if source is None else source_names(source)
    if manifest is None:
        fates: dict[str, tuple[str, str]] = {}
        for name in names or ():
            if name.removesuffix(".weight") in schemes:
                fates[name] = ("quantized", "")
            else:
                fates[name] = ("kept" if name in contents.tensors else "dropped", "")
        if contents.config.get("tie_word_embeddings") is False:  # embedding and head may have been one tensor
            for module in _vocabulary(contents):
                if module in schemes or f"{module}.weight" in contents.tensors:
                    fates.setdefault(f"{module}.weight", ("added", ""))
        return fates
    fates = {}
    for entry in manifest.coverage:
        if entry.tensor in fates:
            raise ArtifactError(f"coverage names {entry.tensor} twice", where=MANIFEST_NAME)
        fates[entry.tensor] = (entry.status, entry.reason)
    told = {name for name, (status, _) in fates.items() if status != "added"}
    if names is not None and names != told:
        odd = sorted(names ^ told)[0]
        side = "coverage leaves out" if odd in names else "the source does not have"
        raise ArtifactError(f"{side} {odd}", where=MANIFEST_NAME)
    return fates


def source_names(source: Contents) -> set[str]:
    """Names of the source's tensors; a quantized source counts by the weights it stands for."""
    names = set(source.tensors)
    if method_of(source.config) is None:
        return names
    reader = reader_for(source.config, source.folder.name)
    schemes = reader.modules(names)
    return (names - set(quantized_names(reader, schemes))) | {f"{module}.weight" for module in schemes}


def check_kept(contents: Contents, source: Contents, stored: Set[str]) -> str:
    """Tensors that both folders have under one name are equal to the byte, but for those in `stored` (quantized)."""
    count = 0
    for name, info in contents.tensors.items():
        before = source.tensors.get(name)
        if before is None or name in stored:
            continue
        if (before.dtype, before.shape) != (info.dtype, info.shape):
            raise ArtifactError(
                f"is {info.dtype} {list(info.shape)}, the source has {before.dtype} {list(before.shape)}", where=name
            )
        if not _equal_bytes(info, before):
            raise ArtifactError("was kept, but differs from the source", where=name)
        count += 1
    return f"{count} tensors equal to the byte"


def _equal_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    left, right = (np.frombuffer(raw_bytes(info), np.uint8) for info in (one, other))
    starts = range(0, len(left), _CHUNK_BYTES)
    return all(np.array_equal(left[at : at + _CHUNK_BYTES], right[at : at + _CHUNK_BYTES]) for at in starts)


def check_closeness(contents: Contents, source: Contents, reader: Reader, schemes: Mapping[str, Scheme]) -> str:
    """Dequantized weights resemble the source's (large layers: some rows)."""
    if method_of(source.config) is not None:
        return "not compared: the source is quantized itself"
    worst, where = 0.0, ""
    files = MappedFiles()
    for module, scheme in schemes.items():
        rows, ours = sampled_weight(reader, module, scheme, contents.tensors, files)
        info = _tensor_of(source, module)
        if info is None or len(info.shape) != 2 or info.shape[1] != ours.shape[1] or int(rows[-1]) >= info.shape[0]:
            raise ArtifactError("the source has no weight of this shape", where=module)
        before = files.tensor(info)[torch.from_numpy(rows)].float()
        error = float((ours - before).norm() / before.norm().clamp(min=1e-30))
        if not error <= _WORST_ERROR.get(scheme.bits, _WORST_OTHERS):
            raise ArtifactError(f"is {error:.0%} away from the source: this is not its quantization", where=module)
        if error >= worst:
            worst, where = error, module
    return f"largest relative error {worst:.1%} ({where})" if where else "no layer to compare"


def _tensor_of(source: Contents, module: str) -> TensorInfo | None:
    """The tensor that a module's weight was made from; embedding and head may have been one."""
    names = (module, *sorted(_vocabulary(source))) if module in _vocabulary(source) else (module,)
    found = (source.tensors.get(f"{name}.weight") for name in names)
    return next((info for info in found if info is not None), None)


def _vocabulary(contents: Contents) -> set[str]:
    """Embedding and head."""
    architecture = architecture_of(contents.config)
    return set() if architecture is None else {architecture.embedding, architecture.head}


def check_lineage(manifest: Manifest, source: Contents) -> str:
    """The source given is the one that the manifest names: its weight files have the recorded hashes."""
    from compress.core.files import sha256_files

    recorded = manifest.lineage.get("sha256")
    if not isinstance(recorded, dict):
        raise ArtifactError("lineage.sha256 is not an object", where=MANIFEST_NAME)
    for path, found in sha256_files(source.shards).items():
        if recorded.get(path.name) != found:
            raise ArtifactError(f"is not the {path.name} that the artifact was made from", where=str(path))
    return f"{len(source.shards)} weight files have the recorded hashes"


def open_source(folder: Path) -> Contents:
    """Read the headers of the source's folder."""
    from compress.core._verify_folder import read_weights

    source = Contents(folder, config=read_json(folder / "config.json"))
    read_weights(source)
    return source
