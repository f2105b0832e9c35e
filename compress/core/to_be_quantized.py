"""A checkpoint seen as a quantize stage will leave it: for plans of the stages behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from compress.core.checkpoint import Checkpoint

if TYPE_CHECKING:
    from compress.core.scheme import Scheme


class ToBeQuantized(Checkpoint):
    """`source` with the schemes of its modules to be, and with what each will take in `format`. Its codes are not known
    yet, so that headers alone can be asked for. `transforms` change the weights before, by name."""

    def __init__(
        self, source: Checkpoint, schemes: Mapping[str, Scheme], format: str, transforms: Sequence[str] = ()
    ) -> None:
        from compress.core.formats import writer_for

        encoded_bytes = writer_for(format).encoded_bytes
        tensors = dict(source.tensors)
        for module, scheme in schemes.items():
            info = source.info(f"{module}.weight")
            rows, width = info.shape
            size = encoded_bytes((rows, width), scheme, source.dtype)
            tensors[info.name] = replace(info, end=info.start + size)
        super().__init__(source.folder, source.source, source.config, tensors)
        self._from = source
        self._schemes = dict(schemes)
        self.transforms = tuple(transforms)

    @property
    def origin(self) -> Checkpoint:
        return self._from.origin

    @cached_property
    def kind(self) -> Literal["dense", "masked", "quantized"]:
        return "quantized"

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        return self._schemes

    def matrix_shape(self, module: str) -> tuple[int, int]:
        rows, width = self.info(f"{module}.weight").shape
        return rows, width

    def stored_names(self, module: str) -> list[str]:
        return [f"{module}.weight"]
