"""`overrides:` of a quantize stage: another scheme for the layers whose names match a pattern."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compress.core.errors import UsageError
from compress.core.scheme import Scheme

DEFAULT_GROUP_SIZE = 128
NF4_BLOCK = 64


def _shell_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        raise ValueError(f"{pattern!r} is a regular expression; patterns are those of a shell: '*.q_proj'")
    return pattern


def _known_scheme(name: str) -> str:
    try:
        Scheme.parse(name)
    except UsageError as error:
        raise ValueError(error.message) from None
    return name


def _sane_group_size(size: int) -> int:
    if size != -1 and size < 8:
        raise ValueError("use -1 (per channel) or at least 8")
    return size


Pattern = Annotated[str, AfterValidator(_shell_pattern)]
SchemeName = Annotated[str, AfterValidator(_known_scheme)]
GroupSize = Annotated[int, AfterValidator(_sane_group_size)]


class Override(BaseModel):
    """Settings of some layers; what is left out is as in the stage."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    layers: Pattern = Field(description="name pattern of layers: '*.down_proj', 'model.layers.0.*'")
    scheme: SchemeName | None = Field(None, description="weight and activation bits of these layers")
    group_size: GroupSize | None = Field(None, description="input channels that share a scale")
    symmetric: bool | None = Field(None, description="no zero points")

    def scheme_in(self, name: str, group_size: int | None, symmetric: bool) -> Scheme:
        """The scheme of its layers in such a stage. Rounded inputs need whole channels whatever that has."""
        name = self.scheme or name
        if self.group_size is not None:
            group_size = self.group_size
        elif needs_channels(Scheme.parse(name)):
            group_size = None
        return make_scheme(name, group_size, symmetric if self.symmetric is None else self.symmetric)

    def covers(self, layer: str) -> bool:
        """Whether a layer's name matches."""
        return fnmatchcase(layer, self.layers)


def make_scheme(name: str, group_size: int | None, symmetric: bool) -> Scheme:
    """The scheme of these settings; a group size that is left out is the usual one. ValueError: it makes no sense."""
    plain = Scheme.parse(name)
    whole = needs_channels(plain)
    usual = -1 if whole else NF4_BLOCK if plain.dtype == "nf4" else DEFAULT_GROUP_SIZE
    try:
        scheme = Scheme.parse(name, group_size=group_size or usual, symmetric=symmetric)
    except UsageError as error:
        raise ValueError(error.message) from None
    if whole and (scheme.group_size != -1 or not scheme.symmetric or scheme.bits != 8):
        raise ValueError(f"{name} needs 8-bit symmetric weights with one scale per channel (group_size: -1)")
    return scheme


def needs_channels(scheme: Scheme) -> bool:
    """Whether a scheme is defined with one scale per output channel only."""
    return scheme.activation_bits == 8 or scheme.dtype == "fp8"
