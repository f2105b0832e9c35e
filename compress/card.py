"""Model card: the README.md of an artifact, for people and for the hub. Equal facts give equal text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import compress
from compress.core.scheme import Scheme
from compress.facts import DENSE
from compress.report.data import as_yaml, model_name, protocol_lines, read_files, summary
from compress.report.escape import visible
from compress.report.figures import headline
from compress.report.layers import fallback_lines
from compress.report.render import markdown_text

_PACKAGES = {"gptq": ["optimum", "gptqmodel"], "awq": ["gptqmodel"]}
_OF_THE_MACHINE = ("time of stages and evaluation", "peak memory of the run")


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of an artifact from its facts (recipe, source, artifact, stages, evaluation, fallbacks, lineage).

    No time, host, path or memory figure is in it. The figures carry their protocol; what was not run is said.
    """
    lineage, source = facts.get("lineage") or {}, facts["source"]
    format = facts["artifact"].get("format") or "compressed-tensors"
    body = markdown_text(
        "card.md.j2",
        title=f"{model_name(facts).rsplit('/', 1)[-1]}, compressed",
        source=model_name(facts),
        revision=source.get("revision"),
        licence=lineage.get("licence"),
        summary=summary(facts),
        rows=[row for row in headline(facts) if row.name not in _OF_THE_MACHINE],
        evaluated=facts.get("evaluation") is not None,
        protocol=protocol_lines(facts.get("evaluation")),
        recipe_yaml=as_yaml(facts["recipe"]),
        fallbacks=fallback_lines(facts),
        notices=facts.get("notices") or [],
        asymmetric=is_asymmetric(facts) and format == "compressed-tensors",
        format=format,
        packages=_PACKAGES.get(format, [format]),
        dense=format == DENSE,
        uneven=bool(facts["artifact"].get("uneven")),
        loaders=_loaders(facts),
        version=compress.__version__,
        hashes=read_files(lineage),
    )
    return f"---\n{_metadata(facts)}\n---\n\n{body.strip()}\n"


def _metadata(facts: Mapping[str, Any]) -> str:
    """The front matter that the hub reads, written as YAML by huggingface_hub."""
    from huggingface_hub import ModelCardData

    lineage, source = facts.get("lineage") or {}, facts["source"]
    methods = [str(stage["method"]) for stage in facts.get("stages") or []]
    tags = dict.fromkeys(["compress", str(facts["artifact"].get("format") or ""), *methods])
    quantized = any(stage["kind"] == "quantize" for stage in facts.get("stages") or [])
    data = ModelCardData(
        base_model=visible(source["id"]) if "/" in source["id"] else None,
        base_model_relation="quantized" if quantized and "/" in source["id"] else None,
        license=visible(lineage["licence"]) if lineage.get("licence") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[visible(tag) for tag in tags if tag],
    )
    return data.to_yaml().strip()


def is_asymmetric(facts: Mapping[str, Any]) -> bool:
    """Whether some stage stores zero points."""
    return any((stage.get("settings") or {}).get("symmetric") is False for stage in facts.get("stages") or [])


def _loaders(facts: Mapping[str, Any]) -> list[str]:
    """One sentence per engine: what its loader's rules make of this artifact, with version and evidence."""
    from compress.core.compatibility import as_written, preflight

    schemes, shapes = {}, {}
    for stage in facts.get("stages") or []:
        for layer in stage.get("layers") or []:
            if layer.get("bits") is not None:
                schemes[layer["name"]] = Scheme.parse(
                    layer["scheme"], group_size=layer["group_size"], symmetric=layer["symmetric"]
                )
                shapes[layer["name"]] = tuple(layer["shape"])
    format = facts["artifact"].get("format") or "compressed-tensors"
    uneven = bool(facts["artifact"].get("uneven"))
    verdicts = preflight(as_written(schemes, format), shapes, format, uneven=uneven) if schemes else []
    return [_brief(verdict.sentence) for verdict in verdicts]


def _brief(sentence: str) -> str:
    """A verdict with its first reason only, and how many more there are; its evidence stays."""
    reasons, evidence = sentence.rsplit(" (", 1)
    first, *more = reasons.split("; ")
    return f"{first}{f', and {len(more)} more reasons' if more else ''} ({evidence}"
