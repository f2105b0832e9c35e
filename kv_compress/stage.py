"""The stage for keys and values: chooses how every layer keeps them, and writes that beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from compress.core.errors import InputError, UsageError
from compress.core.kv_scheme import scheme_in
from compress.core.model_files import KV_CACHE_KEY
from compress.core.passes import Job, Pass, Plan
from compress.core.sizes import sizes_of
from kv_compress._coded_pages import BLOCK, HALF_BYTES, RECENT, SINKS
from kv_compress.eviction import EvictionSettings, eviction_of
from kv_compress.policy import FULL, LARGEST_WINDOW, PER_CHANNEL, Coding, KVPolicy, LayerPolicy, policy_in

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint

Precision = Literal["full", "int8", "int4", "fp8"]
_RANGES = re.compile(r"\s*-?\d+(\s*-\s*\d+)?\s*(,\s*-?\d+(\s*-\s*\d+)?\s*)*")


def _ranges(text: str) -> str:
    if not _RANGES.fullmatch(text):
        raise ValueError(f"layers are numbers and ranges such as 0, 3-5 or -1, not {text!r}")
    return text


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class KeysAndValues(_Settings):
    """Keys kept otherwise than values."""

    keys: Precision = Field(description="of keys, which suffer more from few bits")
    values: Precision = Field(description="of values")


class Override(_Settings):
    """Layers that are kept otherwise than the rest."""

    layers: Annotated[str, AfterValidator(_ranges)] = Field(
        description="numbers and ranges, negative ones from the end: '0, 3-5, -1'"
    )
    precision: Precision | KeysAndValues = Field(description="of these layers")
    rotate: bool | None = Field(None, description="of these layers; default: as all others")

    @model_validator(mode="after")
    def _sound(self) -> Override:
        if self.rotate and set(_pair(self.precision)) == {FULL}:
            raise ValueError("rotate turns what is coded, and these layers are kept in full: leave it out")
        return self


class KVCache(Pass):
    """Weights stay as they are. The policy goes into config.json and the manifest, and the bundled runtime obeys it;
    fp8 in all layers is written as vLLM reads it, too."""

    kind: ClassVar = "kv_cache"
    takes: ClassVar = frozenset({"dense", "masked", "quantized"})
    gives: ClassVar = None
    paper: ClassVar = (
        "Liu et al., 2024, arXiv:2402.02750 (int4); Micikevicius et al., 2022, arXiv:2209.05433 (fp8); "
        "Ashkboos et al., 2024, arXiv:2404.00456 (rotate)"
    )
    needs_calibration: ClassVar = False

    precision: Precision | KeysAndValues = Field(
        "int8", description="int8, int4, fp8 or full, the model's own dtype; or {keys: int8, values: int4}"
    )
    rotate: bool = Field(
        False, description="turn keys and values by a Hadamard matrix before they are coded, which spreads outliers"
    )
    keys: Literal["token", "channel"] = Field(
        "token",
        description="what shares a scale of int8 or int4 keys: a token's channels, or a channel's tokens in a page, "
        "which huge channels do not harm; pages are then coded whole",
    )
    sinks: int | None = Field(
        None,
        ge=0,
        le=LARGEST_WINDOW,
        description="first tokens kept in full, whole pages; default: 4 if keys: channel",
    )
    recent: int | None = Field(
        None, ge=0, le=LARGEST_WINDOW, description="latest tokens kept in full, at least; default: 64 if keys: channel"
    )
    per_head: bool = Field(False, description="of fp8: a scale for each head; vLLM reads one for each layer")
    overrides: tuple[Override, ...] = Field((), description="layers that are kept otherwise; the last match counts")
    eviction: EvictionSettings | None = Field(
        None,
        description="which keys and values are dropped, so that their pages go back: {method, budget: {tokens: …}}",
    )

    @model_validator(mode="after")
    def _sound(self) -> KVCache:
        codecs = {codec for pair in self._pairs for codec in pair}
        if self.rotate and codecs == {FULL}:
            raise ValueError("rotate turns what is coded, and all is kept in full: leave it out or choose a precision")
        if self.per_head and "fp8" not in codecs:
            raise ValueError("per_head is of the scales of fp8, which nothing is kept in: leave it out")
        if self.keys == "channel" and not any(keys in PER_CHANNEL for keys, _ in self._pairs):
            raise ValueError("keys: channel is for keys in int8 or int4, which none are: choose one, or keys: token")
        if (self.sinks or self.recent) and codecs == {FULL}:
            raise ValueError("sinks and recent stay in full where the rest is coded, and nothing is: leave them out")
        if self.keys == "channel" and self.rotate and _pair(self.precision)[0] in PER_CHANNEL:
            raise ValueError("rotate mixes the channels that keys: channel keeps apart: leave one of them out")
        if self.eviction is not None and (self.keys == "channel" or self.sinks or self.recent):
            raise ValueError(
                "keys: channel, sinks and recent code whole pages, of which eviction cannot drop single tokens: leave "
                "either out (eviction has sinks and recent of its own)"
            )
        return self

    @property
    def _pairs(self) -> list[tuple[Precision, Precision]]:
        """Codecs of keys and of values, of most layers and of others."""
        return [_pair(precision) for precision in (self.precision, *(of.precision for of in self.overrides))]

    @property
    def calibrated(self) -> bool:
        return any("fp8" in pair for pair in self._pairs)

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        from compress.core.memory import reading_cost
        from compress.core.numerics import dtype_name, runtime_dtype
        from kv_compress._ranges import head_sizes

        policy = self.policy(checkpoint)
        sizes = head_sizes(checkpoint)
        held = runtime_dtype()
        full = KVPolicy.uniform(FULL, len(sizes))
        before, after = (of.token_bytes(sizes, held.itemsize, BLOCK) for of in (full, policy))
        bytes_out = sum(info.bytes for info in checkpoint.tensors.values())
        looked_at = calibration if self.calibrated else None
        cost = reading_cost(checkpoint, looked_at, blocks=checkpoint.num_blocks, heads=0, beside_bytes=0)
        said = [f"keys and values of a token take {after:,} bytes instead of {before:,} in {dtype_name(held)}"]
        if policy.is_paged:
            points = policy.coding_points(sizes, held.itemsize, BLOCK)
            said[0] += (
                f", {points.page_tokens} in a page; the first {points.sinks} and the last {points.recent} to "
                f"{points.recent + points.every - 1} are kept in full"
            )
        if self.eviction is not None:
            tokens = self.eviction.points(after).tokens
            kept = f", so that {tokens:,} tokens stay at each point" if self.eviction.budget.bytes is not None else ""
            said.append(
                f"{self.eviction.method} drops some of them in the bundled runtime{kept}; other engines keep all"
            )
        return Plan((), bytes_out, cost.memory_bytes, bytes_out + cost.spill_bytes, cost.minutes, tuple(said))

    def run(self, job: Job) -> None:
        from kv_compress._ranges import scaled, write

        policy = self.policy(job.checkpoint)
        if self.calibrated:
            policy = KVPolicy.parse(job.remember("kv_cache", lambda: scaled(policy, job, self.per_head).to_json()))
        for _ in job.walk(calibrate=False):
            pass
        write(policy, job)

    def policy(self, checkpoint: Checkpoint) -> KVPolicy:
        """The policy for a model, scales of fp8 left open (1). UsageError for layers that it lacks or heads that do not
        fit."""
        from kv_compress._ranges import head_sizes

        layers = [_layer(self.precision, self.rotate, self.keys)] * checkpoint.num_blocks
        for number, override in enumerate(self.overrides):
            rotate = self.rotate if override.rotate is None else override.rotate
            for index in _numbers(override.layers, len(layers), f"kv_cache.overrides[{number}].layers"):
                layers[index] = _layer(override.precision, rotate, self.keys)
        eviction = None if self.eviction is None else self.eviction.model_dump(mode="json", exclude_defaults=True)
        sinks, recent = (
            usual * (self.keys == "channel") if asked is None else asked
            for asked, usual in ((self.sinks, SINKS), (self.recent, RECENT))
        )
        policy = KVPolicy(tuple(layers), eviction, sinks, recent)
        try:
            sizes = head_sizes(checkpoint)
            policy.require_fits(sizes)
            for itemsize in sorted({HALF_BYTES, checkpoint.dtype.itemsize}) if policy.is_paged else ():
                policy.coding_points(sizes, itemsize, BLOCK)  # the runtime may hold an fp32 model in bf16
            if self.eviction is not None and self.eviction.is_unequal and not policy.is_alike(sizes):
                raise UsageError(
                    f"{self.eviction.method} lets layers and heads keep unequal numbers of keys, and the layers' keys "
                    "and values differ in heads, channels or codecs",
                    where="kv_cache.eviction.method",
                    hint="choose another method, or one precision for all layers",
                )
        except InputError as error:
            raise UsageError(error.message, where="kv_cache", hint=error.hint) from None
        return policy

    @staticmethod
    def require_obeyed(config: Mapping[str, Any]) -> None:
        """InputError for a policy in a config.json that the runtime would refuse, or that `kv_cache_scheme`, which is
        there too, does not say."""
        where = f"config.json: {KV_CACHE_KEY}"
        policy = policy_in(config)
        if policy is None:
            return
        sizes = sizes_of(config)
        each_layer = [(sizes["kv_heads"], sizes["head_dim"])] * sizes["layers"]
        policy.require_fits(each_layer, where)
        try:
            if policy.is_paged:
                policy.coding_points(each_layer, HALF_BYTES, BLOCK)
            eviction = eviction_of(policy, where)
            if eviction is not None:
                eviction.points(policy.token_bytes(each_layer, HALF_BYTES, BLOCK))
        except UsageError as error:
            raise InputError(error.message, where=where, hint=error.hint) from None
        if scheme_in(config) is not None and not policy.is_scheme:
            raise InputError("is more than kv_cache_scheme says, which other engines would obey", where=where)


def _pair(precision: Precision | KeysAndValues) -> tuple[Precision, Precision]:
    return (precision, precision) if isinstance(precision, str) else (precision.keys, precision.values)


def _layer(precision: Precision | KeysAndValues, rotate: bool, per: str) -> LayerPolicy:
    keys, values = (
        Coding(codec, rotate and codec != FULL, (1.0,) if codec == "fp8" else ()) for codec in _pair(precision)
    )
    return LayerPolicy(replace(keys, per=per) if keys.codec in PER_CHANNEL else keys, values)


def _numbers(text: str, count: int, where: str) -> Iterator[int]:
    for part in text.replace(" ", "").split(","):
        first, _, last = part.rpartition("-") if part.lstrip("-").count("-") else (part, "", part)
        numbers = range(int(first), int(last) + 1)
        if not numbers or int(first) < 0 <= int(last):
            raise UsageError(
                f"{part!r} is no range of layers", where=where, hint="write the lower number first, such as 0-3"
            )
        for number in numbers:
            if not -count <= number < count:
                raise UsageError(f"there is no layer {number}: the model has {count}", where=where)
            yield number % count
