"""What a run is given: options on the one side, recipe, model, tokens and plan on the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.events import Listener, silent
from compress.latency import with_counts
from compress.planning import RunPlan, make_plan, require_composition

if TYPE_CHECKING:
    from compress.core.adapter import Adapter
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Recipe


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what. Of these, device, dtype, micro_batch and evaluate are part of the fingerprint.

    `fresh` starts over and may replace an older output. `max_memory_bytes` stands in for the memory that is free now.
    `micro_batch` samples go through a block at once (None: about 2048 tokens).
    """

    output: Path
    fresh: bool = False
    keep_stages: bool = False
    device: str = "cpu"
    dtype: str = "auto"
    micro_batch: int | None = None
    offline: bool = False
    evaluate: bool = True
    allow_code: tuple[str, ...] = ()
    max_memory_bytes: int | None = None


@dataclass(frozen=True)
class Inputs:
    """The recipe as written and with its paths found, the model, the calibration tokens, and what it will cost.

    `base` is the model that the recipe names; with an `adapter`, `original` is `base` with that in it."""

    recipe: Recipe
    located: Recipe
    original: Checkpoint
    tokens: Tokens | None
    micro_batch: int
    plan: RunPlan
    base: Checkpoint
    adapter: Adapter | None = None


def read_inputs(recipe: Recipe, options: RunOptions, journal: Path, events: Listener = silent) -> Inputs:
    """Open the model, measure latencies that the recipe names, tokenize the calibration data, plan. `journal` is that
    of an unfinished run. Raises CompressError for what cannot work."""
    from compress.core._verify_shapes import require_shapes
    from compress.core.calibration import load_tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.walk import default_micro_batch
    from compress.evaluate.task_files import require_tasks
    from compress.evaluate.windows import require_window

    located = recipe.located()
    if located.evaluate is not None and options.evaluate:
        require_tasks(located.evaluate, recipe.base_folder)
    base = Checkpoint.open(located.model, revision=recipe.revision, offline=options.offline)
    require_composition(recipe, base)
    require_shapes(base)
    original, adapter = _adapted(base, located.adapter, options)
    earlier = None if options.fresh else journal
    recipe = with_counts(recipe, original, earlier, options.device, events)
    _ = original.skeleton  # InputError for a config.json that no model can be built from
    if located.evaluate is not None and located.evaluate.perplexity is not None and options.evaluate:
        require_window(located.evaluate.perplexity.window, original)
    with ThreadPoolExecutor(1) as beside:
        hashes = beside.submit(_read_through, original, adapter)
        tokens = None
        if located.calibration is not None:
            tokens = load_tokens(located.calibration, original, recipe.base_folder, offline=options.offline)
        hashes.result()  # raises what was found
    micro_batch = options.micro_batch or (default_micro_batch(tokens.ids.shape[1]) if tokens else 1)
    plan = make_plan(recipe, original, tokens)
    if adapter is not None:
        plan = replace(
            plan, disk_bytes=plan.disk_bytes + plan.bytes_in, notices=(*_stranger(adapter, base), *plan.notices)
        )
    return Inputs(recipe, located, original, tokens, micro_batch, plan, base, adapter)


def _adapted(base: Checkpoint, adapter: str | None, options: RunOptions) -> tuple[Checkpoint, Adapter | None]:
    """What the first stage reads, and the adapter in it. InputError for one that is there but not asked for."""
    from compress.core.adapter import Adapter, require_alone
    from compress.core.merged import MergedCheckpoint

    if adapter is None:
        require_alone(base)
        return base, None
    found = Adapter.open(adapter, offline=options.offline)
    return MergedCheckpoint(base, found), found


def _stranger(adapter: Adapter, base: Checkpoint) -> list[str]:
    """A notice if the adapter says that it was made for another model; folders have many names."""
    if not adapter.base or Path(adapter.base).name == Path(base.source.id).name:
        return []
    return [f"the adapter says that it was made for {adapter.base}, and it is merged into {base.source.id}"]


def _read_through(original: Checkpoint, adapter: Adapter | None) -> None:
    """Hash the source (kept by the checkpoint, for the fingerprint), then refuse a weight that is no finite number:
    a run of hours must not end at one. Looking costs a fraction of hashing."""
    from compress.core._verify_weights import require_finite

    original.sha256()
    require_finite(original)
    if adapter is not None:
        require_finite(adapter)


def fingerprint_of(inputs: Inputs, options: RunOptions) -> dict[str, Any]:
    """The fingerprint of a run with these inputs."""
    from compress.core.fingerprint import fingerprint

    return fingerprint(
        inputs.recipe,
        inputs.original,
        inputs.tokens,
        device=options.device,
        dtype=options.dtype,
        micro_batch=inputs.micro_batch,
        evaluates=options.evaluate and inputs.recipe.evaluate is not None,
    )
