"""What verify finds out about a folder that holds a GGUF file: its layout, and that every value is a finite number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.core.errors import ArtifactError
from compress.core.formats._gguf_container import Stored, read
from compress.core.formats._gguf_reader import readable, values


def gguf_file(folder: Path) -> Path | None:
    """The folder's one GGUF file, None if it is another kind of folder."""
    files = sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not any(folder.glob("*.safetensors")) else None


def matrix_type(path: Path) -> str:
    """The type that most bytes of the file's matrices have, such as `q8_0`."""
    sizes: dict[str, int] = {}
    for tensor in read(path)[1].values():
        if len(tensor.shape) > 1:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.bytes
    return max(sizes, key=lambda name: sizes[name], default="without matrices").lower()


def check_gguf(path: Path) -> str:
    """Header and tensors contradict neither each other nor the file; no value is NaN or infinite."""
    metadata, tensors = read(path)
    for key in ("general.architecture", "tokenizer.ggml.model"):
        if key not in metadata:
            raise ArtifactError(f"lacks the metadata {key}", where=path.name)
    _check_places(path, list(tensors.values()))
    for tensor in tensors.values():
        if readable(tensor.type.name) and not np.isfinite(values(path, tensor)).all():
            raise ArtifactError("holds NaN or infinite values", where=f"{path.name}: {tensor.name}")
    kinds = sorted({tensor.type.name for tensor in tensors.values()})
    return f"{len(tensors)} tensors as {', '.join(kinds)}; all values finite"


def _check_places(path: Path, tensors: list[Stored]) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise ArtifactError("lies over another tensor", where=f"{path.name}: {tensor.name}")
        end = tensor.start + tensor.bytes
