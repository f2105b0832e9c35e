"""Static inputs: the one scale of a layer's inputs, from the largest that calibration saw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from compress.core.errors import UsageError
from compress.core.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from compress.core.passes import LayerPlan
    from compress.core.walk import Group


def input_scale(group: Group, scheme: Scheme, dtype: torch.dtype) -> torch.Tensor | None:
    """The scale [1] of a group's inputs, in `dtype`; None where it is found while the model runs."""
    from compress.core import grid
    from compress.core.statistics import AbsMax

    return grid.input_scale(group.statistics[AbsMax].max(), scheme, dtype) if scheme.static_inputs else None


def refuse_experts(layers: Iterable[LayerPlan]) -> None:
    """UsageError for static inputs of an expert: it sees few tokens, perhaps none, and its largest input none of us
    knows."""
    for layer in layers:
        if ".experts." in layer.name and layer.scheme is not None and layer.scheme.static_inputs:
            raise UsageError(
                f"an expert sees too few tokens for a scale of its inputs, e.g. {layer.name}",
                where="quantize.activations",
                hint="set activations: dynamic, or ignore: ['*.experts.*']",
            )
