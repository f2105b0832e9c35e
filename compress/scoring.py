"""A checkpoint of a run, scored beside the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.core.events import Listener
from compress.inputs import Inputs, RunOptions
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Evaluation


def score(
    checkpoint: Checkpoint,
    asked: Evaluation,
    inputs: Inputs,
    options: RunOptions,
    workspace: Workspace,
    events: Listener,
) -> dict[str, Any]:
    """What `asked` wants to know of it, where and how the run wants it."""
    from compress.evaluate import evaluate

    return evaluate(
        inputs.original,
        checkpoint,
        asked,
        base_folder=inputs.recipe.base_folder,
        device=options.device,
        dtype=options.dtype,
        spill_folder=workspace.spill,
        offline=options.offline,
        events=events,
    )
