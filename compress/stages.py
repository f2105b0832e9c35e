"""The stages of a run, one checkpoint folder after the other. What is finished is not done again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.core._trim import trim_memory
from compress.core.events import Finished, Listener, Notice, Started
from compress.core.files import make_folder, remove_tree
from compress.core.journal import Journal
from compress.core.passes import Job
from compress.core.stopwatch import Stopwatch
from compress.core.workers import joined
from compress.inputs import Inputs, RunOptions
from compress.interrupt import units_finish
from compress.peak_memory import PeakMemory
from compress.sampling import RuntimeSampler
from compress.scoring import score
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


def run_stages(
    inputs: Inputs, options: RunOptions, workspace: Workspace, journal: Journal, events: Listener
) -> Checkpoint:
    """Run the stages that the journal does not call finished; gives the checkpoint that the last one left."""
    from compress.core.checkpoint import Checkpoint

    stages = inputs.recipe.stages
    folders = [workspace.stage(number, stage.kind) for number, stage in enumerate(stages)]
    first = sum(1 for _ in journal.of("stage"))
    source = Checkpoint.open(folders[first - 1]) if first else inputs.original
    if first:
        events(Notice(f"going on behind stage {first} of {len(stages)}"))
        _judge(first - 1, source, inputs, options, workspace, journal, events)
    for number in range(first, len(stages)):
        _run_stage(number, source, inputs, options, workspace, journal, events)
        source = Checkpoint.open(folders[number])
        _judge(number, source, inputs, options, workspace, journal, events)
        if number and not options.keep_stages:
            remove_tree(folders[number - 1])
    return source


def _run_stage(
    number: int,
    source: Checkpoint,
    inputs: Inputs,
    options: RunOptions,
    workspace: Workspace,
    journal: Journal,
    events: Listener,
) -> None:
    from compress.core.kept import Kept
    from compress.core.saves import Saves
    from compress.core.stage_writer import StageWriter

    stage, earlier = inputs.recipe.stages[number], inputs.recipe.stages[:number]
    source = stage.settings.view(source)
    name = f"{stage.kind} {stage.method}"
    events(Started(name, 1, "stage"))
    kind = stage.settings.gives or source.kind
    watch = Stopwatch()
    with units_finish(events) as after_block, PeakMemory() as memory:
        sink = StageWriter(
            workspace.stage(number, stage.kind),
            journal=journal,
            stage=number,
            source=source,
            original=inputs.original,
            rounds=kind == "quantized",
            format=stage.settings.formats[0] if stage.settings.gives else inputs.recipe.stage_format,
            masked=kind == "masked",
            after_commit=after_block,
            watch=watch,
        )
        if sink.finished():
            events(Notice(f"going on behind block {sink.finished()} of {source.num_blocks}", name))
        job = Job(
            checkpoint=source,
            calibration=stage.settings.text(
                calibration_behind(number, source, inputs, journal, offline=options.offline)
            ),
            sink=sink,
            original=inputs.original,
            seed=inputs.recipe.calibration.seed if inputs.recipe.calibration else 0,
            device=options.device,
            dtype=options.dtype,
            micro_batch=inputs.micro_batch,
            spill_folder=str(make_folder(workspace.spill)),
            events=events,
            remember=partial(_remembered, journal, number),
            keep=Kept(workspace.kept, journal, number),
            saves=Saves(workspace.saves, journal, number, watch),
            kept_blocks=kept_blocks(number, inputs, journal),
            open_sampler=partial(RuntimeSampler, device=options.device),
            zeros_stay=inputs.original.kind == "masked" or "masked" in [s.settings.gives for s in earlier],
        )
        settings = stage.settings.located(inputs.recipe.base_folder)
        settings.run(joined(settings, stage.method, job, options.allow_code))
        sink.finish(settings.outside(job))
    trim_memory()
    journal.add("memory", {"stage": number, "peak_memory_bytes": memory.peak_bytes})
    events(Finished(name, f"{source.num_blocks} blocks"))


def _judge(
    number: int,
    left: Checkpoint,
    inputs: Inputs,
    options: RunOptions,
    workspace: Workspace,
    journal: Journal,
    events: Listener,
) -> None:
    """Measure what stage `number` has left, if the recipe asks; the last one's result is the artifact itself."""
    asked = inputs.located.evaluate
    if asked is None or not (asked.stages and options.evaluate) or number + 1 == len(inputs.recipe.stages):
        return
    if any(data["stage"] == number for data in journal.of("worth")):
        return
    asked = asked.model_copy(update={"tasks": (), "refusals": None, "through": "transformers"})
    result = score(left, asked, inputs, options, workspace, events)
    journal.add("worth", {"stage": number, **{key: result[key] for key in ("perplexity", "bits_per_byte", "kl")}})


def calibration_behind(
    number: int, source: Checkpoint, inputs: Inputs, journal: Journal, *, offline: bool
) -> Tokens | None:
    """The calibration tokens for stage `number`, which reads `source`: where a stage before it numbered tokens anew,
    the text is cut by the new tokenizer, and ids from a file are translated. InputError if one of these is gone."""
    from compress.core.calibration import load_tokens
    from compress.core.documents import TOKEN_FILE

    earlier = [index for index in range(number) if inputs.recipe.stages[index].settings.renumbers_tokens]
    asked, tokens = inputs.located.calibration, inputs.tokens
    if not earlier or asked is None or tokens is None:
        return tokens
    if not asked.dataset.endswith(TOKEN_FILE):
        unhashed = asked.model_copy(update={"sha256": None})  # the recipe's hash is that of the first tokens
        return load_tokens(unhashed, source, inputs.recipe.base_folder, offline=offline)
    for index in earlier:
        tokens = tokens.renumbered(_found(journal, index, "kept"))
    return tokens


def kept_blocks(number: int, inputs: Inputs, journal: Journal) -> tuple[int, ...]:
    """Which block of the original each block that stage `number` finds was."""
    blocks = tuple(range(inputs.original.num_blocks))
    for index in range(number):
        if inputs.recipe.stages[index].settings.renumbers_blocks:
            blocks = tuple(blocks[old] for old in _found(journal, index, "kept"))
    return blocks


def _found(journal: Journal, stage: int, name: str) -> Any:
    """What an earlier stage has remembered."""
    return next(data["value"] for data in journal.of("finding") if (data["stage"], data["name"]) == (stage, name))


def _remembered(journal: Journal, stage: int, name: str, compute: Callable[[], Any]) -> Any:
    """What a stage has found out, once for all processes that work on it."""
    for data in journal.of("finding"):
        if (data["stage"], data["name"]) == (stage, name):
            return data["value"]
    value = compute()
    journal.add("finding", {"stage": stage, "name": name, "value": value})
    return value
