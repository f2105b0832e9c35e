"""GPTQ's maths for layers that share an input. Shape suffixes: O outputs, K inputs, R rows of a chunk, G groups."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compress.core import native
from compress.core.events import Notice
from compress.core.grid import Grid, fit_grid
from compress.core.passes import Job
from compress.core.scheme import Scheme
from compress.core.solve import ByColumn, Columns, Factor, factorise, sweep
from compress.core.statistics import Hessian
from compress.core.tensors import QuantTensor
from compress.core.walk import Group, Site
from quantize._rounding import CLIPS, round_site

_CHUNK_BYTES = 64 << 20  # weights solved at once; the sweep holds two such buffers
_SAMPLED_ROWS = 64  # rows on which a layer's output power is measured


@dataclass(frozen=True, slots=True)
class Settings:
    """What GPTQ takes from its recipe, without the scheme."""

    damping: float
    activation_order: bool
    tokens_per_channel: float
    clip: str


def solve_group(group: Group, sites: list[Site], scheme: Scheme, settings: Settings, job: Job) -> None:
    """Quantize `sites`, which share the group's input: one Hessian, one factorisation, rows stacked."""
    width = sites[0].shape[1]
    scale_dtype = job.checkpoint.dtype
    if group.routed and group.tokens < settings.tokens_per_channel * width:
        reason = f"saw {group.tokens} tokens, fewer than {settings.tokens_per_channel:g} per input channel ({width})"
        return _fall_back(sites, scheme, settings, job, reason)
    hessian_KK = group.statistics[Hessian]
    power = {site.name: _output_power(site, hessian_KK) for site in sites}
    factor = factorise(hessian_KK, damping=settings.damping, activation_order=settings.activation_order)
    if factor is None:
        return _fall_back(sites, scheme, settings, job, "the Hessian could not be factorised at any damping")
    if factor.retries:
        job.events(Notice(f"needed damping {factor.damping:g} after {factor.retries} retries", sites[0].name))
    results = _solve_rows(sites, scheme, settings, factor, scale_dtype)
    damping, retries = factor.damping, factor.retries
    del hessian_KK, factor
    group.release()  # the factor lies in the Hessian's memory: give it back before weights are packed
    for site in sites:
        result = results.pop(site.name)
        site.replace(result.tensor())
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
    sites: list[Site], scheme: Scheme, settings: Settings, factor: Factor, scale_dtype: torch.dtype
) -> dict[str, "_Result"]:
    """Codes and grids of all sites, their rows stacked and taken chunk by chunk."""
    width = sites[0].shape[1]
    importance_K = torch.empty_like(factor.diagonal_K)
    importance_K[factor.order_K] = factor.diagonal_K.square()  # what an error costs once later columns made up for it
    results = {site.name: _Result(site.shape, scheme, scale_dtype) for site in sites}
    for pieces in _chunks(sites, max(1, _CHUNK_BYTES // (4 * width))):
        weight_RK = torch.cat([site.rows(rows) for site, rows in pieces])
        clip = CLIPS[settings.clip]
        grid = fit_grid(weight_RK, scheme, scale_dtype=scale_dtype, clip=clip, importance_K=importance_K)
        codes_RK, loss_R = quantize_rows(weight_RK, grid, factor)
        start = 0
        for site, rows in pieces:
            end = start + rows.stop - rows.start
            results[site.name].put(rows, codes_RK[start:end], grid, loss_R[start:end], slice(start, end))
            start = end
    return results


def quantize_rows(weight_RK: torch.Tensor, grid: Grid, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [R, K] of the sweep over `weight_RK` (overwritten), and each row's weighted squared error [R]."""
    rounding = _Codes(weight_RK, grid)
    loss_R = sweep(weight_RK, factor, rounding)
    return rounding.codes_KR.t().contiguous(), loss_R


class _Codes:
    """Rounds to a grid, and keeps the codes: int8 [K, R]."""

    def __init__(self, weight_RK: torch.Tensor, grid: Grid) -> None:
        rows, width = weight_RK.shape
        self.scale_GR = grid.scale.float().t().contiguous()
        self.zero_GR = None if grid.zero is None else grid.zero.float().t().contiguous()
        self.codes_KR = torch.empty((width, rows), dtype=torch.int8, device=weight_RK.device)
        self._scheme = grid.scheme
        self._size = width if grid.scheme.group_size == -1 else grid.scheme.group_size
        self._inverse_GR = 1 / self.scale_GR
        self._native = weight_RK.device.type == "cpu" and native.library() is not None

    def round_block(self, columns: Columns, error_BR: torch.Tensor, loss_R: torch.Tensor) -> None:
        if not self._native:
            return ByColumn(self._choose).round_block(columns, error_BR, loss_R)
        return native.sweep_block(
            target_BR=columns.target_BR,
            original_BR=columns.original_BR,
            feedback_BB=columns.feedback_BB,
            scale_GR=self.scale_GR,
            zero_GR=self.zero_GR,
            group_B=columns.channel_B // self._size,
            channel_B=columns.channel_B,
            cost_B=columns.cost_B,
            levels=(self._scheme.lowest, self._scheme.highest),
            error_BR=error_BR,
            codes_KR=self.codes_KR,
            loss_R=loss_R,
        )

    def _choose(self, k: int, target_R: torch.Tensor) -> torch.Tensor:
        g = k // self._size
        code_R = (target_R * self._inverse_GR[g]).round_()
        if self.zero_GR is None:
            self.codes_KR[k] = code_R.clamp_(self._scheme.lowest, self._scheme.highest)
        else:
            self.codes_KR[k] = code_R.add_(self.zero_GR[g]).clamp_(self._scheme.lowest, self._scheme.highest)
            code_R.sub_(self.zero_GR[g])
        return code_R.mul_(self.scale_GR[g])


class _Result:
    """A site's codes and grid, filled row chunk by row chunk."""

    def __init__(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> None:
        groups = (shape[0], scheme.groups_in(shape[1]))
        self.scheme = scheme
        self.codes_OK = torch.empty(shape, dtype=torch.int8)
        self.scale_OG = torch.empty(groups, dtype=scale_dtype)
        self.zero_OG = None if scheme.symmetric else torch.empty(groups, dtype=torch.int8)
        self.loss = 0.0

    def put(self, rows: slice, codes_RK: torch.Tensor, grid: Grid, loss_R: torch.Tensor, chunk: slice) -> None:
        self.codes_OK[rows] = codes_RK
        self.scale_OG[rows] = grid.scale[chunk]
        if self.zero_OG is not None and grid.zero is not None:
            self.zero_OG[rows] = grid.zero[chunk]
        self.loss += float(loss_R.sum())

    def tensor(self) -> QuantTensor:
        return QuantTensor.from_codes(self.codes_OK, self.scale_OG, self.zero_OG, self.scheme)


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


def _fall_back(sites: list[Site], scheme: Scheme, settings: Settings, job: Job, reason: str) -> None:
    for site in sites:
        job.events(Notice(f"rounded to nearest: it {reason}", site.name, level="warning"))
        round_site(site, scheme, job.checkpoint.dtype, settings.clip, fallback=reason)
