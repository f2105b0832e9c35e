"""Scheme: what a quantized weight looks like. One vocabulary for quantize, export and runtime. Needs no torch."""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from compress.core.errors import UsageError

Dtype = Literal["int", "fp8", "nf4", "fp4", "mxfp4", "nvfp4"]
_BITS_OF_FLOATS = {"fp8": 8, "nf4": 4, "fp4": 4, "mxfp4": 4, "nvfp4": 4}
OWN_GROUPS = {"mxfp4": 32, "nvfp4": 16}
"""Of the dtypes that are defined with groups of one size."""
_BLOCK = 128
_NAME = re.compile(r"(w(?P<weight>\d+)a(?P<activation>\d+)|fp8(?P<block>_block)?(?P<plain>a16)?)(?P<static>_static)?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """Codes of `bits` bits with one scale (and zero point, if not symmetric) per group of input channels.

    group_size -1 means one group per output channel. dtype says what a code stands for:
    int       a whole number, signed: -2^(bits-1) … 2^(bits-1)-1; the weight is (code - zero) * scale
    fp8       an 8-bit float with 4 exponent and 3 mantissa bits (e4m3, no infinities); the weight is code * scale
    nf4, fp4  one of the 16 levels of levels.py; the weight is level * scale
    mxfp4     a 4-bit float (e2m1) in groups of 32 whose scales are powers of two; the weight is level * scale
    nvfp4     a 4-bit float (e2m1) in groups of 16 whose scales are 8-bit floats (e4m3) over one divisor of the whole
              tensor; the weight is level * (scale / divisor)
    double_quantization: scales of nf4 and fp4 are 8-bit codes themselves, see nested_scales.py.
    blocks: a scale holds for group_size output channels, too: square blocks of fp8 weights, as in DeepSeek-V3.
    activation_bits 16 leaves activations alone; 8 rounds them to int8 or, beside fp8 weights, fp8, with a scale per
    token (beside blocks: per token and group of input channels) that is found while the model runs, or, static_inputs,
    with one per layer that calibration found.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    dtype: Dtype = "int"
    activation_bits: int = 16
    double_quantization: bool = False
    blocks: bool = False
    static_inputs: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            known = ", ".join(get_args(Dtype))
            raise UsageError(f"weights of dtype {self.dtype!r} are not supported: choose one of {known}")
        wanted = _BITS_OF_FLOATS.get(self.dtype, self.bits)
        if self.bits != wanted or (self.dtype != "int" and not self.symmetric):
            raise UsageError(f"{self.dtype} weights have {wanted} bits and no zero points")
        size = OWN_GROUPS.get(self.dtype, self.group_size)
        if self.group_size != size or (self.dtype in OWN_GROUPS and self.activation_bits != 16):
            raise UsageError(f"{self.dtype} weights have groups of {size}, and 16-bit activations beside them")
        if not 2 <= self.bits <= 8:
            raise UsageError(f"weights of {self.bits} bits are not supported: choose 2 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group_size {self.group_size} makes no sense: use -1 (per channel) or a positive size")
        if self.activation_bits not in (8, 16):
            raise UsageError(f"activations of {self.activation_bits} bits are not supported: choose 8 or 16")
        if self.double_quantization and self.dtype not in ("nf4", "fp4"):
            raise UsageError(f"double quantization is of nf4 and fp4, not of {self.dtype}")
        if self.blocks and (self.dtype != "fp8" or self.group_size == -1):
            raise UsageError("only fp8 weights have blocks, and these need a group_size: 128")
        if self.static_inputs and (self.bits, self.group_size, self.activation_bits) != (8, -1, 8):
            raise UsageError("static inputs go with 8-bit weights and one scale per channel: w8a8 and fp8")

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def strategy(self) -> Literal["channel", "group", "block"]:
        return "channel" if self.group_size == -1 else "block" if self.blocks else "group"

    @property
    def name(self) -> str:
        static = "_static" if self.static_inputs else ""
        if self.dtype == "int":
            return f"w{self.bits}a{self.activation_bits}{static}"
        name = "fp8_block" if self.blocks else self.dtype
        plain_inputs = self.activation_bits == 16 and self.dtype not in ("nf4", "fp4")  # and the name says so
        return f"{name}a16" if plain_inputs else f"{name}{static}"

    def group_width(self, width: int) -> int:
        """Input channels of a group, in a row of `width`."""
        return width if self.group_size == -1 else self.group_size

    @property
    def rows_per_scale(self) -> int:
        """Output channels that share a scale."""
        return self.group_size if self.blocks else 1

    def groups_in(self, width: int) -> int:
        """Number of groups in a row of `width` input channels; the last may be ragged."""
        return 1 if self.group_size == -1 else -(-width // self.group_size)

    @classmethod
    def parse(cls, name: str, *, group_size: int | None = None, symmetric: bool = True) -> "Scheme":
        """Scheme from its name: w4a16, w8a8_static, fp8, fp8a16, fp8_block, nf4, mxfp4a16 … Without a group size, per
        channel, in blocks of 128, or as the name has it."""
        if name == "nf4":
            return cls(4, -1 if group_size is None else group_size, symmetric, "nf4")
        dtype = name.removesuffix("a16")
        if dtype in OWN_GROUPS:
            if dtype == name:
                raise UsageError(f"{name} rounds inputs to 4 bits, too, which is not supported: write {name}a16")
            return cls(4, OWN_GROUPS[dtype] if group_size is None else group_size, symmetric, cast(Dtype, dtype))
        match = _NAME.fullmatch(name)
        if match is None:
            known = "w4a16, w8a8, fp8, fp8a16, fp8_block, nf4 or mxfp4a16"
            raise UsageError(f"unknown scheme {name!r}: a scheme is written like {known}")
        blocks, static = match["block"] is not None, match["static"] is not None
        if group_size is None:
            group_size = _BLOCK if blocks else -1
        if match["weight"] is None:
            inputs = 16 if match["plain"] else 8
            return cls(8, group_size, symmetric, "fp8", inputs, blocks=blocks, static_inputs=static)
        inputs = int(match["activation"])
        return cls(int(match["weight"]), group_size, symmetric, activation_bits=inputs, static_inputs=static)
