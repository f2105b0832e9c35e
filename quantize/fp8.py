"""FP8 (Micikevicius et al., 2022, arXiv:2209.05433): weights as 8-bit floats, inputs too or as they are."""

from typing import ClassVar

from pydantic import Field

from quantize._overrides import SchemeName
from quantize.rtn import RTN


class FP8(RTN):
    """e4m3 floats with a scale per output channel, or per block of 128 x 128 weights (fp8_block); of inputs with one
    per token, or per token and 128 channels, found as it runs."""

    dtypes: ClassVar = ("fp8",)
    paper: ClassVar = "Micikevicius et al., 2022, arXiv:2209.05433"

    scheme: SchemeName = Field(
        "fp8", description="fp8: weights and inputs; fp8_block: the same in blocks; fp8a16: weights alone"
    )
