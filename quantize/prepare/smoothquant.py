"""SmoothQuant (Xiao et al., 2022, arXiv:2211.10438): outliers of activations move into the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.scheme import Scheme
from quantize.prepare._transform import Target, Transform

if TYPE_CHECKING:
    from compress.core.statistics import Statistic
    from compress.core.walk import Block


class SmoothQuant(Transform):
    """Divide each channel of the inputs by max|x|^alpha / max|w|^(1 - alpha) and multiply the weights; `auto` searches
    alpha for each group of layers, by the error of their outputs with both sides rounded."""

    paper: ClassVar = "Xiao et al., 2022, arXiv:2211.10438"
    balances: ClassVar = True

    alpha: float | Literal["auto"] = Field(
        "auto", description="how much of the difficulty moves: 0 … 1, or auto, which searches it for each group"
    )
    steps: int = Field(20, ge=2, le=200, description="alphas that auto tries, from 0 to 1")

    def refusal(self, wanted: Scheme) -> str | None:
        if wanted.activation_bits == 16:
            return f"moves outliers of activations, which {wanted.name} does not round: awq_scale is for weights alone"
        if wanted.dtype == "fp8":
            return "looks for whole numbers: outliers cost floats (fp8) little"
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            return f"takes an alpha from 0 to 1, not {self.alpha:g}"
        return None

    def statistics(self) -> frozenset[type[Statistic]]:
        from compress.core.statistics import AbsMax, Sample

        return frozenset({AbsMax, Sample})

    def apply(self, block: Block, target: Target) -> None:
        from quantize.prepare._smoothquant import smooth_block

        smooth_block(block, target, self.alpha, self.steps)
