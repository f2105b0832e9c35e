"""Round-to-nearest of one layer: the whole of RTN, and what the other methods fall back to."""

import torch

from compress.core.grid import Clip, fit_grid
from compress.core.scheme import Scheme
from compress.core.walk import Site

CLIPS: dict[str, Clip | None] = {"mse": Clip(), "minmax": None}


def round_site(site: Site, scheme: Scheme, scale_dtype: torch.dtype, clip: str, fallback: str = "") -> None:
    """Replace a site's weight by its nearest codes; `fallback` says why the method proper was not used."""
    weight_OK = site.weight
    tensor = fit_grid(weight_OK, scheme, scale_dtype=scale_dtype, clip=CLIPS[clip]).round(weight_OK)
    error = tensor.dequantize().sub_(weight_OK).square_().sum() / weight_OK.square().sum().clamp(min=1e-30)
    site.replace(tensor)
    site.note(method="rtn", bits=scheme.bits, group_size=scheme.group_size, error=float(error), fallback=fallback)
