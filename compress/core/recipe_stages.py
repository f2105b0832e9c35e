"""Stages of a recipe: a list of one-key mappings, each checked by the Pass of its method."""

import json
from typing import Any, Literal

from pydantic import ValidationError

from compress.core.errors import UsageError
from compress.core.methods import FOLDERS, available_kinds, find_pass, suggestion
from compress.core.passes import Pass
from compress.core.positions import NodePath, Problem
from compress.core.recipe_words import problems_of, shown

MAX_STAGES = 32

Kind = Literal["prune", "distill", "quantize", "kv_cache"]
ReadStage = tuple[Kind, str, Pass]


def read_stages(data: dict[str, Any], allow_code: tuple[str, ...]) -> tuple[list[ReadStage], list[Problem]]:
    """(kind, method, settings) of each stage, and what is wrong with the others."""
    raw = data.get("stages")
    path: NodePath = ("stages",)
    if raw is None or raw == []:
        hint = "for example - quantize: {method: gptq, scheme: w4a16}"
        return [], [Problem(path, "no stages: a recipe needs at least one", hint, missing=True)]
    if not isinstance(raw, list):
        return [], [Problem(path, f"should be a list, not {shown(raw)}", "start each stage with a dash")]
    if len(raw) > MAX_STAGES:
        return [], [Problem(path, f"has {len(raw)} stages, more than {MAX_STAGES}")]
    stages, problems = [], []
    for index, entry in enumerate(raw):
        stage, found = _read_stage(entry, (*path, index), allow_code)
        problems += found
        if stage:
            stages.append(stage)
    return stages, problems


def _read_stage(entry: Any, path: NodePath, allow_code: tuple[str, ...]) -> tuple[ReadStage | None, list[Problem]]:
    if not isinstance(entry, dict) or len(entry) != 1:
        message = f"a stage is one kind with its settings, not {_described(entry)}"
        return None, [Problem(path, message, f"for example - {_example()}")]
    kind, settings = next(iter(entry.items()))
    here = (*path, kind)
    if kind not in FOLDERS:
        return None, [
            Problem(here, f"unknown kind of stage: there are {', '.join(FOLDERS)}", _meant(kind), at_key=True)
        ]
    if not available_kinds().get(kind):
        return None, [Problem(here, f"this version has no {kind} stages; it has {_example_kinds()}", at_key=True)]
    if not isinstance(settings, dict):
        return None, [
            Problem(here, f"should be a mapping of settings, not {shown(settings)}", f"for example {_example()}")
        ]
    return _read_settings(kind, settings, here, allow_code)


def _read_settings(
    kind: str, settings: dict[str, Any], path: NodePath, allow_code: tuple[str, ...]
) -> tuple[ReadStage | None, list[Problem]]:
    method = settings.get("method")
    if method is None:
        names = ", ".join(available_kinds()[kind])
        close = [key for key in settings if suggestion(key, ["method"])]
        if close and "method" not in settings:
            return None, [Problem((*path, close[0]), "unknown key", "did you mean method?", at_key=True)]
        return None, [Problem((*path, "method"), f"is missing: there are {names}", missing=True)]
    if not isinstance(method, str):
        return None, [Problem((*path, "method"), f"should be the name of a method, not {shown(method)}")]
    try:
        found = find_pass(kind, method, allow_code)
    except UsageError as error:
        return None, [Problem((*path, "method"), error.message, error.hint)]
    options = {key: value for key, value in settings.items() if key != "method"}
    try:
        return (found.kind, method, found.model_validate_json(json.dumps(options))), []
    except ValidationError as error:
        return None, problems_of(error, settings, path, found, "method")


def _described(entry: Any) -> str:
    if isinstance(entry, dict):
        return f"{len(entry)} keys ({', '.join(list(entry)[:4])})" if entry else "an empty mapping"
    return shown(entry)


def _meant(kind: str) -> str | None:
    return suggestion(kind, [*FOLDERS, "kv_cache"])


def _example() -> str:
    for kind, methods in available_kinds().items():
        return f"{kind}: {{method: {methods[0]}}}"
    return "quantize: {method: …}"


def _example_kinds() -> str:
    return "; ".join(f"{kind} ({', '.join(methods)})" for kind, methods in available_kinds().items()) or "none yet"
