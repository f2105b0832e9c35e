"""One module per on-disk format. They are the only decoders in the product; `_reference` is a second one, for verify.

Each readable format has
  scheme_of(module, quantization_config) -> Scheme | None     None: the module is not quantized
  stored_names(module, scheme) -> tuple[str, ...]             disk names of the tensors that hold the module
  decode(module, read, scheme) -> QuantTensor                 codes and scales as stored
  dequantize(module, read, scheme, dtype) -> Tensor [out, in]
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from compress.core.errors import InputError

READABLE = {"compressed-tensors": "compressed_tensors", "gptq": "gptq"}


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantization method that a config.json names, None for a model that is not quantized."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise InputError("is not a mapping", where="config.json: quantization_config")
    return str(quantization.get("quant_method", "of an unnamed method"))


def reader_for(config: Mapping[str, Any], model: str = "the model") -> ModuleType:
    """The format module that reads a quantized model's weights; InputError names a format we do not read."""
    method = method_of(config)
    if method is None:
        raise InputError(f"{model} is not quantized", where="config.json")
    if method not in READABLE:
        raise InputError(
            f"{model} is quantized with {method!r}, which this version does not read",
            where="config.json: quantization_config.quant_method",
            hint=f"readable are {', '.join(sorted(READABLE))}; start from the model's original weights",
        )
    return import_module(f"compress.core.formats.{READABLE[method]}")
