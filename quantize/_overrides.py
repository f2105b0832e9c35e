"""`overrides:` of a quantize stage: another scheme for the layers whose names match a pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compress.core.errors import UsageError
from compress.core.patterns import Pattern, covered
from compress.core.scheme import OWN_GROUPS, Scheme

DEFAULT_GROUP_SIZE = 128
NF4_BLOCK = 64
_STATIC = "_static"


def _known_scheme(name: str) -> str:
    try:
        Scheme.parse(name)
    except UsageError as error:
        raise ValueError(error.message) from None
    if name.endswith(_STATIC):
        raise ValueError(f"write scheme: {name.removesuffix(_STATIC)} and, for the stage, activations: static")
    return name


def _sane_group_size(size: int) -> int:
    if size != -1 and size < 8:
        raise ValueError("use -1 (per channel) or at least 8")
    return size


SchemeName = Annotated[str, AfterValidator(_known_scheme)]
Activations = Literal["dynamic", "static"]
GroupSize = Annotated[int, AfterValidator(_sane_group_size)]


class Override(BaseModel):
    """Settings of some layers; what is left out is as in the stage."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    layers: Pattern = Field(description="name pattern of layers: '*.down_proj', 'model.layers.0.*'")
    scheme: SchemeName | None = Field(None, description="weight and activation bits of these layers")
    group_size: GroupSize | None = Field(None, description="input channels that share a scale")
    symmetric: bool | None = Field(None, description="no zero points")

    def scheme_in(
        self, name: str, group_size: int | None, symmetric: bool, activations: Activations = "dynamic"
    ) -> Scheme:
        """The scheme of its layers in such a stage. Some schemes have groups of their own whatever that has."""
        name = self.scheme or name
        if self.group_size is not None:
            group_size = self.group_size
        elif has_own_groups(Scheme.parse(name)):
            group_size = None
        return make_scheme(name, group_size, symmetric if self.symmetric is None else self.symmetric, activations)

    def covers(self, layer: str) -> bool:
        """Whether a layer's name matches."""
        return covered(layer, (self.layers,))


def make_scheme(name: str, group_size: int | None, symmetric: bool, activations: Activations = "dynamic") -> Scheme:
    """The scheme of these settings; a group size that is left out is the usual one, and `activations` matter to schemes
    that may have static inputs. ValueError: it makes no sense."""
    plain = Scheme.parse(name)
    whole = needs_channels(plain)
    usual = plain.group_size if has_own_groups(plain) else NF4_BLOCK if plain.dtype == "nf4" else DEFAULT_GROUP_SIZE
    try:
        scheme = Scheme.parse(name, group_size=group_size or usual, symmetric=symmetric)
    except UsageError as error:
        raise ValueError(error.message) from None
    if whole and scheme.group_size != -1:
        raise ValueError(f"{name} needs weights with one scale per channel (group_size: -1)")
    if scheme.activation_bits == 8 and not scheme.symmetric:
        raise ValueError(f"{name} needs symmetric weights, beside which engines take rounded inputs")
    return replace(scheme, static_inputs=activations == "static" and whole and scheme.activation_bits == 8)


def needs_channels(scheme: Scheme) -> bool:
    """Whether a scheme is defined with one scale per output channel only."""
    whole = scheme.dtype == "fp8" or (scheme.bits, scheme.activation_bits) == (8, 8)
    return whole and not scheme.blocks


def has_own_groups(scheme: Scheme) -> bool:
    """Whether a scheme is defined with groups of one size, whole channels among them."""
    return needs_channels(scheme) or scheme.dtype in OWN_GROUPS
