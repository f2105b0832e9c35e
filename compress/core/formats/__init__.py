"""One module per on-disk format. They are the only decoders in the product; `_reference` is a second one, for verify.

Each readable format has
  modules_of(names) -> list[str]                              modules whose quantized weight is among these tensors
  scheme_of(module, quantization_config) -> Scheme | None     None: the module is not quantized
  stored_names(module, scheme) -> tuple[str, ...]             disk names of the tensors that hold the module
  OPTIONAL                                                    endings of those names that may be missing
  shape_of(module, scheme, tensors) -> (out, in)              from headers
  decode(module, read, scheme) -> QuantTensor                 codes and scales as stored, or NotKept
  dequantize(module, read, scheme, dtype) -> Tensor [out, in]
and a Reader binds them to one model's config. A writable format has, too,
  encode(module, QuantTensor) -> {disk name: Tensor}          the same dequantized weight, to the bit
  quantization_config(schemes, unquantized) -> dict           of the whole model
  encoded_bytes(shape, scheme, scale_dtype) -> int            of one module
What of a format is written is in compatibility.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError, UsageError
from compress.core.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from compress.core.checkpoint import Checkpoint
    from compress.core.safetensors_io import TensorInfo
    from compress.core.tensors import QuantTensor

READABLE = {
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
}
WRITABLE = ("awq", "bitsandbytes", "compressed-tensors", "gptq")
KNOWN_METHODS = frozenset(
    {"aqlm", "auto-round", "bitnet", "eetq", "fbgemm_fp8", "fp8", "fp_quant", "higgs", "hqq"}
    | {"modelopt", "mxfp4", "quanto", "quark", "spqr", "torchao", "vptq"}
)
_WHERE = "config.json: quantization_config"

Read = Callable[[str], "torch.Tensor"]


class NotRead(InputError):
    """The model is in a format that exists, but that this version does not read."""


class NotKept(InputError):
    """A weight that can be dequantized, but that no QuantTensor holds as it is stored."""


@dataclass(frozen=True)
class Reader:
    """Reads the quantized weights of one model. `read` arguments give a stored tensor by its disk name."""

    method: str
    config: Mapping[str, Any]
    format: ModuleType
    options: Mapping[str, Any] = field(default_factory=dict)

    def scheme_of(self, module: str, config: Mapping[str, Any] | None = None) -> Scheme | None:
        """Scheme that the config gives `module`, None if it leaves it dense."""
        return self.format.scheme_of(module, self.config if config is None else config)

    def modules(self, names: Iterable[str]) -> dict[str, Scheme]:
        """The quantized modules among tensors of these names, each with its scheme."""
        found: dict[str, Scheme] = {}
        names = set(names)
        for module in self.format.modules_of(names):
            index = f"{module}.weight_g_idx"
            if index in names:
                raise InputError("is a group index (activation order), which readers no longer take", where=index)
            scheme = self.scheme_of(module)
            if scheme is None:
                raise InputError(f"{module} has quantized tensors, but the config leaves it dense", where=_WHERE)
            found[module] = scheme
        return found

    def stored_names(self, module: str, scheme: Scheme) -> tuple[str, ...]:
        """Disk names of the tensors that hold `module`."""
        return self.format.stored_names(module, scheme)

    def may_lack(self, name: str) -> bool:
        """Whether a stored tensor of this disk name may be missing."""
        return name.endswith(self.format.OPTIONAL)

    def shape_of(self, module: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """Shape [out, in] of a module whose tensors are all there."""
        return self.format.shape_of(module, scheme, tensors)

    def decode(self, module: str, read: Read, scheme: Scheme) -> QuantTensor:
        """Codes and scales as stored; NotKept for what a QuantTensor cannot hold (activation order)."""
        return self.format.decode(module, read, scheme, **self.options)

    def input_scale(self, module: str, read: Read) -> torch.Tensor:
        """The scale [1] of a module's static inputs."""
        return self.format.input_scale(module, read)

    def dequantize(self, module: str, read: Read, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in], computed in fp32 and rounded once to `dtype`."""
        return self.format.dequantize(module, read, scheme, dtype, **self.options)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantization method that a config.json names, None for a model whose weights are not quantized."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise InputError("is not a mapping", where=_WHERE)
    if quantization.get("kv_cache_scheme") and quantization.get("config_groups") == {}:
        return None  # it speaks of keys and values alone
    return str(quantization.get("quant_method", "unnamed"))


def reader_for(config: Mapping[str, Any], model: str = "the model") -> Reader:
    """The reader of a quantized model's weights, from its config.json; InputError names a format we do not read."""
    method = method_of(config)
    if method is None:
        raise InputError(f"{model} is not quantized", where="config.json")
    if method not in READABLE:
        refusal = NotRead if method in KNOWN_METHODS else InputError
        raise refusal(
            f"{model} is quantized with {method!r}, which this version does not read",
            where=f"{_WHERE}.quant_method",
            hint=f"readable are {', '.join(sorted(READABLE))}; start from the model's original weights",
        )
    quantization = config["quantization_config"]
    format = import_module(f"compress.core.formats.{READABLE[method]}")
    options = {"version": format.version_of(quantization)} if method == "gptq" else {}
    return Reader(method, quantization, format, options)


def writer_for(format: str) -> ModuleType:
    """The module that writes `format`, one of WRITABLE."""
    if format not in WRITABLE:
        raise UsageError(f"unknown format {format!r}", hint=f"these are written: {', '.join(WRITABLE)}")
    return import_module(f"compress.core.formats.{READABLE[format]}")


def stored_modules(source: Checkpoint) -> dict[str, str]:
    """Disk name of every tensor that holds a quantized weight -> the module that it belongs to."""
    if not source.schemes:
        return {}
    reader = reader_for(source.config, source.source.id)
    return {name: module for module, scheme in source.schemes.items() for name in reader.stored_names(module, scheme)}
