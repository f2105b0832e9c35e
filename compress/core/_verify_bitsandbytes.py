"""What the bitsandbytes library makes of 4-bit layers in its format: for verify."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.core._verify_weights import LIBRARY_LAYERS, library_version, spread
from compress.core.errors import ArtifactError
from compress.core.formats import Reader
from compress.core.lazy import quiet_bitsandbytes
from compress.core.safetensors_io import TensorInfo, load_tensor
from compress.core.scheme import Scheme


def check_bitsandbytes(reader: Reader, schemes: Mapping[str, Scheme], tensors: Mapping[str, TensorInfo]) -> str:
    """The library dequantizes some layers as we do, to the bit, in the dtype that the file names."""
    quiet_bitsandbytes()
    from bitsandbytes.functional import QuantState, dequantize_4bit

    chosen = spread(sorted(module for module, scheme in schemes.items() if scheme.dtype != "int"), LIBRARY_LAYERS)
    if not chosen:
        return "no 4-bit layers, and others are not compared"
    for module in chosen:
        stored = [name for name in reader.stored_names(module, schemes[module]) if name in tensors]
        parts = {name.removeprefix(f"{module}."): load_tensor(tensors[name]) for name in stored}
        packed = parts.pop("weight")
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        state.shape = torch.Size([1, 2 * packed.numel()])  # 0.50.2 errs where blocks straddle rows
        theirs = dequantize_4bit(packed, state)
        ours = reader.dequantize(module, lambda name: load_tensor(tensors[name]), schemes[module], theirs.dtype)
        if not torch.equal(theirs.view(-1)[: ours.numel()], ours.view(-1)):
            raise ArtifactError("bitsandbytes reads other values", where=module)
    return f"bitsandbytes {library_version('bitsandbytes')} agrees on {', '.join(chosen)}"
