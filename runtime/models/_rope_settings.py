"""Rotary settings of a config.json, in the form of today (rope_parameters) and that of older files (rope_scaling)."""

from __future__ import annotations

import math

from compress.core.errors import InputError
from runtime.models._families import Family
from runtime.models._settings import Settings
from runtime.models.config import Rope, RopeKind

LOCAL_THETA = 10_000.0
PHI3_LENGTH = 4096
_LENGTH = "original_max_position_embeddings"
_CHANGING = "changes the angles of keys that are in the cache already"


def read_ropes(settings: Settings, family: Family) -> tuple[Rope, Rope]:
    """(for layers that see everything, for layers with a sliding window). Only Gemma-3 tells them apart."""
    if family.local_rope:
        return _read_both(settings, family)
    key = "rope_scaling" if settings.stated("rope_scaling") else "rope_parameters"
    rope = _read(settings, settings.section(key), settings.number("rope_theta", family.rope_theta), family)
    settings.raw("rope_parameters")  # an older file's rope_scaling goes before it
    return rope, rope


def _read_both(settings: Settings, family: Family) -> tuple[Rope, Rope]:
    theta = settings.number("rope_theta", family.rope_theta)
    local_theta = settings.number("rope_local_base_freq", LOCAL_THETA)
    both = settings.section("rope_parameters")
    full = both.section("full_attention") if both else None
    local = both.section("sliding_attention") if both else None
    if both:
        both.refuse_rest()
    scaling = settings.section("rope_scaling")
    if scaling and full:
        raise settings.wrong("rope_scaling", "but rope_parameters.full_attention is there too")
    return _read(settings, scaling or full, theta, family), _read(settings, local, local_theta, family)


def _read(settings: Settings, section: Settings | None, theta: float, family: Family) -> Rope:
    """One set of angles: `section` goes before what the config says outside of it."""
    fraction = _fraction(settings, 1.0, family)
    outside = settings.raw(_LENGTH)
    if section is None:
        return Rope(theta, fraction)
    theta = section.number("rope_theta", theta)
    fraction = _fraction(section, fraction, family)
    key = "rope_type" if section.stated("rope_type") else "type"
    kind = section.text(key, "default")
    section.raw("type")
    if kind in ("su", "yarn") and family.longrope:
        kind = "longrope"
    readers = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
    if kind == "dynamic":
        raise section.wrong(key, f"which {_CHANGING} as a sequence grows: not supported")
    if kind not in readers or (family.longrope and kind not in ("default", "longrope")):
        raise section.wrong(key, f"which the runtime does not know for this family: {', '.join(readers)}")
    longest = settings.size("max_position_embeddings")
    length = section.size(_LENGTH, PHI3_LENGTH if family.longrope else longest)
    if outside is not None:
        length = settings.size(_LENGTH)
    rope = readers[kind](section, theta, fraction, length, longest)
    section.refuse_rest()
    return rope


def _fraction(settings: Settings, default: float, family: Family) -> float:
    value = settings.number("partial_rotary_factor", default)
    if settings.stated("partial_rotary_factor") and not (value == 1 or (value < 1 and family.longrope)):
        raise settings.wrong("partial_rotary_factor", "which this family does not have")
    return value


def _default(section: Settings, theta: float, fraction: float, length: int, longest: int) -> Rope:
    return Rope(theta, fraction)


def _linear(section: Settings, theta: float, fraction: float, length: int, longest: int) -> Rope:
    return Rope(theta, fraction, "linear", section.number("factor"))


def _llama3(section: Settings, theta: float, fraction: float, length: int, longest: int) -> Rope:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.wrong("high_freq_factor", f"not above low_freq_factor {low:g}")
    return Rope(theta, fraction, "llama3", section.number("factor"), length, low_freq_factor=low, high_freq_factor=high)


def _yarn(section: Settings, theta: float, fraction: float, length: int, longest: int) -> Rope:
    factor = section.number("factor", longest / length)
    numerator, denominator = section.optional_number("mscale"), section.optional_number("mscale_all_dim")
    if numerator and denominator:
        natural = _yarn_scale(factor, numerator) / _yarn_scale(factor, denominator)
    else:
        natural = _yarn_scale(factor, 1.0)
    return Rope(
        theta,
        fraction,
        "yarn",
        factor,
        length,
        attention_factor=section.number("attention_factor", natural),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
    )


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(section: Settings, theta: float, fraction: float, length: int, longest: int) -> Rope:
    """The short factors: which set holds depends on a sequence's final length, so the model is run up to the length
    that the short ones are made for (ModelConfig.max_length)."""
    factor = section.number("factor", longest / length)
    natural = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    kind: RopeKind = "longrope"
    section.raw("long_factor")
    return Rope(
        theta,
        fraction,
        kind,
        factor,
        length,
        attention_factor=section.number("attention_factor", natural),
        factors=_numbers(section, "short_factor"),
    )


def _numbers(section: Settings, key: str) -> tuple[float, ...]:
    values = section.raw(key)
    if not isinstance(values, list) or not all(type(value) in (int, float) and value > 0 for value in values):
        raise section.wrong(key, "not a list of positive numbers")
    return tuple(float(value) for value in values)


def check_channels(rope: Rope, head_dim: int, where: str) -> None:
    """InputError if a head of that width cannot be rotated so."""
    channels = rope.channels(head_dim)
    if channels < 2 or channels % 2:
        raise InputError(
            f"{channels} of {head_dim} channels of a head would be rotated, not an even number", where=where
        )
    if rope.kind == "longrope" and len(rope.factors) != channels // 2:
        raise InputError(f"short_factor has {len(rope.factors)} numbers, heads need {channels // 2}", where=where)
