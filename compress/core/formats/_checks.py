"""Small things that several formats need: how a tensor that does not fit is named, and what is exact in fp16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from compress.core.errors import ArtifactError, UsageError
from compress.core.scheme import Scheme


def misfit(module: str, suffix: str, tensor: torch.Tensor, wanted: str) -> ArtifactError:
    """The error for a tensor of the wrong type or shape."""
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return ArtifactError(f"is {found}, the scheme needs {wanted}", where=f"{module}.{suffix}")


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose, laid out anew: .contiguous() would keep odd strides where one side is 1."""
    return matrix.T.clone(memory_format=torch.contiguous_format)


def exact_as(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` in `dtype` if that changes no value; else as it is."""
    cast = scale.to(dtype)
    return cast if torch.equal(cast.float(), scale.float()) else scale


def exact_in_half(scale: torch.Tensor) -> torch.Tensor:
    """`scale` in fp16, which the kernels of most readers compute in, if that changes no value; else as it is."""
    return exact_as(scale, torch.float16)


def usual_scheme(schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme that most modules have; of equally frequent ones the first by name."""
    if not schemes:
        raise UsageError("no module is quantized: there is no quantization_config to write")
    counts = Counter(schemes.values())
    return min(counts, key=lambda scheme: (-counts[scheme], repr(scheme)))
