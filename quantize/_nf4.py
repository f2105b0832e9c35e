"""NF4 of one layer, as bitsandbytes makes it."""

from dataclasses import replace

import torch

from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from compress.core.walk import Site
from quantize._rounding import CLIPS, rows_at_once


def round_site(site: Site, scheme: Scheme, scale_dtype: torch.dtype, clip: str) -> None:
    """Replace a site's weight by the nearest levels; `scale_dtype` is the model's, in which largest weights are exact.

    With double quantization codes are those that the scales before it give, as in bitsandbytes.
    """
    outputs, width = site.shape
    rows = rows_at_once(width)
    pieces = [slice(start, start + rows) for start in range(0, outputs, rows)]
    plain = replace(scheme, double_quantization=False)
    parts = []
    for piece in pieces:
        weight_OK = site.rows(piece)
        parts.append(fit_grid(weight_OK, plain, scale_dtype=scale_dtype, clip=CLIPS[clip]).round(weight_OK))
    tensor = QuantTensor.stack(parts)
    if scheme.double_quantization:
        tensor = tensor.with_nested_scales()
    error, power = 0.0, 1e-30
    for piece in pieces:
        weight_OK = site.rows(piece)
        power += float(weight_OK.square().sum())
        error += float(tensor.rows(piece.start, piece.stop).dequantize().sub_(weight_OK).square_().sum())
    site.replace(tensor)
    site.note(method="nf4", bits=scheme.bits, group_size=scheme.group_size, error=error / power)
