"""Blocks as compiled code: one graph for all that are alike, so that a deep model takes no longer than one block.

The forward of each block is compiled and not the block, nor the model: hooks and checkpoints stay outside, and names of
parameters are what they were. Shapes are fixed: the same sizes have the same code whatever came before, and a run that
was killed goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from compress.core.errors import EnvironmentRefused
from compress.core.inductor import require_inductor, use_own_folder

if TYPE_CHECKING:
    from compress.core.architectures import Architecture

MOST_GRAPHS = 64  # of all kinds of blocks, numbers of rows, student and teacher; torch's own limit is 8


def compile_blocks(model: Any, architecture: Architecture) -> None:
    """Let the model's blocks be compiled when they are first called. EnvironmentRefused where that cannot work."""
    require_inductor(model.device.type)
    use_own_folder()
    for block in model.get_submodule(architecture.blocks):
        block.forward = _compiled(block.forward, type(block).__name__)


def _compiled(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(forward, dynamic=False, fullgraph=True)

    @wraps(forward)
    def call(*inputs: Any, **named: Any) -> Any:
        try:
            with config.patch(recompile_limit=MOST_GRAPHS):
                return compiled(*inputs, **named)
        except TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EnvironmentRefused(f"a {name} cannot be compiled: {reason}", hint="compile: false") from error

    return call
