"""Where an adapter starts: the best low-rank answer to what quantization did, E = W - W_q, in the layer's output.

The output error of E - C is |(E - C) L|² with H = L Lᵀ the second moments of the inputs, so that C = [E L]_r L⁻¹, the
truncated singular value decomposition in whitened inputs (QERA, Zhang et al., 2024, arXiv:2410.06040, theorem 2).

Shape suffixes: O output channels, K input channels, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.core.errors import InputError
from compress.core.passes import Job
from compress.core.patterns import covered
from compress.core.statistics import Hessian

if TYPE_CHECKING:
    from distill.recover import Recover

_DAMPING = 0.01  # of the mean second moment


def compensations(settings: Recover, job: Job) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, K] and B [O, R] of each quantized layer that is asked for, by disk name."""
    found = {}
    for block in job.measure(frozenset({Hessian})):
        for group in block.groups:
            sites = [site for site in group.sites if site.name in job.checkpoint.schemes and not group.routed]
            sites = [site for site in sites if covered(site.name, settings.layers)]
            if not sites:
                continue
            lower_KK = _factor(group.statistics[Hessian])
            for site in sites:
                error_OK = _original(job, site.name, site.shape) - site.weight
                found[site.name] = best_pair(error_OK, lower_KK, settings.rank, settings.scale)
            group.release()
    if not found:
        raise InputError("no layer can have an adapter: those of experts have none", where=str(job.checkpoint.folder))
    return found


def best_pair(error_OK: Tensor, lower_KK: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with scale · B A next to the error, as inputs with second moments L Lᵀ see it."""
    left_OR, values_R, right_RK = torch.linalg.svd(error_OK @ lower_KK, full_matrices=False)
    left_OR, values_R, right_RK = left_OR[:, :rank], values_R[:rank], right_RK[:rank]
    root_R = (values_R / scale).sqrt()
    a_RK = torch.linalg.solve_triangular(lower_KK, right_RK, upper=False, left=False)  # A L = right
    return root_R[:, None] * a_RK, left_OR * root_R


def _factor(hessian_KK: Tensor) -> Tensor:
    damped_KK = hessian_KK.double()
    mean = damped_KK.diagonal().mean().clamp(min=1e-30)
    damped_KK.diagonal().add_(_DAMPING * mean)
    return torch.linalg.cholesky(damped_KK).float()


def _original(job: Job, name: str, shape: tuple[int, int]) -> Tensor:
    original = job.original
    if original is None or original.kind == "quantized" or f"{name}.weight" not in original.tensors:
        raise InputError("an adapter needs the weights as they were: start from a dense model", where=name)
    if original.matrix_shape(name) != shape:
        raise InputError("was cut before it was quantized: what an adapter could make up for is not known", where=name)
    return original.weight(name, torch.float32).to(job.device)
