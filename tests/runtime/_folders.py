"""Model folders made of other ones: another config, other tensors, quantized weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.core.formats import compressed_tensors
from compress.core.scheme import Scheme
from tests.quantized_folders import quantize_weight


def edited(source: Path, target: Path, changes: dict[str, Any], drop: Sequence[str] = ()) -> Path:
    """A copy of a model folder with another config."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None], **settings: Any) -> Path:
    """A copy of a model folder whose tensors `change` has changed, with other settings in its config."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def quantized_copy(source: Path, target: Path, scheme_of: Callable[[str], Scheme | None]) -> Path:
    """The model of `source` with every matrix inside its blocks, and the head, stored under a scheme; None keeps it."""
    state = load_file(source / "model.safetensors")
    stored, schemes, kept = {}, {}, []
    for name, value in state.items():
        module = name.removesuffix(".weight")
        matrix = value.ndim == 2 and "embed_tokens" not in name
        scheme = scheme_of(module) if matrix else None
        if scheme is not None:
            schemes[module] = scheme
            stored |= compressed_tensors.encode(module, quantize_weight(value, scheme))
            continue
        stored[name] = value
        if matrix:
            kept.append(module)
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = compressed_tensors.quantization_config(schemes, kept)
    (target / "config.json").write_text(json.dumps(config))
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    return target
