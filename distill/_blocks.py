"""The blocks of a model in training: what they keep for the way back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.core.architectures import Architecture
    from distill._settings import Training


def prepare_blocks(settings: Training, model: Any, architecture: Architecture) -> None:
    """Let the blocks keep nothing but their inputs, if the settings say so."""
    blocks = model.get_submodule(architecture.blocks)
    if settings.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it gets another name in transformers 6
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in blocks:
            block.training = True  # without it a block keeps everything; alone, for inside nothing is to be dropped out
