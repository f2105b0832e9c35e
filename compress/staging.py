"""From the last stage's folder to a complete artifact in the partial folder: export, verify, evaluate, describe."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import compress
from compress.core.errors import ArtifactError, InputError
from compress.core.events import Finished, Listener, Started
from compress.core.files import Written, atomic_write, sha256_file, written_file
from compress.core.journal import Journal
from compress.core.manifest import MANIFEST_NAME, FileRecord, Manifest
from compress.core.model_files import KV_CACHE_KEY
from compress.export import coverage, export, rewrite
from compress.facts import artifact_facts, lineage
from compress.inputs import Inputs, RunOptions
from compress.peak_memory import PeakMemory
from compress.scoring import score
from compress.stages import calibration_behind
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Evaluation


def stage_artifact(
    last: Checkpoint, inputs: Inputs, options: RunOptions, workspace: Workspace, journal: Journal, events: Listener
) -> None:
    """Build the artifact in `workspace.staged` and record it as ready. Measurements that the journal has are kept."""
    from compress.core.checkpoint import Checkpoint

    recorded = {name: Written(**written) for name, written in (journal.last("stage") or {})["files"].items()}
    format = inputs.recipe.export.format
    if format == inputs.recipe.stage_format:
        files = export(last.folder, recorded, workspace.staged, inputs.original, rounds=last.kind != "quantized")
    else:
        files = rewrite(last, workspace.staged, format)
    artifact = Checkpoint.open(workspace.staged)
    _require_verified(artifact, inputs, events)
    evaluation = _evaluation(artifact, inputs, options, workspace, journal, events)
    for name, text in _texts(artifact, inputs, journal, evaluation).items():
        atomic_write(workspace.staged / name, text)
        files[name] = written_file(workspace.staged / name)
    manifest = _manifest(artifact, inputs, journal, files, (evaluation or {}).get("parity"))
    atomic_write(workspace.staged / MANIFEST_NAME, manifest.text())
    journal.add("ready", {"manifest_sha256": sha256_file(workspace.staged / MANIFEST_NAME)})


def _require_verified(artifact: Checkpoint, inputs: Inputs, events: Listener) -> None:
    """ArtifactError unless the staged folder is sound and, where only quantization lies between, like its source."""
    from compress.core.verify import verify

    events(Started("verify", 1, "artifact"))
    settings = [stage.settings for stage in inputs.recipe.stages if stage.kind != "kv_cache"]  # leaves weights alone
    if all(method.gives == "quantized" and not method.transforms for method in settings):
        report = verify(artifact.folder, source=inputs.original.folder, level="coverage", library=True)
    else:
        report = verify(artifact.folder, level="integrity", library=True)
    failed = [check for check in report.checks if not check.ok]
    if failed:
        raise ArtifactError(
            f"the result does not pass verification and is not published: {failed[0].name}: {failed[0].detail}",
            where=str(artifact.folder),
        )
    events(Finished("verify", f"{len(report.checks)} checks"))


def _evaluation(
    artifact: Checkpoint,
    inputs: Inputs,
    options: RunOptions,
    workspace: Workspace,
    journal: Journal,
    events: Listener,
) -> dict[str, Any] | None:
    asked = inputs.located.evaluate
    if asked is None or not options.evaluate or not asked.measures_quality:
        return None
    done = journal.last("evaluation")
    if done is not None:
        return done["result"]
    events(Started("evaluate", 1, "artifact"))
    started = time.monotonic()
    with PeakMemory() as memory:
        result = score(artifact, asked, inputs, options, workspace, events)
        result["parity"] = _parity(artifact, asked, inputs, options, journal, events)
    seconds = round(time.monotonic() - started, 3)
    journal.add("evaluation", {"result": result, "seconds": seconds, "peak_memory_bytes": memory.peak_bytes})
    events(Finished("evaluate"))
    return result


def _parity(
    artifact: Checkpoint, asked: Evaluation, inputs: Inputs, options: RunOptions, journal: Journal, events: Listener
) -> dict[str, Any] | None:
    """How the runtime compares with transformers, where the artifact was scored through it."""
    if asked.through != "runtime":
        return None
    from compress.evaluate.parity import measure_parity

    try:
        stages = len(inputs.recipe.stages)
        tokens = calibration_behind(stages, artifact, inputs, journal, offline=options.offline)
    except InputError:  # ids of tokens that are gone: others do as well
        tokens = None
    return measure_parity(
        artifact,
        tokens,
        asked,
        base_folder=inputs.recipe.base_folder,
        device=options.device,
        offline=options.offline,
        events=events,
    )


def _texts(
    artifact: Checkpoint, inputs: Inputs, journal: Journal, evaluation: Mapping[str, Any] | None
) -> dict[str, str]:
    """The files that describe the artifact, by name."""
    from compress.card import model_card
    from compress.core.recipe_text import recipe_yaml

    texts = {"recipe.yaml": recipe_yaml(inputs.recipe)}
    if evaluation is not None:
        texts["evaluation.json"] = json.dumps(evaluation, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    texts["README.md"] = model_card(artifact_facts(inputs, artifact, journal))
    return texts


def _manifest(
    artifact: Checkpoint,
    inputs: Inputs,
    journal: Journal,
    files: Mapping[str, Written],
    parity: dict[str, Any] | None,
) -> Manifest:
    quantized = {module: scheme.name for module, scheme in artifact.schemes.items()}
    transforms = ["adapter"] if inputs.adapter else []
    transforms += [name for stage in inputs.recipe.stages for name in stage.settings.transforms]
    return Manifest(
        version=compress.__version__,
        files=tuple(FileRecord(name, written.bytes, written.sha256) for name, written in files.items()),
        recipe=inputs.recipe.model_dump(mode="json"),
        fingerprint=journal.fingerprint,
        lineage=lineage(inputs.base, inputs.adapter),
        coverage=coverage(inputs.base, artifact, quantized, transforms),
        kv_cache=artifact.config.get(KV_CACHE_KEY),
        parity=parity,
        stages=[
            {
                "kind": stage.kind,
                "method": stage.method,
                "blocks": [data["record"] for data in journal.of("block") if data["stage"] == number],
            }
            for number, stage in enumerate(inputs.recipe.stages)
        ],
    )
