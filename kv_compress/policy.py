"""KVPolicy: how each layer of a model keeps its keys and its values. Travels in config.json and in the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.core.errors import InputError, UsageError
from compress.core.model_files import KV_CACHE_KEY
from kv_compress.fp8 import Fp8
from kv_compress.int4 import Int4
from kv_compress.int8 import Int8

FULL = "full"
CODECS: Mapping[str, Int8 | Int4 | Fp8] = {codec.name: codec for codec in (Int8(), Int4(), Fp8())}
PRECISIONS = (FULL, *CODECS)
LARGEST_POLICY = 1 << 12  # layers and heads that a file may speak of


@dataclass(frozen=True, slots=True)
class Coding:
    """Keys, or values, of one layer. `codec`: full (the model's own dtype), int8, int4 or fp8. `rotate`: by a Hadamard
    matrix before coding. `scale`: of fp8, one for the layer or one for each head."""

    codec: str = FULL
    rotate: bool = False
    scale: tuple[float, ...] = ()

    def row_bytes(self, width: int, itemsize: int) -> int:
        """Bytes of one token and head; `itemsize` is that of numbers kept in full."""
        return width * itemsize if self.codec == FULL else CODECS[self.codec].row_bytes(width)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is as usual."""
        more = {"rotate": True} if self.rotate else {}
        return {"codec": self.codec} | more | ({"scale": list(self.scale)} if self.scale else {})


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """How one layer keeps its keys and its values."""

    keys: Coding = Coding()
    values: Coding = Coding()

    def token_bytes(self, heads: int, width: int, itemsize: int) -> int:
        """Bytes of one token in this layer."""
        return heads * (self.keys.row_bytes(width, itemsize) + self.values.row_bytes(width, itemsize))


@dataclass(frozen=True)
class KVPolicy:
    """How every layer of a model keeps its keys and values, and which of them are dropped: `eviction` has the settings
    of kv_compress.eviction as plain data, None where all stay."""

    layers: tuple[LayerPolicy, ...]
    eviction: Mapping[str, Any] | None = None

    @classmethod
    def uniform(cls, precision: str, count: int, *, rotate: bool = False) -> KVPolicy:
        """The same codec in all of `count` layers; fp8 with scale 1. UsageError for a codec that does not exist."""
        if precision not in PRECISIONS:
            hint = f"choose one of {', '.join(PRECISIONS)}"
            raise UsageError(f"no keys and values are kept as {precision!r}", hint=hint)
        coding = Coding(precision, rotate and precision != FULL, (1.0,) if precision == "fp8" else ())
        return cls((LayerPolicy(coding, coding),) * count)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is coded."""
        return all(coding.codec == FULL for coding in self._codings())

    @property
    def is_scheme(self) -> bool:
        """Whether `kv_cache_scheme` can say it: fp8 in all layers, one scale each, nothing rotated."""
        return all(of.codec == "fp8" and len(of.scale) == 1 and not of.rotate for of in self._codings())

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs in use, most precise first."""
        used = {coding.codec for coding in self._codings()}
        return tuple(name for name in PRECISIONS if name in used)

    def require_fits(self, heads_and_widths: Iterable[tuple[int, int]], where: str = "") -> None:
        """InputError unless the policy is one for a model whose layers have so many key-value heads of such widths."""
        sizes = list(heads_and_widths)
        if len(sizes) != len(self.layers):
            raise InputError(f"the policy has {len(self.layers)} layers, the model {len(sizes)}", where=where)
        for index, (layer, (heads, width)) in enumerate(zip(self.layers, sizes, strict=True)):
            for coding in (layer.keys, layer.values):
                wrong = _misfit(coding, heads, width)
                if wrong:
                    raise InputError(f"layer {index} of the policy: {wrong}", where=where)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest and config.json."""
        layers = [{"keys": layer.keys.to_json(), "values": layer.values.to_json()} for layer in self.layers]
        return {"layers": layers} | ({} if self.eviction is None else {"eviction": dict(self.eviction)})

    @classmethod
    def parse(cls, data: object, where: str = "") -> KVPolicy:
        """From `to_json`. InputError for anything else."""
        match data:
            case {"layers": list(layers), **rest} if rest.keys() <= {"eviction"} and 0 < len(layers) <= LARGEST_POLICY:
                eviction = rest.get("eviction")
                if eviction is None or isinstance(eviction, Mapping):
                    return cls(tuple(_layer(layer, where) for layer in layers), eviction)
        raise InputError(f"is no policy for keys and values: {data!r:.80}", where=where)

    def _codings(self) -> Iterable[Coding]:
        for layer in self.layers:
            yield from (layer.keys, layer.values)


def policy_in(config: Mapping[str, Any], where: str = "config.json") -> KVPolicy | None:
    """The policy that a config.json carries."""
    data = config.get(KV_CACHE_KEY)
    return None if data is None else KVPolicy.parse(data, f"{where}: {KV_CACHE_KEY}")


def _misfit(coding: Coding, heads: int, width: int) -> str:
    if coding.rotate and width & (width - 1):
        return f"rotates heads of {width} channels, which is no power of two"
    if coding.codec == "int4" and width % 2:
        return f"codes heads of {width} channels in pairs"
    if coding.codec == "fp8" and len(coding.scale) not in (1, heads):
        return f"has {len(coding.scale)} scales for {heads} heads"
    return ""


def _layer(data: object, where: str) -> LayerPolicy:
    match data:
        case {"keys": keys, "values": values, **rest} if not rest:
            return LayerPolicy(_coding(keys, where), _coding(values, where))
    raise InputError(f"a layer of the policy is not its keys and values: {data!r:.80}", where=where)


def _coding(data: object, where: str) -> Coding:
    if isinstance(data, Mapping) and data.keys() <= {"codec", "rotate", "scale"}:
        codec, rotate, scale = data.get("codec"), data.get("rotate", False), data.get("scale", [])
        listed = isinstance(scale, list) and len(scale) <= LARGEST_POLICY and all(map(_is_scale, scale))
        if codec in PRECISIONS and isinstance(rotate, bool) and listed and bool(scale) == (codec == "fp8"):
            return Coding(codec, rotate, tuple(float(number) for number in scale))
    raise InputError(f"a layer's keys or values are not a codec with its settings: {data!r:.80}", where=where)


def _is_scale(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e30
