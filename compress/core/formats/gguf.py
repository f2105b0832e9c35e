"""GGUF: one file with weights, config and tokenizer, for llama.cpp. Written from quantized or dense models.

Codes of a quantized model are carried over: symmetric ones of up to 4 bits are Q4_0, all others Q8_0. Both are exact if
the scales are exact in fp16 and groups are multiples of 32. Norms and biases are fp32, as llama.cpp wants them; other
dense tensors keep their dtype, or are rounded to the type that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.core.errors import ArtifactError, InputError, UsageError
from compress.core.formats import _gguf_tensors as tensors
from compress.core.formats import stored_modules
from compress.core.formats._gguf_container import Tensor, Value, pieces, read
from compress.core.formats._gguf_model import metadata, rope_factors, rotary_rows, tensor_name
from compress.core.formats._gguf_reader import values
from compress.core.formats._gguf_tokenizer import tokenizer_metadata
from compress.core.formats._gguf_types import BF16, BY_NAME, F16, F32, Q4_0, Q4_K, Q6_K, Q8_0, BlockType

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.tensors import QuantTensor

__all__ = ["TYPE_NAMES", "Layout", "check", "layout", "pieces", "read"]

TYPE_NAMES = tuple(BY_NAME)
_ROPE_FACTORS = "rope_freqs.weight"
_OUTER = {Q4_K: Q6_K, Q4_0: Q8_0}  # embedding and head beside matrices of 4 bits
_FLOATS = (F32, F16, BF16)
_IGNORED = ".rotary_emb.inv_freq"
_WORST_ERROR = 0.5  # relative; weights that were put in the wrong order have 1.4


@dataclass(frozen=True)
class Layout:
    """A file before it is written: everything but the bytes. `exact` tensors mean the same numbers as the source's;
    `origin` gives the source's name of each."""

    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    origin: Mapping[str, str]
    exact: frozenset[str]
    notices: tuple[str, ...]


def layout(source: Checkpoint, asked: str | None = None, *, requantize: bool = False) -> Layout:
    """Plan the file of a model: `asked` is a type for its matrices, by default what they are.

    InputError for a family, tokenizer or weight that GGUF or llama.cpp cannot hold; quantized weights are rounded anew
    (scales to fp16, or all to the type asked for) with `requantize` only.
    """
    if asked is not None and asked not in BY_NAME:
        raise UsageError(f"unknown type {asked!r}", where="--type", hint=f"choose one of {', '.join(TYPE_NAMES)}")
    plan = _Plan(source, None if asked is None else BY_NAME[asked], requantize)
    usual = plan.usual_type()
    return Layout(
        metadata(source.config, source.source.id, usual.file_type) | tokenizer_metadata(source.folder, source.config),
        tuple(plan.tensors),
        plan.origin,
        frozenset(plan.exact),
        tuple(plan.notices),
    )


class _Plan:
    """The tensors of one file, in the order of the model."""

    def __init__(self, source: Checkpoint, asked: BlockType | None, requantize: bool) -> None:
        self.source, self.asked, self.requantize = source, asked, requantize
        self.tensors: list[Tensor] = []
        self.origin: dict[str, str] = {}
        self.exact: set[str] = set()
        self.notices: list[str] = []
        self._fallbacks: list[str] = []
        metadata(source.config, "", 0)  # refuses families before weights are looked at
        for name in self._weights():
            self._add(name)
        factors = rope_factors(source.config)
        if factors is not None:
            self.tensors.append(tensors.floats(_ROPE_FACTORS, factors, None))
        if self._fallbacks and self.asked is not None:
            more = f" and {len(self._fallbacks) - 1} more" if len(self._fallbacks) > 1 else ""
            self.notices.append(
                f"rows of {self._fallbacks[0]}{more} are no multiple of {self.asked.weights}: stored as "
                f"{_fitting(self.asked, self._width(self._fallbacks[0])).name} instead of {self.asked.name}"
            )

    def usual_type(self) -> BlockType:
        """The type of most bytes that are no embedding or head."""
        sizes: dict[BlockType, int] = {}
        for tensor in self.tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
                sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.bytes
        return max(sizes, key=lambda type: sizes[type]) if sizes else F32

    def _weights(self) -> list[str]:
        """Names of all weights, a quantized module by that of its weight, blocks in order, then the rest."""
        source = self.source
        stored = stored_modules(source)
        found: dict[str, None] = {}
        for names in [*map(source.block_tensors, range(source.num_blocks)), source.rest_tensors()]:
            for name in names:
                if not name.endswith(_IGNORED):
                    found[f"{stored[name]}.weight" if name in stored else name] = None
        head = f"{source.architecture.head}.weight"
        if source.tied and source.embedding_tensor != head:
            found.pop(head, None)
        return list(found)

    def _width(self, name: str) -> int:
        return self.source.info(name).shape[-1]

    def _add(self, name: str) -> None:
        module, named = name.removesuffix(".weight"), self._named(name)
        rows = rotary_rows(name, self.source.config)
        if module != name and module in self.source.schemes:
            tensor, exact = self._quantized(module, named, rows)
        else:
            tensor, exact = self._dense(name, named, rows)
        self.tensors.append(tensor)
        self.origin[named] = name
        if exact:
            self.exact.add(named)

    def _named(self, name: str) -> str:
        """A tied model that has its one matrix under the head's name has it as embedding in GGUF."""
        embedding = f"{self.source.architecture.embedding}.weight"
        return tensor_name(embedding if self.source.tied and name == self.source.embedding_tensor else name)

    def _dense(self, name: str, named: str, rows: torch.Tensor | None) -> tuple[Tensor, bool]:
        value = self.source.tensor(name)
        kept = tensors.floats(named, value, rows)
        if self.asked is None or value.dim() != 2:
            return kept, True
        asked = self.asked if named.startswith("blk.") else _OUTER.get(self.asked, self.asked)
        type = _fitting(asked, value.shape[1])
        if type.weights < asked.weights:
            self._fallbacks.append(name)
        if type == kept.type:
            return kept, True
        return tensors.rounded(named, (len(value), value.shape[1]), type, lambda: self.source.tensor(name), rows), False

    def _quantized(self, module: str, named: str, rows: torch.Tensor | None) -> tuple[Tensor, bool]:
        tensor = self._loader(module)()
        try:
            type = tensors.nearest_type(tensor)
            if self.asked is not None and self.asked != type:
                raise tensors.Inexact(f"its codes are those of {type.name}, not of {self.asked.name}")
        except InputError as refusal:
            if not self.requantize:
                raise _refused(module, refusal, "--requantize rounds the weights anew") from None
            return self._anew(module, named, tensor.shape, rows), False
        try:
            tensors.require_exact(tensor)
        except InputError as refusal:
            if not self.requantize:
                raise _refused(module, refusal, "--requantize rounds them, and keeps the codes") from None
            return tensors.carried(named, tensor.shape, type, self._loader(module), rows), False
        return tensors.carried(named, tensor.shape, type, self._loader(module), rows), True

    def _loader(self, module: str) -> Callable[[], QuantTensor]:
        def load() -> QuantTensor:
            tensor = self.source.quant_tensor(module)
            if tensor is None:
                raise ArtifactError("is no longer there", where=module)
            return tensor

        return load

    def _anew(self, module: str, named: str, shape: tuple[int, int], rows: torch.Tensor | None) -> Tensor:
        asked = self.asked or Q8_0
        type = _fitting(asked, shape[1])
        return tensors.rounded(named, shape, type, lambda: self.source.weight(module, torch.float32), rows)


def _refused(module: str, refusal: InputError, hint: str) -> InputError:
    return InputError(f"{module} cannot be written as gguf: {refusal.message}", where=refusal.where, hint=hint)


def _fitting(type: BlockType, width: int) -> BlockType:
    """`type`, or where its blocks do not divide a row's `width` Q8_0, or F16."""
    return next(choice for choice in (type, Q8_0, F16) if width % choice.weights == 0)


def check(path: Path, source: Checkpoint, planned: Layout) -> None:
    """Read a written file back. ArtifactError unless every exact tensor means the source's numbers, to the bit, and
    every rounded one is near them."""
    _, stored = read(path)
    if stored.keys() - {_ROPE_FACTORS} != planned.origin.keys():
        raise ArtifactError("holds other tensors than planned", where=str(path))
    for named, name in planned.origin.items():
        module = name.removesuffix(".weight")
        quantized = module != name and module in source.schemes
        wanted = source.weight(module, torch.float32) if quantized else source.tensor(name).float()
        rows = rotary_rows(name, source.config)
        wanted = (wanted if rows is None else wanted[rows]).numpy()
        found = values(path, stored[named])
        if named in planned.exact:
            good = np.array_equal(found, wanted)
        else:
            good = np.linalg.norm(found - wanted) <= _WORST_ERROR * np.linalg.norm(wanted)
        if not good:
            raise ArtifactError("does not mean the same weights as the source", where=f"{path}: {named}")
