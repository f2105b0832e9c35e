"""QuantTensor: the only form in which packed weights travel in memory.

Shape suffixes: O output channels, K input channels, G groups, W 32-bit words of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compress.core.errors import ArtifactError
from compress.core.levels import levels
from compress.core.nested_scales import NestedScales, nest
from compress.core.scheme import Scheme

_DEQUANTIZED_AT_ONCE = 4 << 20  # weights
_RUN = 8  # codes that are combined at once: 8 codes of b bits are exactly b bytes
# (integer type that holds twice as much, its bits): two neighbours are seen as one integer of the next type
_WIDER = ((torch.int16, 16), (torch.int32, 32), (torch.int64, 64))


def words_in(width: int, bits: int) -> int:
    """32-bit words that hold `width` codes of `bits` bits."""
    return -(-width * bits // 32)


def pack_rows(codes_OK: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [O, K] -> int32 [O, ceil(K*bits/32)]: each row one bit stream, least significant bit first."""
    rows, width = codes_OK.shape
    runs = -(-width // _RUN)
    joined = torch.zeros((rows, runs * _RUN), dtype=torch.uint8, device=codes_OK.device)
    joined[:, :width] = codes_OK
    held = bits
    for dtype, size in _WIDER:  # neighbours (a, b) of `held` bits each -> a | b << held
        pair = joined.view(dtype)
        half = size // 2
        joined = (pair & ((1 << half) - 1)) | ((pair >> half) << held) if held < half else pair
        held *= 2
    stream = joined.view(torch.uint8).view(rows, runs, _RUN)[:, :, :bits].reshape(rows, runs * bits)
    words = words_in(width, bits)
    padded = torch.zeros((rows, words * 4), dtype=torch.uint8, device=codes_OK.device)
    used = min(stream.shape[1], words * 4)
    padded[:, :used] = stream[:, :used]
    return padded.view(torch.int32)


def unpack_rows(words_OW: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Inverse of `pack_rows`: int32 [O, W] -> uint8 codes [O, width]."""
    rows = words_OW.shape[0]
    runs = -(-width // _RUN)
    words = torch.empty(words_OW.shape, dtype=torch.int32, device=words_OW.device)  # plain strides, whatever came in
    stream = words.copy_(words_OW).view(torch.uint8)
    spaced = torch.zeros((rows, runs, _RUN), dtype=torch.uint8, device=words_OW.device)
    missing = runs * bits - stream.shape[1]
    if missing > 0:
        stream = torch.nn.functional.pad(stream, (0, missing))
    spaced[:, :, :bits] = stream[:, : runs * bits].view(rows, runs, bits)
    joined = spaced.view(torch.int64).view(rows, runs)
    held = _RUN * bits
    for dtype, size in reversed(_WIDER):  # a | b << held/2 -> neighbours (a, b)
        held //= 2
        mask = (1 << held) - 1
        pair = (joined & mask) | (((joined >> held) & mask) << (size // 2)) if held < size // 2 else joined
        narrower = {torch.int64: torch.int32, torch.int32: torch.int16, torch.int16: torch.uint8}[dtype]
        joined = pair.view(narrower)
    return joined[:, :width].contiguous()


def spread(values_OG: torch.Tensor, group_size: int, width: int) -> torch.Tensor:
    """Per-group values [O, G] -> per-weight values [O, width]; the last group may be ragged."""
    if group_size == -1:
        return values_OG.expand(-1, width)
    return values_OG.repeat_interleave(group_size, dim=1)[:, :width]


def unit_of(scale_OG: torch.Tensor, divisor_O1: torch.Tensor | None) -> torch.Tensor:
    """Scales as numbers, fp32 [O, G], divided where there is a divisor."""
    return scale_OG.float() if divisor_O1 is None else scale_OG.float() / divisor_O1


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A linear layer's weight [out, in] as codes, scales and zero points.

    packed int32 [out, ceil(in*bits/32)] holds code + 2^(bits-1), or the bit patterns of a scheme whose dtype is not
    int; scale [out, groups] in its storage dtype; zero int8 [out, groups] in the signed domain, None if symmetric.
    weight = (code - zero) * scale, or level * scale. Channels of a block repeat its scale.

    nested: how the scales are stored where these are codes themselves; `scale` has their numbers then, fp32. A part of
    the rows or a stack of such parts has the numbers alone. input_scale [1] is that of static inputs, to be known
    before the tensor is stored. divisor fp32 [out, 1], of nvfp4 alone: scales are to be divided by it; one number for
    the whole tensor, unless several were stacked.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme
    shape: tuple[int, int]
    nested: NestedScales | None = None
    input_scale: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.shape
        groups = (rows, self.scheme.groups_in(width))
        wanted = (rows, words_in(width, self.scheme.bits))
        if tuple(self.packed.shape) != wanted:
            raise ArtifactError(f"packed codes have shape {tuple(self.packed.shape)}, the scheme needs {wanted}")
        if tuple(self.scale.shape) != groups:
            raise ArtifactError(f"scales have shape {tuple(self.scale.shape)}, the scheme needs {groups}")
        if (self.zero is None) != self.scheme.symmetric:
            raise ArtifactError("zero points belong to an asymmetric scheme, and only to that")
        if self.zero is not None and tuple(self.zero.shape) != groups:
            raise ArtifactError(f"zero points have shape {tuple(self.zero.shape)}, the scheme needs {groups}")
        if self.nested is not None and not self.scheme.double_quantization:
            raise ArtifactError("scales that are codes belong to a scheme with double quantization")
        if self.scheme.blocks and width % self.scheme.group_size:
            raise ArtifactError(f"blocks of {self.scheme.group_size} do not divide {width} input channels")
        if self.input_scale is not None and (not self.scheme.static_inputs or self.input_scale.shape != (1,)):
            raise ArtifactError("static inputs, and only those, have one scale")
        if (self.divisor is not None) != (self.scheme.dtype == "nvfp4"):
            raise ArtifactError("a divisor of scales belongs to nvfp4, and only to that")
        if self.divisor is not None and tuple(self.divisor.shape) != (rows, 1):
            raise ArtifactError(f"divisors have shape {tuple(self.divisor.shape)}, the scheme needs {(rows, 1)}")

    @classmethod
    def from_codes(
        cls, codes_OK: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, scheme: Scheme
    ) -> "QuantTensor":
        """Pack signed codes int8 [out, in] of an integer scheme."""
        unsigned_OK = (codes_OK.to(torch.int16) - scheme.lowest).to(torch.uint8)
        return cls.from_stored(unsigned_OK, scale_OG, zero_OG, scheme)

    @classmethod
    def from_stored(
        cls,
        stored_OK: torch.Tensor,
        scale_OG: torch.Tensor,
        zero_OG: torch.Tensor | None,
        scheme: Scheme,
        *,
        divisor: torch.Tensor | None = None,
    ) -> "QuantTensor":
        """Pack codes uint8 [out, in] as they are to be stored."""
        rows, width = stored_OK.shape
        return cls(pack_rows(stored_OK, scheme.bits), scale_OG, zero_OG, scheme, (rows, width), divisor=divisor)

    def stored(self) -> torch.Tensor:
        """Codes as they are packed, uint8 [out, in]."""
        return unpack_rows(self.packed, self.scheme.bits, self.shape[1])

    def codes(self) -> torch.Tensor:
        """Signed codes of an integer scheme, int8 [out, in]."""
        return (self.stored().to(torch.int16) + self.scheme.lowest).to(torch.int8)

    @property
    def unit(self) -> torch.Tensor:
        """What a level of 1 stands for: the scales, divided if they have a divisor, fp32 [out, groups]."""
        return unit_of(self.scale, self.divisor)

    def rows(self, start: int, stop: int) -> "QuantTensor":
        """Output channels `start` up to `stop`, which share this tensor's memory."""
        return self.at(slice(start, stop))

    def at(self, rows: slice | torch.Tensor) -> "QuantTensor":
        """Some output channels: copies of those in a tensor of indices, or the memory of a slice."""
        packed, zero = self.packed[rows], None if self.zero is None else self.zero[rows]
        divisor = None if self.divisor is None else self.divisor[rows]
        shape = (packed.shape[0], self.shape[1])
        return replace(
            self, packed=packed, scale=self.scale[rows], zero=zero, shape=shape, nested=None, divisor=divisor
        )

    @classmethod
    def stack(cls, parts: Sequence["QuantTensor"]) -> "QuantTensor":
        """The output channels of all parts, which have one scheme, width and input; the inverse of `rows`."""
        first = parts[0]
        if len(parts) == 1:
            return first
        zeros = [part.zero for part in parts if part.zero is not None]
        divisors = [part.divisor for part in parts if part.divisor is not None]
        shape = (sum(part.shape[0] for part in parts), first.shape[1])
        packed, scale = torch.cat([part.packed for part in parts]), torch.cat([part.scale for part in parts])
        zero, divisor = torch.cat(zeros) if zeros else None, torch.cat(divisors) if divisors else None
        return cls(packed, scale, zero, first.scheme, shape, input_scale=first.input_scale, divisor=divisor)

    def to(self, device: str | torch.device) -> "QuantTensor":
        """The same tensor on another device."""
        rarer = (self.zero, self.input_scale, self.divisor)
        zero, input_scale, divisor = (None if part is None else part.to(device) for part in rarer)
        nested = None if self.nested is None else self.nested.to(device)
        packed, scale = self.packed.to(device), self.scale.to(device)
        return QuantTensor(
            packed, scale, zero, self.scheme, self.shape, nested=nested, input_scale=input_scale, divisor=divisor
        )

    def with_nested_scales(self) -> "QuantTensor":
        """The same codes with scales that are quantized themselves: double quantization."""
        nested, scheme = nest(self.scale), replace(self.scheme, double_quantization=True)
        return replace(self, scale=nested.numbers(), scheme=scheme, nested=nested)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in], computed in fp32 and rounded once to `dtype`; some rows at a time, to hold little."""
        at_once = max(1, _DEQUANTIZED_AT_ONCE // self.shape[1])
        if self.shape[0] <= at_once:
            return self._dequantize_rows().to(dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        for start in range(0, self.shape[0], at_once):
            weight[start : start + at_once] = self.rows(start, start + at_once)._dequantize_rows()
        return weight

    def _dequantize_rows(self) -> torch.Tensor:
        width, size = self.shape[1], self.scheme.group_size
        weight = levels(self.stored(), self.scheme)
        if self.zero is not None:
            weight -= spread(self.zero.float(), size, width)
        return weight.mul_(spread(self.unit, size, width))

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales, zero points and divisors in memory."""
        parts = (self.packed, self.scale, self.zero, self.divisor)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)
