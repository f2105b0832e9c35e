"""Facts of a run as plain data: first those that its inputs decide (the model card's), then run.json with the measured.

`artifact_facts` holds no time, host, path or memory figure, so that files of the artifact may be made from it.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.passes import LayerPlan
from compress.core.sizes import EXAMPLES_NOTICE, UNEVEN_NOTICE, sizes_of, widths_of
from compress.planning import RunPlan

if TYPE_CHECKING:
    from compress.core.adapter import Adapter
    from compress.core.checkpoint import Checkpoint
    from compress.core.journal import Journal
    from compress.core.recipe import Gate
    from compress.inputs import Inputs

RUN_SCHEMA_VERSION = 1
DENSE = "dense"  # instead of a format, where nothing is quantized
_LICENCE = re.compile(r"^license:\s*[\"']?([\w.+-]+)", re.MULTILINE)


def lineage(original: Checkpoint, adapter: Adapter | None = None) -> dict[str, Any]:
    """Where the artifact comes from: id and commit, sizes, hashes of every file that was read, licence; the adapter
    that was merged first."""
    found = {
        "source": original.source.id,
        "revision": original.source.revision,
        "bytes": sum(info.bytes for info in original.tensors.values()),
        "parameters": sum(math.prod(info.shape) for info in original.tensors.values()),
        "sha256": original.sha256(),
        "licence": licence(original.folder),
    }
    return found if adapter is None else found | {"adapter": adapter.record()}


def licence(folder: Path) -> str | None:
    """The licence that the model's card states in its front matter, None if it states none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    found = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found[1] if found else None


def artifact_facts(inputs: Inputs, artifact: Checkpoint, journal: Journal) -> dict[str, Any]:
    """What the inputs decide: recipe, source, sizes, what was done to each layer, evaluation, fallbacks, lineage."""
    recipe, original, plan = inputs.recipe, inputs.original, inputs.plan
    origin = lineage(inputs.base, inputs.adapter)
    bytes_out = sum(info.bytes for info in artifact.tensors.values())
    parameters = _parameters(artifact)
    blocks = [_blocks(journal, number) for number in range(len(recipe.stages))]
    evaluation = (journal.last("evaluation") or {}).get("result")
    return {
        "schema_version": RUN_SCHEMA_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "source": {
            "id": origin["source"],
            **{key: origin[key] for key in ("revision", "bytes", "parameters")},
            "sizes": sizes_of(original.config),
        },
        "artifact": {
            "bytes": bytes_out,
            "sizes": sizes_of(artifact.config),
            "parameters": parameters,
            "bits_per_weight": round(8 * bytes_out / parameters, 4),
            "format": recipe.export.format if artifact.schemes else DENSE,
            "uneven": widths_of(artifact.config) is not None,
            **_kept(artifact),
        },
        "stages": [
            {
                "kind": stage.kind,
                "method": stage.method,
                "settings": stage.settings.model_dump(mode="json"),
                "blocks": blocks[number],
                "layers": [layer_facts(_as_done(layer, artifact)) for layer in plan.stages[number].layers],
            }
            for number, stage in enumerate(recipe.stages)
        ],
        "evaluation": evaluation,
        "notices": [*_still_true(plan.notices, artifact), *((evaluation or {}).get("notices") or [])],
        "fallbacks": list(_fallbacks(block for stage in blocks for block in stage)),
        "lineage": origin,
    }


def _still_true(notices: Iterable[str], artifact: Checkpoint) -> Iterator[str]:
    """What the plan said, without what was true of its examples alone."""
    past = {EXAMPLES_NOTICE} | ({UNEVEN_NOTICE} if widths_of(artifact.config) is None else set())
    return (notice for notice in notices if notice not in past)


def _kept(artifact: Checkpoint) -> dict[str, Any]:
    """Bytes of a token's keys and values, as the runtime would hold them in full and as the artifact keeps them, and
    what is dropped; nothing where it has no policy for them."""
    from compress.core.numerics import dtype_name, runtime_dtype
    from kv_compress._coded_pages import BLOCK
    from kv_compress._ranges import head_sizes
    from kv_compress.eviction import eviction_of
    from kv_compress.policy import FULL, KVPolicy, policy_in

    policy = policy_in(artifact.config)
    if policy is None:
        return {}
    sizes, eviction, held = head_sizes(artifact), eviction_of(policy), runtime_dtype()
    both = KVPolicy.uniform(FULL, len(sizes)), policy
    full, kept = (of.token_bytes(sizes, held.itemsize, BLOCK) for of in both)
    words = eviction and eviction.words
    found = {"full_token_bytes": full, "full_dtype": dtype_name(held), "token_bytes": kept, "eviction": words}
    return {"kv_cache": found}


def _parameters(checkpoint: Checkpoint) -> int:
    """Weights that a model has, however they are stored."""
    packed = {name for module in checkpoint.schemes for name in checkpoint.stored_names(module)}
    dense = sum(math.prod(info.shape) for name, info in checkpoint.tensors.items() if name not in packed)
    return dense + sum(math.prod(checkpoint.matrix_shape(module)) for module in checkpoint.schemes)


def _as_done(layer: LayerPlan, artifact: Checkpoint) -> LayerPlan:
    """A planned layer whose scheme was open, as the artifact has it."""
    scheme = artifact.schemes.get(layer.name) if layer.alternatives else None
    if scheme is None:
        return layer
    size = sum(artifact.tensors[name].bytes for name in artifact.stored_names(layer.name))
    return replace(layer, scheme=scheme, bytes_out=size, reason="")


def layer_facts(layer: LayerPlan) -> dict[str, Any]:
    """One layer of a plan as plain data."""
    return {
        "name": layer.name,
        "bits": layer.scheme.bits if layer.scheme else None,
        "group_size": layer.scheme.group_size if layer.scheme else None,
        "symmetric": layer.scheme.symmetric if layer.scheme else None,
        "scheme": layer.scheme.name if layer.scheme else None,
        "sparsity": layer.sparsity,
        "shape": list(layer.shape),
        "becomes": list(layer.becomes) if layer.becomes else None,
        "bytes_in": layer.bytes_in,
        "bytes_out": layer.bytes_out,
        "reason": layer.reason,
    }


def _blocks(journal: Journal, stage: int) -> list[dict[str, Any]]:
    return [data["record"] for data in journal.of("block") if data["stage"] == stage]


def _fallbacks(blocks: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for block in blocks:
        for site in block["sites"]:
            if site["fallback"] or site["retries"]:
                reason = site["fallback"] or f"damping was raised {_times(site['retries'])}, to {site['damping']:g}"
                yield {"where": site["name"], "reason": reason}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def run_json(
    facts: Mapping[str, Any], plan: RunPlan, journal: Journal, *, gate: Gate | None, failures: list[str]
) -> dict[str, Any]:
    """The content of run.json: the facts (with path and file_bytes of the artifact), and what this machine took."""
    stages = [{**stage, **_measured(journal, number)} for number, stage in enumerate(facts["stages"])]
    evaluation = journal.last("evaluation") or {}
    if len(stages) > 1 and stages[-2]["worth"] is not None:
        stages[-1]["worth"] = {key: facts["evaluation"][key] for key in ("perplexity", "bits_per_byte", "kl")}
    seconds = sum(stage["seconds"] for stage in stages) + evaluation.get("seconds", 0.0)
    peaks = [stage["peak_memory_bytes"] for stage in stages] + [evaluation.get("peak_memory_bytes", 0)]
    return {
        **facts,
        "stages": stages,
        "plan": {
            "bytes": plan.bytes_out,
            "artifact_bytes": plan.artifact_bytes,
            "peak_memory_bytes": plan.peak_memory_bytes,
            "disk_bytes": plan.disk_bytes,
            "minutes": plan.minutes,
        },
        "measured": {
            "bytes": facts["artifact"]["bytes"],
            "artifact_bytes": facts["artifact"]["file_bytes"],
            "peak_memory_bytes": max(peaks),
            "minutes": seconds / 60,
        },
        "speed": journal.last("speed"),
        "environment": environment(),
        "gate": {"asked": gate.model_dump(mode="json") if gate else None, "failures": failures},
    }


def _measured(journal: Journal, stage: int) -> dict[str, Any]:
    """Seconds and peak memory of a stage, over all processes that worked on it, if it was resumed; the losses of one
    that trained, with what else each step measured; what the model was worth behind it, where that was measured."""
    units = [*journal.of("block"), *journal.of("save"), *journal.of("stage")]
    peaks = [data["peak_memory_bytes"] for data in journal.of("memory") if data["stage"] == stage]
    trained = next((data["data"] for data in _of_stage(journal, "save", stage)), {})
    return {
        "seconds": sum(data["seconds"] for data in units if data["stage"] == stage),
        "peak_memory_bytes": max(peaks, default=0),
        "losses": trained.get("losses"),
        "figures": trained.get("figures") or None,
        "worth": next((data for data in _of_stage(journal, "worth", stage)), None),
    }


def _of_stage(journal: Journal, what: str, stage: int) -> Iterator[dict[str, Any]]:
    """What the journal says of a stage, the newest first."""
    return (data for data in reversed(list(journal.of(what))) if data["stage"] == stage)


def environment() -> dict[str, Any]:
    """The machine and the versions, for the report."""
    import torch

    return {
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
