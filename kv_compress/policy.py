"""KVPolicy: how each layer of a model keeps its keys and its values. Travels in config.json and in the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compress.core.errors import InputError, UsageError
from compress.core.model_files import KV_CACHE_KEY
from kv_compress._coded_pages import CodingPoints
from kv_compress.fp8 import Fp8
from kv_compress.int4 import Int4
from kv_compress.int8 import Int8

FULL = "full"
CODECS: Mapping[str, Int8 | Int4 | Fp8] = {codec.name: codec for codec in (Int8(), Int4(), Fp8())}
PRECISIONS = (FULL, *CODECS)
PER_CHANNEL = ("int8", "int4")  # codecs that keys may be coded with per channel, where whole pages are
PER_CHANNEL_BYTES = 4  # an fp16 scale and an fp16 lowest number for each channel of a page
LARGEST_WINDOW = 1 << 20  # tokens that a file may ask to be kept in full
ADDING_UP = frozenset({"h2o"})  # methods of eviction that add up the attention which each slot gets
COUNT_BYTES = 8  # of such a sum
LARGEST_POLICY = 1 << 12  # layers and heads that a file may speak of
_SETTINGS = ("layers", "eviction", "sinks", "recent")
_PER = ("token", "channel")


@dataclass(frozen=True, slots=True)
class Coding:
    """Keys, or values, of one layer. `codec`: full (the model's own dtype), int8, int4 or fp8. `rotate`: by a Hadamard
    matrix before coding. `scale`: of fp8, one for the layer or one for each head. `per`: what shares a scale of int8
    and int4, a token's channels or, of keys alone, a channel's tokens in a page."""

    codec: str = FULL
    rotate: bool = False
    scale: tuple[float, ...] = ()
    per: str = "token"

    def row_bytes(self, width: int, itemsize: int) -> int:
        """Bytes of one token and head; `itemsize` is that of numbers kept in full. Scales of a page come beside it."""
        if self.codec == FULL:
            return width * itemsize
        codec = CODECS[self.codec]
        return codec.row_bytes(width) if self.per == "token" else codec.code_bytes(width)

    def page_bytes(self, tokens: int, heads: int, width: int, itemsize: int) -> int:
        """Bytes of a coded page of so many tokens."""
        channels = PER_CHANNEL_BYTES * width if self.per == "channel" else 0
        return heads * (tokens * self.row_bytes(width, itemsize) + channels)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is as usual."""
        more = {"rotate": True} if self.rotate else {}
        more |= {} if self.per == "token" else {"per": self.per}
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
    of kv_compress.eviction as plain data, None where all stay.

    With `sinks` and `recent`, and wherever keys are coded per channel, so many first and last tokens are kept in full,
    and those between are coded page by page (kv_compress._coded_pages); otherwise each token when it is stored."""

    layers: tuple[LayerPolicy, ...]
    eviction: Mapping[str, Any] | None = None
    sinks: int = 0
    recent: int = 0

    @classmethod
    def uniform(
        cls, precision: str, count: int, *, rotate: bool = False, keys: str = "token", sinks: int = 0, recent: int = 0
    ) -> KVPolicy:
        """The same codec in all of `count` layers, keys per token or per channel; fp8 with scale 1. UsageError for a
        codec that does not exist."""
        if precision not in PRECISIONS:
            hint = f"choose one of {', '.join(PRECISIONS)}"
            raise UsageError(f"no keys and values are kept as {precision!r}", hint=hint)
        coding = Coding(precision, rotate and precision != FULL, (1.0,) if precision == "fp8" else ())
        return cls((LayerPolicy(replace(coding, per=keys), coding),) * count, None, sinks, recent)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is coded."""
        return all(coding.codec == FULL for coding in self._codings())

    @property
    def is_scheme(self) -> bool:
        """Whether `kv_cache_scheme` can say it: fp8 in all layers, one scale each, nothing rotated."""
        return not self.is_paged and all(
            of.codec == "fp8" and len(of.scale) == 1 and not of.rotate for of in self._codings()
        )

    @property
    def codecs(self) -> tuple[str, ...]:
        """The codecs in use, most precise first."""
        used = {coding.codec for coding in self._codings()}
        return tuple(name for name in PRECISIONS if name in used)

    @property
    def is_paged(self) -> bool:
        """Whether whole pages are coded, and the first and last tokens kept in full."""
        return bool(self.sinks or self.recent) or any(coding.per == "channel" for coding in self._codings())

    def token_bytes(self, sizes: Iterable[tuple[int, int]], itemsize: int, block: int) -> int:
        """Bytes of a token in all layers, sums of attention included; where pages are coded, of one in a coded page,
        rounded up."""
        sizes = list(sizes)
        if self.is_paged:
            room = block * sum(2 * heads * width * itemsize for heads, width in sizes)
            return -(-room // self.coding_points(sizes, itemsize, block).page_tokens)
        counts = self.count_bytes * sum(heads for heads, _ in sizes)
        return counts + sum(layer.token_bytes(*size, itemsize) for layer, size in zip(self.layers, sizes, strict=True))

    def coding_points(self, sizes: Iterable[tuple[int, int]], itemsize: int, block: int) -> CodingPoints:
        """Where pages are coded, of a policy for which they are: a coded page has the bytes of `block` tokens in full,
        and holds as many whole pages as it can; where that is but one, as many halves. `sizes`: heads and width of each
        layer. UsageError if it holds no more than in full."""
        sizes = list(sizes)
        room = block * sum(2 * heads * width * itemsize for heads, width in sizes)
        most = block
        while self._coded_bytes(most + 1, sizes, itemsize) <= room:
            most += 1
        together = 1 if most >= 2 * block else 2
        tokens = most - most % max(block // together, 1)
        if tokens <= block or tokens * together % block:
            raise UsageError(
                f"a page of {block} tokens in full, {room:,} bytes, holds only {most} that are coded",
                hint="choose larger pages, or codecs of fewer bits in more layers",
            )
        salt = hashlib.blake2b(json.dumps(self.to_json()).encode(), digest_size=16).hexdigest()
        return CodingPoints(block, tokens, -(-self.sinks // block) * block, self.recent, salt, together)

    def _coded_bytes(self, tokens: int, sizes: list[tuple[int, int]], itemsize: int) -> int:
        return sum(
            layer.keys.page_bytes(tokens, *size, itemsize) + layer.values.page_bytes(tokens, *size, itemsize)
            for layer, size in zip(self.layers, sizes, strict=True)
        )

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
        self.require_sound(where)

    def require_sound(self, where: str = "") -> None:
        """InputError for what fits no model."""
        for index, layer in enumerate(self.layers):
            if layer.values.per == "channel":
                raise InputError(f"layer {index} of the policy: only keys are coded per channel", where=where)
            if layer.keys.per == "channel" and (layer.keys.rotate or layer.keys.codec not in PER_CHANNEL):
                raise InputError(
                    f"layer {index} of the policy: codes per channel with int8 or int4, and without rotation, which "
                    "would mix the channels", where=where,
                )  # fmt: skip
        if self.is_paged and self.eviction is not None:
            raise InputError(
                "the policy codes whole pages, of which eviction cannot drop single tokens", where=where,
                hint="use codes of single tokens (keys per token, no sinks, no recent) with eviction, or no eviction",
            )  # fmt: skip

    def is_alike(self, heads_and_widths: Iterable[tuple[int, int]]) -> bool:
        """Whether all layers, with so many key-value heads of such widths, hold keys and values of one kind."""
        codecs = ((layer.keys.codec, layer.values.codec) for layer in self.layers)
        return len(set(zip(heads_and_widths, codecs, strict=True))) == 1

    def require_alike(self, heads_and_widths: Iterable[tuple[int, int]]) -> None:
        """UsageError unless layers may keep unequal numbers of keys."""
        if not self.is_alike(heads_and_widths):
            raise UsageError(
                "layers cannot keep unequal numbers of keys, since theirs differ in heads, channels or codecs",
                hint="choose a method of eviction with equal numbers, or one codec for all layers",
            )

    @property
    def count_bytes(self) -> int:
        """Bytes beside a token's key and value in each head: of the attention that it got, where that is added up."""
        return COUNT_BYTES if self.eviction is not None and self.eviction.get("method") in ADDING_UP else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest and config.json."""
        layers = [{"keys": layer.keys.to_json(), "values": layer.values.to_json()} for layer in self.layers]
        window = {name: count for name, count in (("sinks", self.sinks), ("recent", self.recent)) if count}
        return {"layers": layers} | window | ({} if self.eviction is None else {"eviction": dict(self.eviction)})

    @classmethod
    def parse(cls, data: object, where: str = "") -> KVPolicy:
        """From `to_json`. InputError for anything else."""
        if not isinstance(data, Mapping) or "layers" not in data:
            raise InputError(f"is no policy for keys and values: {data!r:.80}", where=where)
        for name, value in data.items():
            if name not in _SETTINGS:
                raise InputError(f"{name!r:.80} is no setting of a policy for keys and values", where=where)
            if wrong := _wrong(name, value):
                raise InputError(f"{wrong}, not {value!r:.80}", where=f"{where}.{name}" if where else name)
        layers = tuple(_layer(layer, where) for layer in data["layers"])
        return cls(layers, data.get("eviction"), data.get("sinks", 0), data.get("recent", 0))

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


def _wrong(name: str, value: object) -> str:
    """What a setting of a policy must be, if it is not that."""
    if name == "layers":
        sound = isinstance(value, list) and 0 < len(value) <= LARGEST_POLICY
        return "" if sound else f"must be a list of 1 to {LARGEST_POLICY:,} layers"
    if name == "eviction":
        return "" if value is None or isinstance(value, Mapping) else "must be a mapping of settings"
    sound = type(value) is int and 0 <= value <= LARGEST_WINDOW
    return "" if sound else f"must be a whole number of tokens from 0 to {LARGEST_WINDOW:,}"


def _layer(data: object, where: str) -> LayerPolicy:
    match data:
        case {"keys": keys, "values": values, **rest} if not rest:
            return LayerPolicy(_coding(keys, where), _coding(values, where))
    raise InputError(f"a layer of the policy is not its keys and values: {data!r:.80}", where=where)


def _coding(data: object, where: str) -> Coding:
    if isinstance(data, Mapping) and data.keys() <= {"codec", "rotate", "scale", "per"}:
        codec, rotate, scale = data.get("codec"), data.get("rotate", False), data.get("scale", [])
        per = data.get("per", "token")
        listed = isinstance(scale, list) and len(scale) <= LARGEST_POLICY and all(map(_is_scale, scale))
        known = codec in PRECISIONS and per in _PER
        if known and isinstance(rotate, bool) and listed and bool(scale) == (codec == "fp8"):
            return Coding(codec, rotate, tuple(float(number) for number in scale), per)
    raise InputError(f"a layer's keys or values are not a codec with its settings: {data!r:.80}", where=where)


def _is_scale(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 1e-30 < number < 1e30
