"""What a run will write, hold and take, from headers alone; and the refusal of what cannot work or fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from compress.core.errors import InputError, ResourceError, UsageError
from compress.core.files import free_bytes
from compress.core.kv_scheme import scheme_in
from compress.core.model_files import KV_CACHE_KEY
from compress.core.passes import LayerPlan, Pass, Plan
from compress.core.quantities import format_bytes
from compress.core.sizes import UNEVEN_NOTICE, widths_of

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Recipe
    from compress.core.scheme import Scheme

_HEADER_BYTES = 72  # of one tensor in a safetensors header, its name apart
_EXTRA_FILES_BYTES = 16 << 10  # manifest, recipe, evaluation, card


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A recipe's plan. `bytes_out` are the artifact's tensors (exact), `artifact_bytes` all of its files.

    `disk_bytes` is the most that output and partial folder hold at one time; `notices` are worth reading first;
    `uneven`: layers of the result differ in width.
    """

    stages: tuple[Plan, ...]
    bytes_in: int
    bytes_out: int
    artifact_bytes: int
    peak_memory_bytes: int
    disk_bytes: int
    minutes: float
    notices: tuple[str, ...]
    uneven: bool = False

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The layers that the stages touch, in order of the stages."""
        return tuple(layer for stage in self.stages for layer in stage.layers)

    def possible_schemes(self) -> list[dict[str, Scheme]]:
        """Schemes by module; where they are to be found out, some ways in which they may turn out: the same for all
        open layers, and another in each block."""
        settled = {layer.name: layer.scheme for layer in self.layers if layer.scheme}
        choices = {layer.name: layer.alternatives for layer in self.layers if layer.alternatives}
        most = max(map(len, choices.values()), default=0)
        same = [{name: found[min(place, len(found) - 1)] for name, found in choices.items()} for place in range(most)]
        by_block = {name: found[_block(name) % len(found)] for name, found in choices.items()}
        return [settled | way for way in (*same, by_block)]


def _block(name: str) -> int:
    """The number of the block that a module is in, 0 outside."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def make_plan(recipe: Recipe, checkpoint: Checkpoint, tokens: Tokens | None) -> RunPlan:
    """Plan every stage. CompressError says which stage, layer or setting cannot work."""
    require_composition(recipe, checkpoint)
    stages, result = _stage_plans(recipe, checkpoint, tokens)
    bytes_in = sum(info.bytes for info in checkpoint.tensors.values())
    bytes_out = stages[-1].bytes_out + _rewritten(recipe, checkpoint, stages)
    extra_bytes = bytes_beside_tensors(checkpoint, [layer.name for layer in stages[-1].layers if layer.scheme])
    uneven = widths_of(result.config) is not None  # only the bundled runtime opens that
    notices = [
        *_unknown(checkpoint),
        *_speechless(checkpoint),
        *(notice for stage in stages for notice in stage.notices),
        *((UNEVEN_NOTICE,) if uneven else ()),
        *_too_large(recipe, bytes_out + extra_bytes),
    ]
    return RunPlan(
        stages=stages,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        artifact_bytes=bytes_out + extra_bytes,
        peak_memory_bytes=max(stage.peak_memory_bytes for stage in stages),
        disk_bytes=_disk_bytes(recipe, stages) + extra_bytes,
        minutes=sum(stage.minutes for stage in stages),
        notices=tuple(dict.fromkeys(notices)),
        uneven=uneven,
    )


def _stage_plans(recipe: Recipe, checkpoint: Checkpoint, tokens: Tokens | None) -> tuple[tuple[Plan, ...], Checkpoint]:
    """The plan of each stage, for the shapes that the stages before it leave; and what the last one leaves."""
    plans = []
    for number, stage in enumerate(recipe.stages):
        try:
            plans.append(stage.settings.located(recipe.base_folder).plan(checkpoint, stage.settings.text(tokens)))
            _require_windows(stage.settings, checkpoint)
            checkpoint = stage.settings.after(checkpoint)
        except UsageError as error:
            raise stage.refused(error, number) from error
    return tuple(plans), checkpoint


def _require_windows(settings: Pass, checkpoint: Checkpoint) -> None:
    """UsageError where eviction would break the sliding windows of a model that the runtime runs."""
    from kv_compress.stage import KVCache
    from runtime.models.reading import read

    if isinstance(settings, KVCache) and settings.eviction is not None:
        layers = read(checkpoint.config, str(checkpoint.folder / "config.json")).layers
        settings.eviction.require_windows(layer.window for layer in layers)


def _rewritten(recipe: Recipe, checkpoint: Checkpoint, stages: tuple[Plan, ...]) -> int:
    """Bytes by which the format asked for exceeds that of stages; InputError if it cannot hold a layer."""
    from compress.core.formats import writer_for
    from compress.export import require_held

    format = recipe.export.format
    layers = {layer.name: layer for stage in stages for layer in stage.layers if layer.scheme}
    schemes = {name: layer.scheme for name, layer in layers.items() if layer.scheme}
    shapes = {name: layer.shape for name, layer in layers.items()}
    require_held(schemes, shapes, format, where="export.format")
    for name, layer in layers.items():
        for scheme in layer.alternatives:
            require_held({name: scheme}, shapes, format, where="export.format")
    held, asked = writer_for(recipe.stage_format), writer_for(format)
    return sum(
        asked.encoded_bytes(layers[name].shape, scheme, checkpoint.dtype)
        - held.encoded_bytes(layers[name].shape, scheme, checkpoint.dtype)
        for name, scheme in schemes.items()
    )


def _unknown(checkpoint: Checkpoint) -> list[str]:
    from compress.core._verify_shapes import unknown_tensors

    names = unknown_tensors(checkpoint)
    if not names:
        return []
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{others}: not a tensor of {checkpoint.model_type} models, carried over as it is"]


def _too_large(recipe: Recipe, artifact_bytes: int) -> list[str]:
    bound = recipe.gate.max_size if recipe.gate else None
    if bound is None or artifact_bytes <= bound:
        return []
    taken, allowed = format_bytes(artifact_bytes), format_bytes(bound)
    return [f"gate.max_size will be missed: all files take about {taken}, {allowed} are allowed"]


def _speechless(checkpoint: Checkpoint) -> list[str]:
    from compress.core._model_folder import TOKENIZER_FILES

    if any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES):
        return []
    return ["the source has no tokenizer, so the artifact will have none: it can only be run on token ids"]


def require_composition(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """InputError if a stage does not take the kind of weights that reaches it."""
    kind, left_by = checkpoint.kind, f"the source {checkpoint.source.id}"
    if KV_CACHE_KEY in checkpoint.config or scheme_in(checkpoint.config):
        hint = "start from the model before it got one"
        raise InputError(f"{left_by} has a policy for keys and values already", where="model", hint=hint)
    for number, stage in enumerate(recipe.stages):
        refusal = stage.settings.refusal(kind)
        if refusal:
            raise InputError(
                f"{stage.method} {refusal}, but {left_by} is {kind}",
                where=f"stages[{number}].{stage.kind}",
                hint="start from the model before it was compressed",
            )
        if stage.settings.gives is not None:
            kind, left_by = stage.settings.gives, f"what stages[{number}] leaves"


def require_room(plan: RunPlan, output: Path, *, used_bytes: int, memory_bytes: int | None) -> None:
    """ResourceError if memory or disk is too small for the plan. `used_bytes` is what a resumed run already wrote."""
    available = psutil.virtual_memory().available if memory_bytes is None else memory_bytes
    if plan.peak_memory_bytes > available:
        raise ResourceError(
            f"the run needs about {format_bytes(plan.peak_memory_bytes)} of memory and "
            f"{format_bytes(available)} are available",
            hint=f"free {format_bytes(plan.peak_memory_bytes - available)}, or {_less_memory(plan, available)}",
        )
    free = free_bytes(output) + used_bytes
    if plan.disk_bytes > free:
        raise ResourceError(
            f"the run needs about {format_bytes(plan.disk_bytes)} of disk and {format_bytes(free)} are free",
            where=str(output),
            hint=f"free {format_bytes(plan.disk_bytes - free)}, or choose an --output on another disk",
        )


def _less_memory(plan: RunPlan, available: int) -> str:
    """What to change in the recipe so that it fits, as far as the stages know."""
    changes = []
    for number, stage in enumerate(plan.stages):
        if stage.peak_memory_bytes > available:
            fits = ((words, size) for words, size in stage.leaner if size <= available)
            words, size = next(fits, (None, 0))
            if words is None:
                return "lower calibration.length or samples"
            changes.append(f"set {words} in stages[{number}], which then needs about {format_bytes(size)}")
    return ", and ".join(changes)


def bytes_beside_tensors(checkpoint: Checkpoint, quantized: Iterable[str]) -> int:
    """Headers, index and auxiliary files of an artifact in which these layers are quantized: close, not exact."""
    parts = {f"{name}.weight": 3 for name in quantized}
    headers = sum((2 * len(name) + 2 * _HEADER_BYTES) * parts.get(name, 1) for name in checkpoint.tensors)
    aux = sum((checkpoint.folder / path).stat().st_size for path in checkpoint.aux_files)
    return headers + aux + _EXTRA_FILES_BYTES


def _disk_bytes(recipe: Recipe, stages: tuple[Plan, ...]) -> int:
    """The most at one time: a stage's own disk beside what the stage before it left, or beside the rounded result.

    Quantized results are linked, not copied.
    """
    before = [0, *(stage.bytes_out for stage in stages[:-1])]
    most = max(left + stage.disk_bytes for left, stage in zip(before, stages, strict=True))
    is_copied = recipe.stages[-1].settings.gives != "quantized" or recipe.export.format != recipe.stage_format
    return max(most, stages[-1].disk_bytes + stages[-1].bytes_out) if is_copied else most
