"""GPTQ's maths for layers that share an input. Shape suffixes: O outputs, K inputs, R rows of a chunk, G groups."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from compress.core.events import Notice
from compress.core.grid import fit_grid, stored_dtype
from compress.core.passes import Job
from compress.core.scheme import OWN_GROUPS, Scheme
from compress.core.solve import Factor, factorise
from compress.core.statistics import Hessian
from compress.core.tensors import QuantTensor
from compress.core.walk import Group, Site
from quantize._inputs import input_scale
from quantize._refit import Solution, solve
from quantize._rounding import CLIPS, fall_back, shared_divisor, too_few_tokens

_CHUNK_BYTES = 64 << 20  # weights solved at once; a sweep holds three such buffers, with refits five of half
_FEW_BITS = 3  # so few that refits are worth their time
_REFITS_OF_FEW_BITS = 2
_SAMPLED_ROWS = 64  # rows on which a layer's output power is measured


@dataclass(frozen=True, slots=True)
class Settings:
    """What GPTQ takes from its recipe, without the scheme."""

    damping: float
    activation_order: bool
    tokens_per_channel: float
    clip: str
    refit: int | Literal["auto"] = 0
    cubed: bool = True  # of the span search: better models, though a layer's own error is a little larger

    def refits(self, scheme: Scheme) -> int:
        """Rounds of fitting scales to codes, then codes to scales."""
        if scheme.dtype in OWN_GROUPS:
            return 0  # there are few scales to choose from, and the search has tried those nearby
        if self.refit != "auto":
            return self.refit
        return _REFITS_OF_FEW_BITS if scheme.bits <= _FEW_BITS else 0


def solve_group(group: Group, chosen: list[tuple[Site, Scheme]], settings: Settings, job: Job) -> None:
    """Quantize sites that share the group's input: one Hessian, one factorisation, rows of one scheme stacked."""
    sites = [site for site, _ in chosen]
    scale_dtype = job.checkpoint.dtype
    inputs = {site.name: input_scale(group, scheme, scale_dtype) for site, scheme in chosen}
    divisor = shared_divisor(chosen)
    reason = too_few_tokens(group, settings.tokens_per_channel)
    if reason:
        return _round_all(chosen, inputs, divisor, settings, job, reason)
    hessian_KK = group.statistics[Hessian]
    reason = _unusable(hessian_KK)
    power = {site.name: _output_power(site, hessian_KK) for site in sites}
    factor = factorise(hessian_KK, damping=settings.damping, activation_order=settings.activation_order)
    if factor is None:
        reason = reason or "its Hessian could not be factorised at any damping"
        return _round_all(chosen, inputs, divisor, settings, job, reason)
    if factor.retries:
        job.events(Notice(f"needed damping {factor.damping:g} after {factor.retries} retries", sites[0].name))
    results: dict[str, _Result] = {}
    for scheme in dict.fromkeys(scheme for _, scheme in chosen):
        alike = [site for site, its in chosen if its == scheme]
        results |= _solve_rows(alike, scheme, settings, factor, scale_dtype, divisor, job.checkpoint.kind == "masked")
    damping, retries = factor.damping, factor.retries
    del hessian_KK, factor
    group.release()  # the factor lies in the Hessian's memory: give it back before weights are packed
    for site, scheme in chosen:
        result = results.pop(site.name)
        site.replace(replace(result.tensor(), input_scale=inputs[site.name]))
        site.note(
            method="gptq",
            bits=scheme.bits,
            group_size=scheme.group_size,
            error=result.loss / max(power[site.name], 1e-30),
            damping=damping,
            retries=retries,
            tokens=group.tokens,
        )
    return None


def _solve_rows(
    sites: list[Site],
    scheme: Scheme,
    settings: Settings,
    factor: Factor,
    scale_dtype: torch.dtype,
    divisor: torch.Tensor | None,
    keep_zeros: bool,
) -> dict[str, "_Result"]:
    """Codes and grids of all sites, their rows stacked and taken chunk by chunk."""
    width = sites[0].shape[1]
    importance_K = torch.empty_like(factor.diagonal_K)
    importance_K[factor.order_K] = factor.diagonal_K.square()  # what an error costs once later columns made up for it
    searched = CLIPS[settings.clip]
    clip = searched and replace(searched, cubed=settings.cubed)
    results = {site.name: _Result(site.shape, scheme, stored_dtype(scheme, scale_dtype)) for site in sites}
    refits = settings.refits(scheme)
    for pieces in _chunks(sites, max(1, _CHUNK_BYTES // (8 if refits else 4) // width)):
        weight_RK = torch.cat([site.rows(rows) for site, rows in pieces])
        grid = fit_grid(
            weight_RK, scheme, scale_dtype=scale_dtype, clip=clip, importance_K=importance_K, divisor=divisor
        )
        solution = solve(weight_RK, grid, factor, refits, keep_zeros=keep_zeros)
        start = 0
        for site, rows in pieces:
            end = start + rows.stop - rows.start
            results[site.name].put(rows, solution, slice(start, end))
            start = end
    return results


class _Result:
    """A site's codes and grid, filled row chunk by row chunk."""

    def __init__(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> None:
        groups = (shape[0], scheme.groups_in(shape[1]))
        self.scheme = scheme
        self.codes_OK = torch.empty(shape, dtype=torch.int8)
        self.scale_OG = torch.empty(groups, dtype=scale_dtype)
        self.zero_OG = None if scheme.symmetric else torch.empty(groups, dtype=torch.int8)
        self.divisor_O1 = torch.empty((shape[0], 1)) if scheme.dtype == "nvfp4" else None
        self.loss = 0.0

    def put(self, rows: slice, solution: Solution, chunk: slice) -> None:
        """Take `chunk` of a solution as the site's `rows`."""
        grid = solution.grid
        self.codes_OK[rows] = solution.codes_RK[chunk]
        self.scale_OG[rows] = grid.scale[chunk]
        if self.zero_OG is not None and grid.zero is not None:
            self.zero_OG[rows] = grid.zero[chunk]
        if self.divisor_O1 is not None and grid.divisor is not None:
            self.divisor_O1[rows] = grid.divisor[chunk]
        self.loss += float(solution.loss_R[chunk].sum())

    def tensor(self) -> QuantTensor:
        if self.scheme.dtype == "int":
            return QuantTensor.from_codes(self.codes_OK, self.scale_OG, self.zero_OG, self.scheme)
        stored_OK = self.codes_OK.view(torch.uint8)
        return QuantTensor.from_stored(stored_OK, self.scale_OG, None, self.scheme, divisor=self.divisor_O1)


def _chunks(sites: list[Site], rows_at_once: int) -> Iterator[list[tuple[Site, slice]]]:
    """The rows of all sites, stacked, in chunks of at most `rows_at_once`."""
    pieces: list[tuple[Site, slice]] = []
    room = rows_at_once
    for site in sites:
        start = 0
        while start < site.shape[0]:
            end = min(site.shape[0], start + room)
            pieces.append((site, slice(start, end)))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], rows_at_once
    if pieces:
        yield pieces


def _output_power(site: Site, hessian_KK: torch.Tensor) -> float:
    """tr(W H Wᵀ), from evenly spaced rows: what the layer's error is relative to."""
    outputs = site.shape[0]
    sampled_RK = site.rows(slice(None, None, max(1, outputs // _SAMPLED_ROWS)))
    return float(((sampled_RK @ hessian_KK) * sampled_RK).sum()) * outputs / len(sampled_RK)


def _unusable(hessian_KK: torch.Tensor) -> str:
    """Why no Hessian like this can be factorised; empty if it may be."""
    diagonal_K = hessian_KK.diagonal()
    if not bool(diagonal_K.isfinite().all()):
        return "its inputs are too large, or no numbers"
    return "" if bool(diagonal_K.any()) else "its inputs were zero for every token of the calibration"


def _round_all(
    chosen: list[tuple[Site, Scheme]],
    inputs: dict[str, torch.Tensor | None],
    divisor: torch.Tensor | None,
    settings: Settings,
    job: Job,
    reason: str,
) -> None:
    for site, scheme in chosen:
        fall_back(site, scheme, settings.clip, job, reason, input_scale=inputs[site.name], divisor=divisor)
