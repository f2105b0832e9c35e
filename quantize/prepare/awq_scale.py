"""AWQ's scales (Lin et al., 2023, arXiv:2306.00978): channels with large inputs get finer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantize.prepare._transform import Target, Transform

if TYPE_CHECKING:
    from compress.core.statistics import Statistic
    from compress.core.walk import Block


class AWQScale(Transform):
    """Search, for each group of layers, the exponent of the scales that gives the least error of the layers' outputs;
    the scales fold into norms, and into the rows of values and up projections."""

    paper: ClassVar = "Lin et al., 2023, arXiv:2306.00978"
    balances: ClassVar = True

    steps: int = Field(20, ge=2, le=200, description="exponents that are tried, from 0 to 1")

    def statistics(self) -> frozenset[type[Statistic]]:
        from compress.core.statistics import Hessian

        return frozenset({Hessian})

    def apply(self, block: Block, target: Target) -> None:
        from quantize.prepare._awq_scale import scale_block

        scale_block(block, target, self.steps)
