"""AWQ's rounding: each group of weights takes the span with the least error of the layer's outputs."""

import torch

from compress.core.grid import fit_grid
from compress.core.passes import Job
from compress.core.scheme import Scheme
from compress.core.statistics import Hessian
from compress.core.walk import Group, Site
from quantize._rounding import CLIPS


def round_group(group: Group, sites: list[tuple[Site, Scheme]], clip: str, job: Job) -> None:
    """Round the layers that share an input; errors count by the mean square of their channel's inputs."""
    hessian_KK = group.statistics[Hessian]
    importance_K = hessian_KK.diagonal() if group.tokens else None
    for site, scheme in sites:
        weight_OK = site.weight
        grid = fit_grid(
            weight_OK, scheme, scale_dtype=job.checkpoint.dtype, clip=CLIPS[clip], importance_K=importance_K
        )
        tensor = grid.round(weight_OK)
        error_OK = tensor.dequantize(torch.float32).sub_(weight_OK)
        wrong, power = (float(((rows @ hessian_KK) * rows).sum()) for rows in (error_OK, weight_OK))
        site.replace(tensor)
        site.note(
            method="awq",
            bits=scheme.bits,
            group_size=scheme.group_size,
            error=wrong / max(power, 1e-30),
            tokens=group.tokens,
        )
