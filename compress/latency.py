"""Latency: how many structures may stay for the bundled runtime to take a given share of the original's time per token.

What a machine takes is measured before a run is planned, so that the recipe that is planned, recorded and run says how
many stay: the artifact follows from it, and a resumed run does not measure again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from compress.core.errors import UsageError
from compress.core.events import Listener, Notice
from compress.core.files import copy_file, write_entries
from compress.core.journal import recorded_fingerprint
from compress.core.model_files import INDEX_NAME, SHARD_METADATA, shard_index, shard_name, write_json
from compress.core.safetensors_layout import tensor_entry

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Recipe
    from prune._structure import StructuredPruning

PROMPT_TOKENS, DECODED_TOKENS, ROUNDS = 32, 24, 5


def with_counts(recipe: Recipe, original: Checkpoint, journal: Path | None, device: str, events: Listener) -> Recipe:
    """The recipe with `keep` for every `latency`: as the journal of an unfinished run has it, or measured now."""
    from prune._structure import StructuredPruning

    if not any(isinstance(stage.settings, StructuredPruning) and stage.settings.latency for stage in recipe.stages):
        return recipe
    earlier = ((journal and recorded_fingerprint(journal)) or {}).get("recipe", {}).get("stages", [])
    stages, checkpoint = [], original
    for number, stage in enumerate(recipe.stages):
        settings = stage.settings
        if isinstance(settings, StructuredPruning) and settings.latency is not None:
            keep = _recorded(earlier, number, stage.method)
            if keep is None:
                try:
                    keep = largest_count(settings, checkpoint, device, events)
                except UsageError as error:
                    raise stage.refused(error, number) from error
            settings = settings.model_copy(update={"latency": None, "keep": keep})
            stage = stage.model_copy(update={"settings": settings})
        stages.append(stage)
        checkpoint = settings.after(checkpoint)
    return recipe.model_copy(update={"stages": tuple(stages)})


def _recorded(stages: list[dict[str, Any]], number: int, method: str) -> int | None:
    """What an earlier run of this recipe found for stage `number`."""
    found = stages[number].get("prune") if number < len(stages) else None
    return found.get("keep") if found and found.get("method") == method else None


def largest_count(settings: StructuredPruning, checkpoint: Checkpoint, device: str, events: Listener) -> int:
    """The largest count with which the model keeps within settings.latency. UsageError if the smallest does not."""
    total, step = settings.total(checkpoint), settings.step(checkpoint)
    counts = [*range(step, total, step)]
    wanted = settings.latency or 1.0
    with tempfile.TemporaryDirectory() as place:
        before = _written(checkpoint, Path(place) / "original")
        low, high = 0, len(counts)  # counts before low keep within it, those from high on do not
        found = None
        while low < high:
            middle = (low + high) // 2
            share = _share(settings, checkpoint, counts[middle], before, Path(place) / "smaller", device)
            if share <= wanted:
                low, found = middle + 1, share
            else:
                high = middle
        if found is None:
            least = f"even {counts[0]} of {total} of them take longer" if counts else "there are too few of them"
            raise UsageError(
                f"latency {wanted:g} cannot be reached by {settings.what} alone on this machine: {least}",
                where="prune.latency",
            )
    events(
        Notice(
            f"{counts[low - 1]} of {total} {settings.what} stay: a token then takes {100 * found:.0f} % of the time "
            "that it took, one request at a time on this machine"
        )
    )
    return counts[low - 1]


def _share(
    settings: StructuredPruning, checkpoint: Checkpoint, count: int, before: Path, folder: Path, device: str
) -> float:
    """Of the original's time per token, what a model with `count` structures takes: medians of turns."""
    after = _written(settings.shrunk(checkpoint, count), folder)
    times: dict[Path, list[float]] = {before: [], after: []}
    for model in (before, after):
        _seconds(model, device, rounds=1)  # kernels are compiled, files cached
    for model in (before, after, after, before):
        times[model] += _seconds(model, device, ROUNDS)
    return median(times[after]) / median(times[before])


def _seconds(folder: Path, device: str, rounds: int) -> list[float]:
    """Seconds per token behind a prompt, one request at a time, of some rounds."""
    from runtime.llm import LLM

    llm = LLM(folder, device=device, max_length=PROMPT_TOKENS + DECODED_TOKENS + 1)
    prompt = list(range(PROMPT_TOKENS))
    found = []
    for _ in range(rounds):
        ends = []
        for count in (1, DECODED_TOKENS + 1):
            start = time.perf_counter()
            llm.generate([prompt], max_tokens=count, temperature=0.0, ignore_eos=True)
            ends.append(time.perf_counter() - start)
            llm.engine.scheduler.pool.forget()
        found.append((ends[1] - ends[0]) / DECODED_TOKENS)
    return found


def _written(checkpoint: Checkpoint, folder: Path) -> Path:
    """The model as a folder that the runtime opens, without a tokenizer."""
    folder.mkdir(exist_ok=True)
    files = {}
    for index, names in enumerate(_shards(checkpoint)):
        name = shard_name(index, checkpoint.num_blocks)
        entries = [tensor_entry(tensor, checkpoint.tensor(tensor)) for tensor in names]
        files[name] = write_entries(folder / name, entries, SHARD_METADATA)
    write_json(folder / "config.json", checkpoint.config)
    write_json(folder / INDEX_NAME, shard_index(folder, files))
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        copy_file(generation, folder / generation.name)
    return folder


def _shards(checkpoint: Checkpoint) -> Iterator[list[str]]:
    yield from (checkpoint.block_tensors(index) for index in range(checkpoint.num_blocks))
    yield checkpoint.rest_tensors()
