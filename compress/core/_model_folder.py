"""What a model folder must hold: config, safetensors shards, tokenizer. Whatever is wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.core.errors import InputError
from compress.core.safetensors_io import TensorInfo, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
CARRIED_PREFIXES = ("LICENSE", "NOTICE")
ADAPTER = "adapter_config.json"
NOT_CARRIED = ("config.json", INDEX, "compress.json", "evaluation.json", ADAPTER)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the numbers that the walk relies on."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER).is_file():
            base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "the model that it was made for"
            hint = f"model: {base}, and adapter: with this folder"
            raise InputError("an adapter and no model: it is merged into one", where=str(folder), hint=hint)
        raise InputError("not a model folder: it has no config.json", where=str(folder))
    config = read_json(path)
    if "text_config" not in config:
        for key in ("num_hidden_layers", "hidden_size", "vocab_size"):
            if type(config.get(key)) is not int or config[key] < 1:
                raise InputError(f"{key} is {config.get(key)!r}, not a positive number", where=str(path))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"invalid JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError("invalid JSON: this is no text", where=str(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("invalid: not a JSON object", where=str(path))
    return data


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the folder's safetensors shards, by name."""
    if (folder / INDEX).exists():
        return _read_shards(folder, folder / INDEX)
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        raise InputError(f"{shards[0].name} is there, but neither {WEIGHTS} nor {INDEX}", where=str(folder))
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"the weights are pickled ({pickles[0]}), which can run code when loaded: only safetensors are read",
            where=str(folder),
            hint="save the model with transformers' save_pretrained first",
        )
    raise InputError(f"the folder holds no weights: {WEIGHTS} is missing", where=str(folder))


def _read_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError("weight_map is missing or no map of tensor names to files", where=str(index))
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise InputError(f"the shard name {file!r} leaves the folder", where=str(index))
        if not (folder / file).is_file():
            raise InputError(f"the shard {file} is missing", where=str(index))
        tensors |= {name: info for name, info in read_header(folder / file).items() if weight_map.get(name) == file}
    for name, file in weight_map.items():
        if name not in tensors:
            raise InputError(f"tensor {name!r} is not in {file}, where the index promises it", where=str(index))
    return tensors


def aux_files(folder: Path) -> list[Path]:
    """Files to carry over beside config and weights, relative: no code, nothing that a run writes anew or merges."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        Path(name)
        for name in names
        if name.startswith(CARRIED_PREFIXES) or (name.endswith(CARRIED_SUFFIXES) and name not in NOT_CARRIED)
    ]


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder; no code from the folder runs."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"the folder has no tokenizer: {TOKENIZER_FILES[0]} is missing", where=str(folder))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what the tokenizers library raises for a broken file is no narrower
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the tokenizer cannot be loaded: {first_line}", where=str(folder)) from error
    rows = read_config(folder)["vocab_size"]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding only {rows} rows", where=str(folder)
        )
    return tokenizer
