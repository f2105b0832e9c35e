"""Round-to-nearest of one layer: the whole of RTN, and what the other methods fall back to."""

from collections.abc import Callable
from dataclasses import replace

import torch

from compress.core.events import Notice
from compress.core.grid import Clip, fit_grid
from compress.core.micro_scales import divisor_for
from compress.core.passes import Job
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from compress.core.walk import Group, Site

CLIPS: dict[str, Clip | None] = {"mse": Clip(), "minmax": None}
_ROUNDED_AT_ONCE = 4 << 20  # weights; a search and its rounding hold five numbers for each


def rows_at_once(width: int, share: int = 1) -> int:
    """Output channels of a layer with `width` inputs that are rounded together: whole blocks of `share` channels."""
    return max(1, _ROUNDED_AT_ONCE // width // share) * share


def round_site(
    site: Site,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: str,
    *,
    fallback: str = "",
    input_scale: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
) -> None:
    """Replace a site's weight by its nearest codes; `fallback` says why the method proper was not used, `input_scale`
    is that of static inputs, `divisor` that of `shared_divisor`: the site's own if left out."""
    tensor, error = round_rows(site.rows, site.shape, scheme, scale_dtype, clip, divisor)
    site.replace(replace(tensor, input_scale=input_scale))
    site.note(method="rtn", bits=scheme.bits, group_size=scheme.group_size, error=error, fallback=fallback)


def round_rows(
    read: Callable[[slice], torch.Tensor],
    shape: tuple[int, int],
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: str,
    divisor: torch.Tensor | None = None,
) -> tuple[QuantTensor, float]:
    """Nearest codes of a weight [out, in] whose rows `read` gives in fp32, some at a time; and their relative error."""
    if divisor is None and scheme.dtype == "nvfp4":
        divisor = divisor_for(_largest(read, shape))
    outputs, width = shape
    rows = rows_at_once(width, scheme.rows_per_scale)
    parts, error, power = [], 0.0, 1e-30
    for start in range(0, outputs, rows):
        weight_OK = read(slice(start, start + rows))
        grid = fit_grid(weight_OK, scheme, scale_dtype=scale_dtype, clip=CLIPS[clip], divisor=divisor)
        tensor = grid.round(weight_OK)
        power += float(weight_OK.square().sum())
        error += float(tensor.dequantize().sub_(weight_OK).square_().sum())
        parts.append(tensor)
    return QuantTensor.stack(parts), error / power


def shared_divisor(chosen: list[tuple[Site, Scheme]]) -> torch.Tensor | None:
    """The divisor of the nvfp4 scales of layers that share an input, from the largest of their weights; None: there are
    no such layers. Engines fuse q, k, v and gate, up into one layer each, which has one divisor."""
    sites = [site for site, scheme in chosen if scheme.dtype == "nvfp4"]
    if not sites:
        return None
    return divisor_for(torch.stack([_largest(site.rows, site.shape) for site in sites]).amax())


def _largest(read: Callable[[slice], torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    rows = rows_at_once(shape[1])
    pieces = [read(slice(start, start + rows)).abs().amax() for start in range(0, shape[0], rows)]
    return torch.stack(pieces).amax()


def too_few_tokens(group: Group, per_channel: float) -> str:
    """Why an expert is rounded to nearest: it saw fewer tokens than `per_channel` times its width. Else empty."""
    if not group.routed or group.tokens >= per_channel * group.width:
        return ""
    return f"it saw {group.tokens} tokens, fewer than {per_channel:g} per input channel ({group.width})"


def fall_back(
    site: Site,
    scheme: Scheme,
    clip: str,
    job: Job,
    reason: str,
    *,
    input_scale: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
) -> None:
    """Round a site to nearest for want of better, and say why."""
    job.events(Notice(f"rounded to nearest: {reason}", site.name, level="warning"))
    dtype = job.checkpoint.dtype
    round_site(site, scheme, dtype, clip, fallback=reason, input_scale=input_scale, divisor=divisor)
