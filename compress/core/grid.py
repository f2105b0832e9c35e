"""Scales and zero points: where the grid of a scheme lies, and rounding to it.

Shape suffixes: O output channels, K input channels, G groups, S channels of one group (the last group is padded).
"""

from dataclasses import dataclass

import torch

from compress.core import micro_scales
from compress.core.levels import e2m1_codes, nearest, nearest_e2m1, table
from compress.core.rounding_error import rounding_error
from compress.core.scheme import OWN_GROUPS, Scheme
from compress.core.tensors import QuantTensor, spread, unit_of

FP8_LARGEST = 448.0
_LEAST = 1e-38  # of a block of nf4: its reciprocal is still a number
INT8_REACH = 127.5  # of inputs: half of the codes -128 … 127, as compressed-tensors has it


@dataclass(frozen=True, slots=True)
class Grid:
    """Scale [O, G] in its storage dtype and zero point int8 [O, G] (None: symmetric) of every group; of nvfp4 also the
    divisor of the scales, fp32 [O, 1]."""

    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme
    divisor: torch.Tensor | None = None

    @property
    def unit(self) -> torch.Tensor:
        """What a level of 1 stands for, fp32 [O, G]."""
        return unit_of(self.scale, self.divisor)

    def round(self, weight_OK: torch.Tensor) -> QuantTensor:
        """Nearest codes: round-to-nearest (RTN)."""
        width, size = weight_OK.shape[1], self.scheme.group_size
        if self.scheme.dtype == "nf4":
            shrink = spread(1 / self.unit.clamp(min=_LEAST), size, width)
            stored = nearest(weight_OK.float() * shrink, table("nf4"))
            return QuantTensor.from_stored(stored, self.scale, None, self.scheme)
        codes = weight_OK.float() / spread(self.unit, size, width)
        if self.scheme.dtype in OWN_GROUPS:
            stored = e2m1_codes(nearest_e2m1(codes))
            return QuantTensor.from_stored(stored, self.scale, None, self.scheme, divisor=self.divisor)
        if self.scheme.dtype == "fp8":
            stored = codes.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
            return QuantTensor.from_stored(stored, self.scale, None, self.scheme)
        codes.round_()
        if self.zero is not None:
            codes += spread(self.zero.float(), size, width)
        codes.clamp_(self.scheme.lowest, self.scheme.highest)
        return QuantTensor.from_codes(codes.to(torch.int8), self.scale, self.zero, self.scheme)


@dataclass(frozen=True, slots=True)
class Clip:
    """How the span of a grid is searched: `steps` spans from the widest useful down to `floor` of minimum-to-maximum,
    then `refinements` between the best and its neighbours, each group for itself.

    signed: symmetric scales may be negative, so that the side with one more level (-2^(bits-1)) is the side that needs
    it, as in ggml's Q4_0. Matters the more the fewer bits there are.
    cubed: the error is the sum of cubes, which clips less: for weights that are still to take on the errors of others,
    as in GPTQ's sweep, and so reach further than they do when the span is chosen.
    """

    steps: int = 8
    refinements: int = 3
    floor: float = 0.5
    signed: bool = True
    cubed: bool = False


def fit_grid(
    weight_OK: torch.Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    clip: Clip | None = None,
    importance_K: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
) -> Grid:
    """Choose scale and zero point of every group of `weight_OK` (fp32).

    Without `clip` the grid spans minimum to maximum. With it each group takes the span with the least rounding error,
    squared or cubed, weighted by `importance_K` (the mean square of each input channel, say). Scales are rounded to
    `scale_dtype` before they are judged: what is chosen is what is stored. Spans of fp8 are not searched: its steps
    grow with the numbers, so that clipping some gains the others nothing. The scale of a block of nf4 is its largest
    magnitude without `clip`, as bitsandbytes has it. Of mxfp4 and nvfp4 the scales that they have are searched;
    `divisor` fp32 [1] is that of nvfp4, from the largest weight if left out.
    """
    if scheme.dtype == "fp8":
        largest_OG = _shared(_grouped(weight_OK, scheme).abs().amax(-1), scheme.rows_per_scale)
        return Grid(_nonzero((largest_OG / FP8_LARGEST).to(scale_dtype)), None, scheme)
    rows_at_once = max(1, _CACHED_WEIGHTS // weight_OK.shape[1]) if clip else len(weight_OK)
    if scheme.dtype in OWN_GROUPS:
        if divisor is None and scheme.dtype == "nvfp4":
            divisor = micro_scales.divisor_for(weight_OK.abs().amax())
        micro = [_fit_micro(rows_OK, scheme, divisor, clip, importance_K) for rows_OK in weight_OK.split(rows_at_once)]
        divisor_O1 = None if divisor is None else divisor.view(1, 1).expand(len(weight_OK), 1).contiguous()
        return Grid(torch.cat(micro), None, scheme, divisor_O1)
    parts = [
        _fit(_grouped(rows_OK, scheme), scheme, scale_dtype, clip, importance_K)
        for rows_OK in weight_OK.split(rows_at_once)
    ]
    scale = torch.cat([scale for scale, _ in parts]).to(scale_dtype)
    zero = None if scheme.symmetric else torch.cat([zero for _, zero in parts if zero is not None]).to(torch.int8)
    return Grid(scale, zero, scheme)


def stored_dtype(scheme: Scheme, scale_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a grid's scales: `scale_dtype`, unless the scheme has one of its own."""
    scales = micro_scales.SCALES.get(scheme.dtype)
    return scale_dtype if scales is None else scales.dtype


_CACHED_WEIGHTS = 1 << 20  # rows are searched in pieces that stay in the cache


def _fit_micro(
    weight_OK: torch.Tensor,
    scheme: Scheme,
    divisor: torch.Tensor | None,
    clip: Clip | None,
    importance_K: torch.Tensor | None,
) -> torch.Tensor:
    groups_OGS = _grouped(weight_OK, scheme)
    if clip is None:
        return micro_scales.reaching(groups_OGS, scheme, divisor)
    weights_GS = None if importance_K is None else _grouped(importance_K[None], scheme)[0]
    return micro_scales.search(groups_OGS, scheme, divisor, weights_GS, cubed=clip.cubed)


def _fit(
    groups_OGS: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    clip: Clip | None,
    importance_K: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    low_OG = groups_OGS.amin(-1).clamp_(max=0)
    high_OG = groups_OGS.amax(-1).clamp_(min=0)
    if clip is None:
        return _span(low_OG, high_OG, 1.0, scheme, scale_dtype)
    weights_GS = None if importance_K is None else _grouped(importance_K[None], scheme)[0]
    search = _Search(groups_OGS, low_OG, high_OG, scheme, scale_dtype, weights_GS, clip.cubed)
    widest = _widest(scheme)
    stride = (widest - clip.floor) / clip.steps
    signs = (1.0, -1.0) if clip.signed and scheme.symmetric and scheme.dtype == "int" else (1.0,)
    for step in range(clip.steps + 1):
        for sign in signs:
            search.try_shrink(torch.full_like(low_OG, sign * (widest - step * stride)))
    for _ in range(clip.refinements):
        stride /= 2
        centre = search.shrink.clone()
        for shift in (-stride, stride):
            search.try_shrink(centre + centre.sign() * shift)
    return search.scale, search.zero


def _widest(scheme: Scheme) -> float:
    """The widest span worth a try, of minimum to maximum."""
    if scheme.dtype == "nf4":
        return 1.2  # the levels next to the outermost ones reach the largest weights
    return (scheme.highest - scheme.lowest) / (2 * scheme.highest) if scheme.symmetric else 1.0


class _Search:
    """The best span so far of every group of `groups_OGS`."""

    def __init__(
        self,
        groups_OGS: torch.Tensor,
        low_OG: torch.Tensor,
        high_OG: torch.Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        importance_GS: torch.Tensor | None,
        cubed: bool,
    ) -> None:
        self.groups_OGS, self.low_OG, self.high_OG = groups_OGS, low_OG, high_OG
        self.scheme, self.scale_dtype, self.importance_GS = scheme, scale_dtype, importance_GS
        self.cubed = cubed
        self.error = torch.full_like(low_OG, torch.inf)
        self.shrink = torch.ones_like(low_OG)
        self.scale, self.zero = _span(low_OG, high_OG, 1.0, scheme, scale_dtype)

    def try_shrink(self, shrink_OG: torch.Tensor) -> None:
        scale, zero = _span(self.low_OG, self.high_OG, shrink_OG, self.scheme, self.scale_dtype)
        error = rounding_error(self.groups_OGS, scale, zero, self.importance_GS, self.scheme, cubed=self.cubed)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.shrink = torch.where(better, shrink_OG, self.shrink)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = None if zero is None or self.zero is None else torch.where(better, zero, self.zero)


def input_scale(largest: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The scale [1] of static inputs whose largest magnitude is `largest`, in `dtype`."""
    reach = FP8_LARGEST if scheme.dtype == "fp8" else INT8_REACH
    return _nonzero((largest.float() / reach).to(dtype)).reshape(1)


def _grouped(weight_OK: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[O, K] -> [O, G, S], zeros behind a ragged tail (they never widen a span)."""
    rows, width = weight_OK.shape
    size = scheme.group_width(width)
    missing = -width % size
    padded = torch.nn.functional.pad(weight_OK, (0, missing)) if missing else weight_OK.contiguous()
    return padded.reshape(rows, -1, size)


def _shared(largest_OG: torch.Tensor, rows: int) -> torch.Tensor:
    """The largest of so many output channels, for each of them."""
    if rows == 1:
        return largest_OG
    return torch.cat([block.amax(0, keepdim=True).expand_as(block) for block in largest_OG.split(rows)])


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """For a group of zeros any scale will do."""
    return torch.where(scale.abs() > 0, scale, torch.ones_like(scale))


def _span(
    low_OG: torch.Tensor, high_OG: torch.Tensor, shrink: torch.Tensor | float, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (fp32, rounded to its storage dtype) and zero point of the grid that spans `shrink` of low … high."""
    steps = 2 if scheme.dtype == "nf4" else scheme.highest - scheme.lowest  # of nf4 the outermost levels are -1 and 1
    reach = torch.maximum(-low_OG, high_OG) * 2 if scheme.symmetric else high_OG - low_OG
    scale = (reach * shrink / steps).to(scale_dtype).float()
    if scheme.dtype == "nf4":  # a block of zeros has a scale of zero in bitsandbytes
        return scale, None
    scale = _nonzero(scale)
    if scheme.symmetric:
        return scale, None
    return scale, (scheme.lowest - low_OG * shrink / scale).round_().clamp_(scheme.lowest, scheme.highest)
