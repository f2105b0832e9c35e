"""One recipe, run: plan → stages → export → verify → evaluate → card and manifest → one rename → report.

Killed anywhere and started again, a run goes on behind its last durable block and ends with the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.events import Finished, Listener, Notice, Started, silent
from compress.core.files import atomic_write, make_folder
from compress.core.journal import Journal
from compress.facts import artifact_facts, run_json
from compress.inputs import Inputs, RunOptions, fingerprint_of, read_inputs
from compress.planning import RunPlan, require_room
from compress.stages import run_stages
from compress.staging import stage_artifact
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.core.recipe import Recipe

__all__ = ["RunOptions", "RunPlan", "RunResult", "plan", "run"]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the artifact, the folder of its report, run.json as data, and the bounds that were missed."""

    artifact: Path
    report_folder: Path
    summary: dict[str, Any]
    gate_failures: list[str]


def plan(recipe: Recipe, options: RunOptions, events: Listener = silent) -> RunPlan:
    """What `run` would write, hold and take. Raises as `run` would for what cannot work or fit; writes nothing."""
    workspace = Workspace(options.output)
    workspace.refuse(recipe, fresh=options.fresh, keep_stages=options.keep_stages)
    return _affordable(read_inputs(recipe, options, workspace.journal, events), options, workspace, events).plan


def run(recipe: Recipe, options: RunOptions, events: Listener = silent) -> RunResult:
    """Run the recipe, or go on with it. Raises CompressError; the artifact appears whole or not at all.

    A missed gate is no error here: artifact and report are written, and the result names the bounds.
    """
    workspace = Workspace(options.output)
    workspace.refuse(recipe, fresh=options.fresh, keep_stages=options.keep_stages)
    with workspace.opened(fresh=options.fresh):
        events(Started("run", len(recipe.stages), "stage"))
        inputs = _affordable(read_inputs(recipe, options, workspace.journal, events), options, workspace, events)
        journal = workspace.open_journal(fingerprint_of(inputs, options), fresh=options.fresh)
        inputs = _with_adapter(inputs, workspace, journal, events)
        if journal.last("ready") is None:
            last = run_stages(inputs, options, workspace, journal, events)
            stage_artifact(last, inputs, options, workspace, journal, events)
        if not workspace.is_published(journal):
            workspace.publish(journal)
        _measure_speed(inputs, options, workspace, journal, events)
        result = _report(inputs, workspace, journal)
        workspace.close(keep_stages=options.keep_stages)
    events(Finished("run", str(workspace.output)))
    return result


def _affordable(inputs: Inputs, options: RunOptions, workspace: Workspace, events: Listener) -> Inputs:
    """The inputs again, or ResourceError; the plan's notices are told."""
    for notice in inputs.plan.notices:
        events(Notice(notice))
    used_bytes = workspace.used_bytes()
    require_room(inputs.plan, workspace.output, used_bytes=used_bytes, memory_bytes=options.max_memory_bytes)
    return inputs


def _with_adapter(inputs: Inputs, workspace: Workspace, journal: Journal, events: Listener) -> Inputs:
    """The inputs with the adapter merged into a model that lies in a folder; the inputs themselves without one."""
    from compress.core.merged import MergedCheckpoint, write_merged

    if not isinstance(inputs.original, MergedCheckpoint):
        return inputs
    return replace(inputs, original=write_merged(inputs.original, workspace.merged, journal, events))


def _measure_speed(
    inputs: Inputs, options: RunOptions, workspace: Workspace, journal: Journal, events: Listener
) -> None:
    """Record how fast original and artifact are side by side, if the recipe asks: for the report, since another machine
    would say something else."""
    evaluation = inputs.located.evaluate
    asked = evaluation.speed if evaluation is not None and options.evaluate else None
    if evaluation is None or asked is None or journal.last("speed") is not None:
        return
    from compress.benchmark import Asked, benchmark

    found = []
    for batch in asked.batches:
        result = benchmark(
            workspace.output,
            Asked(batch, str(asked.prompt_tokens), str(asked.output_tokens), seed=evaluation.seed),
            against=inputs.original.folder,
            numerics=evaluation.numerics,
            device=options.device,
            rounds=asked.rounds,
            events=events,
        )
        rates = {model["role"]: model["figures"]["generated_tokens_per_second"] for model in result["models"]}
        first = {model["role"]: model["figures"]["first_token"]["p50"] for model in result["models"]}
        packings = result["models"][0]["packings"]
        found.append({"batch": batch, "tokens_per_second": rates, "first_token_seconds": first, "packings": packings})
    journal.add("speed", {"asked": asked.model_dump(mode="json"), "numerics": evaluation.numerics, "found": found})


def _report(inputs: Inputs, workspace: Workspace, journal: Journal) -> RunResult:
    """Write run.json and what is rendered from it beside the published artifact."""
    from compress.core.checkpoint import Checkpoint
    from compress.evaluate.gate import check_gate
    from compress.report import write_report

    facts = artifact_facts(inputs, Checkpoint.open(workspace.output), journal)
    facts["artifact"] |= {"path": str(workspace.output), "file_bytes": workspace.output_bytes()}
    gate = inputs.recipe.gate
    failures = check_gate(gate, facts["evaluation"], {"bytes": facts["artifact"]["file_bytes"]})
    summary = run_json(facts, inputs.plan, journal, gate=gate, failures=failures)
    make_folder(workspace.report)
    atomic_write(workspace.report / "run.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_report(summary, workspace.report)
    return RunResult(workspace.output, workspace.report, summary, failures)
