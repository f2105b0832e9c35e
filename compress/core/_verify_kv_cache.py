"""How keys and values are kept, as three places say it: manifest, config.json, and the scales beside the weights."""

from __future__ import annotations

from typing import Any

from compress.core._verify_folder import Contents
from compress.core.architectures import lookup
from compress.core.errors import ArtifactError, InputError
from compress.core.kv_agreement import require_agreement
from compress.core.kv_scheme import is_scale, scale_names, scheme_in
from compress.core.methods import find_pass
from compress.core.model_files import KV_CACHE_KEY
from compress.core.safetensors_io import load_tensor


def speaks_of_cache(contents: Contents) -> bool:
    """Whether anything here says how keys and values are kept."""
    said = contents.manifest is not None and contents.manifest.kv_cache is not None
    section = contents.config.get("quantization_config")
    scheme = isinstance(section, dict) and section.get("kv_cache_scheme")
    return said or bool(scheme) or KV_CACHE_KEY in contents.config or any(map(is_scale, contents.tensors))


def check_kv_cache(contents: Contents) -> str:
    """ArtifactError unless all that is there says the same."""
    policy = contents.config.get(KV_CACHE_KEY)
    if contents.manifest is not None:
        require_agreement(contents.config, contents.manifest.kv_cache)
    count = contents.config.get("num_hidden_layers")
    layers = policy.get("layers") if isinstance(policy, dict) else None
    if policy is not None and (not isinstance(layers, list) or len(layers) != count):
        raise ArtifactError(f"does not speak of {count} layers", where=f"config.json: {KV_CACHE_KEY}")
    _require_obeyed(contents)
    if scheme_in(contents.config) is None:
        stray = [name for name in contents.tensors if is_scale(name)]
        if stray and policy is None:
            raise ArtifactError("is a scale of keys or values, of which config.json says nothing", where=stray[0])
        return f"{len(layers or [])} layers"
    return _scales(contents, layers)


def _require_obeyed(contents: Contents) -> None:
    """ArtifactError for a policy that the bundled runtime refuses."""
    stage: Any = find_pass("kv_cache", "kv_cache")
    try:
        stage.require_obeyed(contents.config)
    except InputError as error:
        where = error.where if error.where and error.where.startswith("config.json") else f"config.json: {KV_CACHE_KEY}"
        raise ArtifactError(error.message, where=where) from None


def _scales(contents: Contents, layers: list[Any] | None) -> str:
    blocks = lookup(contents.config).blocks
    for index in range(contents.config["num_hidden_layers"]):
        for part, name in zip(("keys", "values"), scale_names(f"{blocks}.{index}"), strict=True):
            if name not in contents.tensors:
                raise ArtifactError("is missing: kv_cache_scheme needs it", where=name)
            found = load_tensor(contents.tensors[name]).float().flatten().tolist()
            wanted = found if layers is None else layers[index].get(part, {}).get("scale")
            if len(found) != 1 or found != wanted or not 0 < found[0] < float("inf"):
                raise ArtifactError(f"is {found}, the policy says {wanted}", where=name)
    return f"fp8 with scales for {contents.config['num_hidden_layers']} layers, also as kv_cache_scheme"
