"""Measuring what each choice of scheme costs, and choosing under a budget.

Shapes: R rows of a piece of a weight, K input channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.core.errors import UsageError
from compress.core.events import Notice
from compress.core.formats.compressed_tensors import SHAPE_BYTES, encoded_bytes
from compress.core.knapsack import knapsack as cheapest
from compress.core.methods import find_pass
from compress.core.passes import Job, LayerPlan, Plan
from quantize._overrides import DEFAULT_GROUP_SIZE
from quantize._settings import WeightQuantization

if TYPE_CHECKING:
    import torch

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.curvature import Curvature
    from compress.core.scheme import Scheme
    from quantize.mixed import Mixed

_SWEPT = ("gptq", "autoround")  # methods that let later columns make up for the error of earlier ones


@dataclass(frozen=True, slots=True)
class Item:
    """Layers that get one scheme: bytes and loss (nats a token) of each choice, in the order of `choices`."""

    layers: tuple[str, ...]
    bytes: tuple[int, ...]
    losses: tuple[float, ...]


def choose(settings: Mixed, job: Job) -> dict[str, Any]:
    """Scheme names by layer, of the layers that are open, with the loss and bytes that they add up to."""
    layers = open_layers(settings, job.checkpoint)
    items = _measured(settings, job, layers)
    budget = budget_of(settings, job.checkpoint, layers, WeightQuantization.plan(settings, job.checkpoint, None))
    picked = knapsack(items, budget)
    names = (*settings.choices, "")  # the last: as it is
    chosen = {layer: names[pick] for item, pick in zip(items, picked, strict=True) for layer in item.layers}
    loss = sum(item.losses[pick] for item, pick in zip(items, picked, strict=True))
    taken = sum(item.bytes[pick] for item, pick in zip(items, picked, strict=True))
    counts = {name or "as it is": list(chosen.values()).count(name) for name in names if name in chosen.values()}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    job.events(Notice(f"chose {told}: {_bits(taken, layers):.3f} bits per weight, expected KL {loss:.3g}", "mixed"))
    return {"schemes": chosen, "expected_kl": loss, "bytes": taken}


def settled(settings: Mixed, found: dict[str, Any], checkpoint: Checkpoint) -> WeightQuantization:
    """The settings of the method that rounds, with the schemes that were found."""
    names = checkpoint.architecture
    chosen: dict[str, str] = dict(found["schemes"])
    embedding, head = chosen.pop(names.embedding, None), chosen.pop(names.head, None)
    method: Any = find_pass("quantize", settings.using)
    shared = {
        name: getattr(settings, name)
        for name in ("scheme", "group_size", "symmetric", "clip", "uneven", "ignore", "prepare")
    }
    overrides = [{"layers": layer, "scheme": scheme} for layer, scheme in chosen.items()]
    fixed = [override.model_dump() for override in settings.overrides]
    if settings.vocabulary:  # chosen, or left as they are
        shared |= {"head": head or None, "embedding": embedding or None}
    else:
        shared |= {"head": settings.head, "embedding": settings.embedding}
    return method.model_validate({**shared, "overrides": (*overrides, *fixed)})


def open_layers(settings: Mixed, checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Shapes of the layers whose scheme is to be chosen: neither ignored nor overridden."""
    names = [name for index in range(checkpoint.num_blocks) for name in checkpoint.sites(index)]
    found = {name: checkpoint.matrix_shape(name) for name in names if _is_open(settings, name)}
    if settings.vocabulary:
        outside = (checkpoint.architecture.head, checkpoint.architecture.embedding)
        found |= {name: checkpoint.matrix_shape(name) for name in outside}
    return found


def _is_open(settings: Mixed, name: str) -> bool:
    return settings.scheme_for(name, DEFAULT_GROUP_SIZE) is not None and not any(
        override.covers(name) for override in settings.overrides
    )


def budget_of(settings: Mixed, checkpoint: Checkpoint, layers: dict[str, tuple[int, int]], uniform: Plan) -> int:
    """Bytes that the open layers may take together; `uniform` is the plan with one scheme for all of them."""
    if settings.bits_per_weight is not None:
        return int(settings.bits_per_weight * _weights(layers) / 8) + SHAPE_BYTES * len(layers)
    if settings.size is not None:
        return settings.size - (uniform.bytes_out - _uniform_bytes(uniform, layers, checkpoint))
    return sum(_bytes(settings, shape, settings.schemes[0], checkpoint) for shape in layers.values())


def _weights(layers: dict[str, tuple[int, int]]) -> int:
    return sum(rows * width for rows, width in layers.values())


def _bits(size: int, layers: dict[str, tuple[int, int]]) -> float:
    """Bits per weight of codes and scales that take so many bytes on disk."""
    return 8 * (size - SHAPE_BYTES * len(layers)) / _weights(layers)


def _uniform_bytes(uniform: Plan, layers: dict[str, tuple[int, int]], checkpoint: Checkpoint) -> int:
    """What the uniform plan gives to the open layers; embedding and head stay there as they are."""
    planned = {layer.name: layer.bytes_out for layer in uniform.layers}
    return sum(planned.get(name) or checkpoint.info(f"{name}.weight").bytes for name in layers)


def _bytes(settings: Mixed, shape: tuple[int, int], scheme: Scheme, checkpoint: Checkpoint) -> int:
    return encoded_bytes(shape, settings.fitted(scheme, shape[1]), checkpoint.dtype)


# ---------------------------------------------------------------------- measuring
def _measured(settings: Mixed, job: Job, layers: dict[str, tuple[int, int]]) -> list[Item]:
    """Every group of open layers with what each choice costs; the experts of a block go together."""
    tokens = job.calibration
    if tokens is None:
        raise UsageError("needs calibration text to measure sensitivities on")
    found: dict[str, list[Item]] = {}
    for curvature in job.curvatures(tokens.first(settings.tokens), vocabulary=settings.vocabulary):
        names = tuple(name for name in curvature.outputs if name in layers)
        if names:
            item = _item(settings, job.checkpoint, curvature, names, layers)
            found.setdefault(curvature.family, []).append(item)
    return [_joined(items) for items in found.values()]


def _joined(items: Sequence[Item]) -> Item:
    layers = tuple(layer for item in items for layer in item.layers)
    sizes = tuple(map(sum, zip(*(item.bytes for item in items), strict=True)))
    return Item(layers, sizes, tuple(map(sum, zip(*(item.losses for item in items), strict=True))))


def _item(
    settings: Mixed,
    checkpoint: Checkpoint,
    curvature: Curvature,
    names: tuple[str, ...],
    layers: dict[str, tuple[int, int]],
) -> Item:
    outside = names[0] in (checkpoint.architecture.head, checkpoint.architecture.embedding)
    losses = [0.0] * len(settings.choices)
    for name in names:
        for number, loss in enumerate(_losses(settings, checkpoint, curvature, name, layers[name], swept=not outside)):
            losses[number] += loss
    sizes = [
        sum(_bytes(settings, layers[name], scheme, checkpoint) for name in names) for scheme in settings.choice_schemes
    ]
    if outside:  # may stay as it is
        losses.append(0.0)
        sizes.append(checkpoint.info(f"{names[0]}.weight").bytes)
    return Item(names, tuple(sizes), tuple(losses))


def _losses(
    settings: Mixed,
    checkpoint: Checkpoint,
    curvature: Curvature,
    name: str,
    shape: tuple[int, int],
    *,
    swept: bool,
) -> list[float]:
    """Loss of each choice for one layer. A sweep leaves of a column's error what the later ones cannot make up for."""
    import torch

    from compress.core.grid import fit_grid
    from quantize._rounding import CLIPS, rows_at_once

    importance_K = _left_by_sweep(curvature.inputs) if swept and settings.using in _SWEPT else None
    judged = curvature if importance_K is None else replace(curvature, inputs=importance_K)
    schemes = [settings.fitted(scheme, shape[1]) for scheme in settings.choice_schemes]
    losses = [0.0] * len(schemes)
    for rows in torch.arange(shape[0]).split(rows_at_once(shape[1])):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        weight_RK = checkpoint.rows(f"{name}.weight", rows).float()
        for number, scheme in enumerate(schemes):
            grid = fit_grid(
                weight_RK, scheme, scale_dtype=checkpoint.dtype, clip=CLIPS[settings.clip], importance_K=importance_K
            )
            losses[number] += judged.loss(name, weight_RK - grid.round(weight_RK).dequantize(), piece)
    return losses


def _left_by_sweep(inputs: torch.Tensor) -> torch.Tensor | None:
    """What a squared error in each column costs once the columns after it have made up for it, [K]."""
    import torch

    from compress.core.solve import factorise

    if inputs.dim() == 1:
        return inputs
    factor = factorise(inputs.clone())
    if factor is None:
        return None
    cost_K = torch.empty_like(factor.diagonal_K)
    cost_K[factor.order_K] = factor.diagonal_K.square()
    return cost_K


# ---------------------------------------------------------------------- choosing
def knapsack(items: Sequence[Item], budget_bytes: int) -> list[int]:
    """The choice of each item with the least total loss whose bytes fit the budget; solved exactly (HiGHS)."""
    picked = cheapest([item.losses for item in items], [item.bytes for item in items], budget_bytes)
    if picked is None:
        raise UsageError(f"no choice of schemes fits {budget_bytes} bytes", where="quantize.bits_per_weight")
    return picked


# ---------------------------------------------------------------------- planning
def planned(settings: Mixed, plan: Plan, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
    """The uniform plan with the budget's bytes, and what measuring takes. UsageError if the budget cannot be kept."""
    from compress.core.memory import sensing_cost

    layers = open_layers(settings, checkpoint)
    budget = budget_of(settings, checkpoint, layers, plan)
    least = sum(
        min(_bytes(settings, shape, scheme, checkpoint) for scheme in settings.choice_schemes)
        for shape in layers.values()
    )
    if budget < least:
        asked, needed = f"{_bits(budget, layers):.3f} bits per weight", f"{_bits(least, layers):.3f}"
        if settings.size is not None:
            rest = plan.bytes_out - _uniform_bytes(plan, layers, checkpoint)
            asked, needed = f"{settings.size:,} bytes", f"{rest + least:,}, all that is not chosen included,"
        raise UsageError(
            f"{asked} with {len(layers)} layers to choose for cannot be kept: the smallest choice takes {needed} with "
            f"its scales",
            where="quantize.bits_per_weight" if settings.size is None else "quantize.size",
            hint="allow more, add a smaller scheme to choices, or larger groups",
        )
    most = sum(
        max(_bytes(settings, shape, scheme, checkpoint) for scheme in settings.choice_schemes)
        for shape in layers.values()
    )
    budget = min(budget, most)
    uniform = _uniform_bytes(plan, layers, checkpoint)
    cost = sensing_cost(checkpoint, None if calibration is None else calibration.first(settings.tokens))
    bytes_out = plan.bytes_out - uniform + budget
    words = (
        f"{len(layers)} layers get one of {', '.join(settings.choices)}, {_bits(budget, layers):.3f} bits on average"
    )
    return replace(
        plan,
        layers=(*_opened(plan.layers, layers, settings), *_vocabulary(settings, plan.layers, layers, checkpoint)),
        bytes_out=bytes_out,
        peak_memory_bytes=max(plan.peak_memory_bytes, cost.memory_bytes),
        disk_bytes=max(plan.disk_bytes + budget - uniform, cost.spill_bytes),
        minutes=plan.minutes + cost.minutes,
        notices=(*plan.notices, f"sizes are bounds: {words}"),
    )


def _opened(plans: Iterable[LayerPlan], layers: dict[str, tuple[int, int]], settings: Mixed) -> Iterable[LayerPlan]:
    """The planned layers; of open ones the schemes that they may get are named."""
    for layer in plans:
        if layer.name in layers:
            schemes = tuple(settings.fitted(scheme, layer.shape[1]) for scheme in settings.choice_schemes)
            yield replace(layer, alternatives=schemes)
        else:
            yield layer


def _vocabulary(
    settings: Mixed, plans: Iterable[LayerPlan], layers: dict[str, tuple[int, int]], checkpoint: Checkpoint
) -> Iterable[LayerPlan]:
    """Embedding and head, where they are open: as they are, or one of the choices."""
    known = {layer.name for layer in plans}
    for name, shape in layers.items():
        if name not in known:
            size = checkpoint.info(f"{name}.weight").bytes
            schemes = tuple(settings.fitted(scheme, shape[1]) for scheme in settings.choice_schemes)
            yield LayerPlan(name, shape, size, size, None, "left as it is", schemes)
