"""Codes that are trained: the weights of a quantized model, rounded in every forward, with a straight-through gradient.

A layer's codes are round(place), a real number for every weight; its scales are start · (1 + stretch). The gradient g
of the weight is handed on to places as if they were not rounded, g · scale, and to stretches as it is, Σ g · level ·
start over the group: learned step sizes (LSQ, Esser et al., 2020, arXiv:1902.08153). Scales are rounded to their
storage dtype in the forward, so that what is trained with is, to the bit, what the packed tensor says.

Shape suffixes: O output channels, K input channels, G groups, S channels of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.checkpoint import Checkpoint
from compress.core.passes import Job
from compress.core.patterns import covered
from compress.core.tensors import QuantTensor
from distill._patches import Place, patch, places
from distill._rest import Rest

if TYPE_CHECKING:
    from distill._settings_parts import Coded

INSIDE = 0.45  # how far from the middle of its bin a place may start: nearer to the edge noise would flip it


class Codes(nn.Module):
    """One matrix: makes the weight [O, K] of its places [O, K]. `still`: weights that are zero stay so."""

    def __init__(self, start: QuantTensor, *, stretched: bool, still: bool) -> None:
        super().__init__()
        scheme = start.scheme
        self._start = start
        self.range = scheme.lowest, scheme.highest
        self.start_OG1 = nn.Buffer(start.scale.float()[..., None])
        zero_OG = torch.zeros_like(start.scale) if start.zero is None else start.zero
        self.zero_OG1 = nn.Buffer(zero_OG.float()[..., None])
        self.still_OGS = nn.Buffer(self._grouped(start.codes().float()) == self.zero_OG1) if still else None
        self.stretch_OG1 = nn.Parameter(torch.zeros_like(self.start_OG1), requires_grad=stretched)

    def forward(self, place_OK: Tensor) -> Tensor:
        return _StraightThrough.apply(place_OK, self.stretch_OG1, self)

    def places(self, weight_OK: Tensor | None) -> Tensor:
        """Where codes start from: in the middle of their bins, or where `weight_OK` is nearest in them."""
        codes_OGS = self._grouped(self._start.codes().float())
        if weight_OK is None:
            return codes_OGS.reshape(self._start.shape)
        exact_OGS = self._grouped(weight_OK.float().cpu()) / self.start_OG1.cpu() + self.zero_OG1.cpu()
        return (codes_OGS + (exact_OGS - codes_OGS).clamp_(-INSIDE, INSIDE)).reshape(self._start.shape)

    def scale_OG1(self) -> Tensor:
        """The scales as they are stored, fp32."""
        stretched = self.start_OG1 * (1 + self.stretch_OG1.detach())
        return stretched.to(self._start.scale.dtype).float()

    def levels(self, place_OK: Tensor) -> Tensor:
        """Codes less their zero points, [O, G, S]."""
        return self._grouped(place_OK.detach()).round().clamp_(*self.range).sub_(self.zero_OG1)

    @torch.no_grad()
    def packed(self, place_OK: Tensor) -> QuantTensor:
        """The matrix as it is stored."""
        codes_OGS = self._grouped(place_OK).round().clamp_(*self.range)
        codes_OK = codes_OGS.reshape(self._start.shape).to("cpu", torch.int8)
        scale_OG = self.scale_OG1()[..., 0].to("cpu", self._start.scale.dtype)
        made = QuantTensor.from_codes(codes_OK, scale_OG, self._start.zero, self._start.scheme)
        return replace(made, input_scale=self._start.input_scale)

    def _grouped(self, weight_OK: Tensor) -> Tensor:
        return weight_OK.unflatten(1, (self.start_OG1.shape[1], -1))

    def gradients(self, g_OK: Tensor, place_OK: Tensor) -> tuple[Tensor, Tensor]:
        """Of places and stretches. A place outside of the codes is not driven further out."""
        g_OGS, place_OGS = self._grouped(g_OK), self._grouped(place_OK)
        slope_OG1 = torch.linalg.vecdot(g_OGS, self.levels(place_OK))[..., None] * self.start_OG1
        g_OGS = g_OGS * self.scale_OG1()
        lowest, highest = self.range
        g_OGS.masked_fill_((place_OGS < lowest) & (g_OGS > 0) | (place_OGS > highest) & (g_OGS < 0), 0)
        if self.still_OGS is not None:
            g_OGS.masked_fill_(self.still_OGS, 0)
        return g_OGS.view(place_OK.shape), slope_OG1


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, place_OK: Tensor, stretch_OG1: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(place_OK, stretch_OG1)
        return codes.levels(place_OK).mul_(codes.scale_OG1()).view(place_OK.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        place_OK, _ = ctx.saved_tensors
        return *ctx.codes.gradients(gradients[0], place_OK), None


class CodedLayers:
    """The trained codes of a quantized model, by the disk names of its layers."""

    def __init__(self, settings: Coded, job: Job) -> None:
        self._settings = settings
        self._checkpoint = job.checkpoint
        self._original = job.original
        self._still = job.zeros_stay
        self.rest = Rest(settings, job.checkpoint)
        self.by_name: dict[str, tuple[Codes, Tensor]] = {}

    def attach(self, model: Any) -> Mapping[str, nn.Parameter]:
        """Let each quantized layer that is asked for be made of places, and name what is to be trained."""
        trained = self.rest.attach(model)
        for place in list(places(self._checkpoint, model)):
            trained = trained | self._attached(place)
        return trained

    def share(self, name: str) -> float:
        """The learning rate of what is trained under this name, over that of codes."""
        if name in self.rest.by_name:
            return self.rest.share(name)
        return self._settings.scale_rate / self._settings.code_rate if name.endswith(".stretch") else 1.0

    def _attached(self, place: Place) -> dict[str, nn.Parameter]:
        own: dict[str, nn.Module] = {}
        trained: dict[str, nn.Parameter] = {}
        rows = []
        for name, matrix_OK in place.matrices.items():
            packed = self._checkpoint.quant_tensor(name) if covered(name, self._settings.layers) else None
            if packed is None:
                rows.append(matrix_OK.cpu())
                continue
            stretched = self._settings.scale_rate > 0
            codes = Codes(packed, stretched=stretched, still=self._still)
            rows.append(codes.places(resembling(self._original, name, packed)))
            own[name] = codes
            if stretched:
                trained[f"{name}.stretch"] = codes.stretch_OG1
        if not own:
            return {}
        before = place.owner.get_parameter(place.leaf)
        value = nn.Parameter(torch.cat(rows).view(before.shape).to(before.device))
        setattr(place.owner, place.leaf, value)
        patch(place, own)
        trained = {f"{place.path}.place": value} | trained
        start = 0
        for name, matrix_OK in place.matrices.items():
            if name in own:
                view = value.detach().flatten(0, -2)[start : start + len(matrix_OK)]
                self.by_name[name] = own[name], view  # type: ignore[assignment]
            start += len(matrix_OK)
        return trained

    def packed(self) -> dict[str, QuantTensor]:
        """What the layers are stored as, by disk name."""
        return {name: codes.packed(place_OK) for name, (codes, place_OK) in self.by_name.items()}


def resembling(original: Checkpoint | None, name: str, packed: QuantTensor) -> Tensor | None:
    """The original's weight, fp32, where the packed one is near it; None where stages before changed it otherwise."""
    if original is None or f"{name}.weight" not in original.tensors or original.matrix_shape(name) != packed.shape:
        return None
    weight_OK = original.weight(name, torch.float32)
    apart = float((packed.dequantize() - weight_OK).square().sum())
    return weight_OK if apart < float(weight_OK.square().sum()) else None
