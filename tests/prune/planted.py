"""Tiny models with something planted in them, and what a pruned one computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.core.recipe import Recipe, parse_recipe

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "


def planted(source: Path, folder: Path, plant: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model whose tensors were changed in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    plant(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe_of(model: Path, stage: dict[str, Any], text: str = STORY * 8) -> Recipe:
    """One stage, calibrated on `text`, which is written beside the model."""
    (model.parent / "text.txt").write_text(text)
    calibration = {"dataset": "text.txt", "samples": 4, "length": 32}
    return parse_recipe({"model": str(model), "calibration": calibration, "stages": [stage]}, base_folder=model.parent)


def logits(folder: Path) -> Tensor:
    """What transformers computes for the same tokens, whatever the model."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits
