"""The files of a model folder that is being written: shards, their index, config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.files import Written, atomic_write, written_file
from compress.core.safetensors_io import read_header

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.scheme import Scheme

INDEX_NAME = "model.safetensors.index.json"
SHARD_METADATA = {"format": "pt"}
KV_CACHE_KEY = "compress_kv_cache"  # in config.json: how keys and values are kept, as in the manifest
MASKED_KEY = "compress_masked"  # in config.json: zeros among the weights are chosen, and are to stay zeros

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"


def shard_name(index: int, num_blocks: int) -> str:
    """Shards are numbered before the first is written: one per block, then one for the rest."""
    return f"model-{index + 1:05d}-of-{num_blocks + 1:05d}.safetensors"


def shard_index(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """What the index of the safetensors among `files` says: where each tensor lies, and their bytes."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for name in files:
        if name.endswith(".safetensors"):
            for tensor, info in read_header(folder / name).items():
                weight_map[tensor] = name
                total_bytes += info.bytes
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def unquantized(source: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """Linear modules that stay as they are: every matrix but the embedding, and the head even where it is tied."""
    embedding = f"{source.architecture.embedding}.weight"
    matrices = [
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name != embedding
    ]
    return sorted({*matrices, source.architecture.head} - schemes.keys())


def write_json(path: Path, data: Mapping[str, Any]) -> Written:
    """A JSON file as model folders have them, sorted, so that equal data are equal bytes."""
    atomic_write(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return written_file(path)
