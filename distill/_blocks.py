"""The blocks of a model in training: what they keep for the way back, and whether they are compiled."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.core.architectures import Architecture
    from distill._settings import Training


def prepare_blocks(settings: Training, model: Any, architecture: Architecture) -> None:
    """Let the blocks keep nothing but their inputs, and be compiled, if the settings say so."""
    blocks = model.get_submodule(architecture.blocks)
    if settings.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it gets another name in transformers 6
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in blocks:
            block.training = True  # without it a block keeps everything; alone, for inside nothing is to be dropped out
    if settings.compile:
        from distill._compiled import compile_blocks

        compile_blocks(model, architecture)
