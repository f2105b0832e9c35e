"""NF4 (QLoRA, Dettmers et al., 2023, arXiv:2305.14314): levels at the quantiles of a normal distribution."""

from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from compress.core.scheme import Scheme
from quantize._overrides import GroupSize, SchemeName
from quantize._settings import WeightQuantization

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class NF4(WeightQuantization):
    """4-bit NormalFloat in blocks of 64, calibration-free; the same codes and scales as bitsandbytes."""

    paper: ClassVar = "Dettmers et al., 2023, arXiv:2305.14314"
    needs_calibration: ClassVar = False
    dtypes: ClassVar = ("nf4",)
    formats: ClassVar = ("bitsandbytes",)
    usual_sizes: ClassVar = (128, 64, 32)

    scheme: SchemeName = Field("nf4", description="nf4: weights alone")
    group_size: GroupSize | None = Field(
        None, description="weights of a row that share a scale: 32, 64, 128 … 4096. Default 64"
    )
    clip: Literal["mse", "minmax"] = Field(
        "minmax", description="minmax: a block's largest weight is its scale, as in bitsandbytes; mse: searched"
    )
    uneven: Literal["refuse"] = Field("refuse", description="layers whose width the blocks do not divide: refuse")
    double_quantization: bool = Field(False, description="scales as 8-bit numbers: 4.13 bits per weight instead of 4.5")

    def own_problem(self) -> str | None:
        sizes = sorted({scheme.group_size for scheme in self.schemes} - set(BLOCKS))
        if sizes:
            return f"group_size {sizes[0]} is no block of bitsandbytes: these are {', '.join(map(str, BLOCKS))}"
        if self.head or self.embedding:
            return "readers of bitsandbytes expect head and embedding as they are: leave these settings out"
        return None

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """As without double quantization, but for that. Others than nf4 are refused in a moment."""
        found = super().schemes
        if not self.double_quantization:
            return found
        return tuple(replace(each, double_quantization=True) if each.dtype == "nf4" else each for each in found)

    def ragged_hint(self, working: list[int]) -> str:
        sizes = f"sizes that work: {', '.join(map(str, working))}; or " if working else ""
        return f"{sizes}leave these layers as they are: ignore"

    def run(self, job: Job) -> None:
        from quantize._nf4 import round_site

        for block in self.blocks(job):
            for group in block.groups:
                for site, scheme in self.chosen(group):
                    round_site(site, scheme, job.checkpoint.dtype, self.clip)
