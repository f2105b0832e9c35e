"""The tensors of a model folder as the runtime's layers: taken by their names on disk, each exactly once.

Weights are mapped from their files and packed ones stay packed. A tensor that is missing, has the wrong shape or has no
place in the model is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.core.architectures import Architecture
from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError
from compress.core.formats import NotKept, reader_for
from compress.core.numerics import Numerics
from compress.core.tensors import QuantTensor
from runtime.layers.linear import concatenate, make_linear
from runtime.layers.merged import Merged
from runtime.layers.norm import RMSNorm
from runtime.layers.sparse import Packer
from runtime.models.config import ModelConfig

Weight = Tensor | QuantTensor
COMPUTED = ".rotary_emb.inv_freq"  # older files carry what follows from the config


@dataclass(frozen=True, slots=True)
class Part:
    """A linear layer as stored. `slow_reason` says why a quantized one had to be dequantized."""

    module: str
    weight: Weight
    bias: Tensor | None
    slow_reason: str = ""

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.weight.shape[1]


class Weights:
    """Takes tensors out of a checkpoint and makes layers of them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        numerics: Numerics,
        dtype: torch.dtype,
        device: str,
        packer: Packer | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.numerics: Numerics = numerics
        self.dtype = dtype
        self.device = device
        self._packer = packer
        self._reader = reader_for(checkpoint.config) if checkpoint.schemes else None
        self._taken: set[str] = set()

    # taking

    def vector(self, name: str, length: int) -> Tensor:
        """A norm's weight or a bias."""
        value = self._dense(name)
        if tuple(value.shape) != (length,):
            raise self.misfit(name, value, f"[{length}]")
        return value

    def embedding(self) -> Tensor:
        """The embedding [vocabulary, hidden], as stored; a tied file may hold it under the head's name."""
        name = self.checkpoint.embedding_tensor if self.config.tied else f"{self._names.embedding}.weight"
        module = name.removesuffix(".weight")
        if self._reader is not None and module in self.checkpoint.schemes:
            self._taken.update(self._reader.stored_names(module, self.checkpoint.schemes[module]))
            value = self.checkpoint.weight(module, self.dtype)  # rows are looked up in a dense table
        else:
            value = self._dense(name)
        wanted = (self.config.vocab, self.config.hidden)
        if tuple(value.shape) != wanted:
            raise self.misfit(name, value, str(list(wanted)))
        return value

    def part(self, module: str, *, rows: int | None = None, columns: int | None = None, bias: bool = False) -> Part:
        """A linear layer by its name on disk, with the stated numbers of output and input channels."""
        weight, slow_reason = self._matrix(module)
        found = tuple(weight.shape)
        if len(found) != 2 or found != (rows or found[0], columns or found[1]):
            wanted = f"[{rows or '…'}, {columns or '…'}]"
            raise self.misfit(f"{module}.weight", weight, wanted)
        return Part(module, weight, self.vector(f"{module}.bias", found[0]) if bias else None, slow_reason)

    def finish(self, others: Sequence[str] = ()) -> None:
        """InputError for the first tensor on disk that nothing took and that is none of `others`."""
        self._taken.update(others)
        for name in self.checkpoint.tensors:
            if name in self._taken or name.endswith(COMPUTED) or self._idle(name):
                continue
            raise InputError(f"tensor {name!r} has no place in this model", where=self._where(name))

    # making

    def linear(self, part: Part) -> nn.Module:
        """The layer of one weight."""
        return self._make(part.weight, part.bias, part.slow_reason)

    def merged(self, parts: Sequence[Part], widths: Sequence[int] | None = None) -> Merged:
        """Layers with a common input as one, if their weights are of one kind; `widths` cuts a single part's output."""
        widths = widths or [part.rows for part in parts]
        if len(parts) == 1 or not _alike(parts):
            return Merged([self.linear(part) for part in parts], widths)
        biases = [part.bias for part in parts if part.bias is not None]
        dense = [part.weight for part in parts if isinstance(part.weight, Tensor)]
        packed = [part.weight for part in parts if isinstance(part.weight, QuantTensor)]
        weight = concatenate(packed) if packed else concatenate(dense)
        reason = next((part.slow_reason for part in parts if part.slow_reason), "")
        return Merged([self._make(weight, torch.cat(biases) if biases else None, reason)], widths)

    def norm(self, module: str, length: int | None = None) -> RMSNorm:
        """A norm over `length` channels, those of the hidden state if left out."""
        weight = self.vector(f"{module}.weight", length or self.config.hidden).to(self.device, self.dtype)
        return RMSNorm(weight, self.config.norm_eps, self.config.norm_plus_one)

    def head(self, embedding_VD: Tensor) -> nn.Module:
        """The layer that gives logits; a tied one shares the embedding's memory where their dtypes are one."""
        module = self._names.head
        name = f"{module}.weight"
        if not self.config.tied:
            return self.linear(self.part(module, rows=self.config.vocab, columns=self.config.hidden))
        if module in self.checkpoint.schemes:
            hint = "set tie_word_embeddings to false"
            raise InputError(f"{module} is quantized, but tied to the embedding", where=self._where(), hint=hint)
        if name in self.checkpoint.tensors and name != self.checkpoint.embedding_tensor:
            own = self._dense(name)
            if own.shape != embedding_VD.shape or not torch.equal(own, embedding_VD.to(own.device)):
                hint = "set tie_word_embeddings to false"
                raise InputError(
                    f"{name} differs from the embedding that it is tied to", where=self._where(), hint=hint
                )
        return self._make(embedding_VD, None, packs=False)  # the embedding needs it dense

    def misfit(self, name: str, value: Weight, wanted: str) -> InputError:
        """The error for a tensor of the wrong shape."""
        return InputError(
            f"tensor {name!r} has shape {list(value.shape)}, the model needs {wanted}", where=self._where(name)
        )

    def _make(self, weight: Weight, bias: Tensor | None, slow_reason: str = "", *, packs: bool = True) -> nn.Module:
        layer = make_linear(weight, bias, numerics=self.numerics, device=self.device, dtype=self.dtype)
        layer.slow_reason = layer.slow_reason or slow_reason
        return self._packer.pack(layer) if packs and self._packer is not None else layer

    def _dense(self, name: str) -> Tensor:
        value = self.checkpoint.tensor(name)
        if not value.is_floating_point():
            raise InputError(f"tensor {name!r} is {value.dtype}, not a float", where=self._where(name))
        self._taken.add(name)
        return value

    def _matrix(self, module: str) -> tuple[Weight, str]:
        """A weight as stored, or why it had to be dequantized."""
        scheme = self.checkpoint.schemes.get(module)
        if scheme is None or self._reader is None:
            return self._dense(f"{module}.weight"), ""
        self._taken.update(self._reader.stored_names(module, scheme))
        try:
            return self._reader.decode(module, self.checkpoint.tensor, scheme), ""
        except NotKept as error:
            return self.checkpoint.weight(module, self.dtype), f"kept dense: {error.message}"

    def _idle(self, name: str) -> bool:
        """Whether a tensor changes nothing: some tools write a bias of zeros beside each quantized weight."""
        return name.endswith(".bias") and not bool(self.checkpoint.tensor(name).any())

    @property
    def _names(self) -> Architecture:
        return self.checkpoint.architecture

    def _where(self, name: str = "") -> str:
        info = self.checkpoint.tensors.get(name)
        return str(self.checkpoint.folder if info is None else info.file)


def _alike(parts: Sequence[Part]) -> bool:
    """Whether weights can be joined along their output channels without changing what any of them means."""
    if len({part.bias is None for part in parts}) != 1:
        return False
    return len({_kind(part.weight) for part in parts}) == 1


def _kind(weight: Weight) -> tuple[object, ...]:
    if isinstance(weight, Tensor):
        return "dense", weight.dtype
    inputs = None if weight.input_scale is None else float(weight.input_scale)
    return "packed", weight.scheme, weight.packed.dtype, weight.scale.dtype, inputs
