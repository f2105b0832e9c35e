"""fp8 keys and values in the words of compressed-tensors, which vLLM reads: `kv_cache_scheme` in config.json, and a
`k_scale` and a `v_scale` in the attention of each layer.

https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError

SCHEME: Mapping[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KEY = "kv_cache_scheme"
_WHERE = "config.json: quantization_config"
_MAY_LACK = ("dynamic", "symmetric", "strategy")


def scale_names(block: str) -> tuple[str, str]:
    """Disk names of the scales of a block's keys and values."""
    return f"{block}.self_attn.k_scale", f"{block}.self_attn.v_scale"


def is_scale(name: str) -> bool:
    """Whether a tensor is named as one of these scales."""
    return name.endswith((".self_attn.k_scale", ".self_attn.v_scale"))


def scheme_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The kv_cache_scheme of a config.json. InputError for one that is not fp8 with a scale for each layer."""
    section = config.get("quantization_config")
    scheme = section.get(KEY) if isinstance(section, Mapping) else None
    if not scheme:
        return None
    if not isinstance(scheme, Mapping):
        raise InputError(f"{KEY} is {scheme!r:.60}, not a mapping", where=_WHERE)
    for key, wanted in SCHEME.items():
        if scheme.get(key, wanted if key in _MAY_LACK else None) != wanted:
            raise InputError(f"{KEY} has {key} {scheme.get(key)!r:.60}, only {wanted!r} is read", where=_WHERE)
    return scheme


def with_scheme(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says of keys and values that they are fp8, whatever it says of weights."""
    alone = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []}
    section = config.get("quantization_config") or alone | {"quantization_status": "compressed"}
    return {**config, "quantization_config": {**section, KEY: dict(SCHEME)}}
