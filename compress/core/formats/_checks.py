"""Small things that several formats need: how a tensor that does not fit is named, and a transpose that lies anew."""

from __future__ import annotations

import torch

from compress.core.errors import ArtifactError


def misfit(module: str, suffix: str, tensor: torch.Tensor, wanted: str) -> ArtifactError:
    """The error for a tensor of the wrong type or shape."""
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return ArtifactError(f"is {found}, the scheme needs {wanted}", where=f"{module}.{suffix}")


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose, laid out anew: .contiguous() would keep odd strides where one side is 1."""
    return matrix.T.clone(memory_format=torch.contiguous_format)
