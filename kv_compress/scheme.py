"""fp8 keys and values in the words of compressed-tensors, which vLLM reads: `kv_cache_scheme` in config.json, and a
`k_scale` and a `v_scale` in the attention of each layer.

https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.core.errors import InputError
from kv_compress.policy import KVPolicy

SCHEME: Mapping[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_KEY = "kv_cache_scheme"
_WHERE = "config.json: quantization_config"


def scale_names(block: str) -> tuple[str, str]:
    """Disk names of the scales of a block's keys and values."""
    return f"{block}.self_attn.k_scale", f"{block}.self_attn.v_scale"


def scheme_in(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The kv_cache_scheme of a config.json. InputError for one that is not fp8 with a scale for each layer."""
    section = config.get("quantization_config")
    scheme = section.get(_KEY) if isinstance(section, Mapping) else None
    if not scheme:
        return None
    if not isinstance(scheme, Mapping):
        raise InputError(f"{_KEY} is {scheme!r:.60}, not a mapping", where=_WHERE)
    for key, wanted in SCHEME.items():
        if scheme.get(key, wanted if key in ("dynamic", "symmetric", "strategy") else None) != wanted:
            raise InputError(f"{_KEY} has {key} {scheme.get(key)!r:.60}, only {wanted!r} is read", where=_WHERE)
    return scheme


def expressible(policy: KVPolicy) -> bool:
    """Whether the scheme can say what the policy says: fp8 in all layers, one scale each, nothing rotated."""
    codings = [coding for layer in policy.layers for coding in (layer.keys, layer.values)]
    return all(coding.codec == "fp8" and len(coding.scale) == 1 and not coding.rotate for coding in codings)
