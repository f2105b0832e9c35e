"""Stages of a recipe: a list of one-key mappings, each checked by the Pass of its method.

`steps` stands for its stages several times, each method doing its part; only plain stages leave this file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, ValidationError

from compress.core.errors import UsageError
from compress.core.methods import FOLDERS, ONE_PASS, available_kinds, find_pass, suggestion
from compress.core.passes import Pass
from compress.core.positions import NodePath, Problem
from compress.core.recipe_sections import Section
from compress.core.recipe_words import problems_of, shown

MAX_STAGES = 32
STEPS = "steps"

Kind = Literal["prune", "distill", "quantize", "kv_cache"]


@dataclass(frozen=True, slots=True)
class ReadStage:
    """One stage, and where it stands in the recipe: one of `steps` stands there once and is several stages."""

    kind: Kind
    method: str
    settings: Pass
    path: NodePath


class Steps(Section):
    """These stages one after the other, `count` times: each prune stage does its part of its target every time."""

    count: int = Field(ge=1, le=MAX_STAGES, description="how many times")
    stages: tuple[Any, ...] = Field(min_length=1, description="at least one of them prunes")


def read_stages(data: dict[str, Any], allow_code: tuple[str, ...]) -> tuple[list[ReadStage], list[Problem]]:
    """The stages, those of `steps` written out, and what is wrong with the others."""
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
        read = _read_steps if isinstance(entry, dict) and list(entry) == [STEPS] else _read_one
        found, wrong = read(entry, (*path, index), allow_code)
        stages += found
        problems += wrong
    if len(stages) > MAX_STAGES:
        problems.append(Problem(path, f"has {len(stages)} stages with all steps, more than {MAX_STAGES}"))
    return stages, problems


def _read_one(entry: Any, path: NodePath, allow_code: tuple[str, ...]) -> tuple[list[ReadStage], list[Problem]]:
    stage, problems = _read_stage(entry, path, allow_code)
    return [stage] if stage else [], problems


def _read_steps(
    entry: dict[str, Any], path: NodePath, allow_code: tuple[str, ...]
) -> tuple[list[ReadStage], list[Problem]]:
    path, data = (*path, STEPS), entry[STEPS]
    if not isinstance(data, dict):
        hint = "for example steps: {count: 3, stages: […]}"
        return [], [Problem(path, f"should be a mapping of count and stages, not {shown(data)}", hint)]
    try:
        steps = Steps.model_validate_json(json.dumps(data))
    except ValidationError as error:
        return [], problems_of(error, data, path, Steps)
    if steps.count * len(steps.stages) > MAX_STAGES:
        message = f"are {steps.count * len(steps.stages)} stages, more than {MAX_STAGES}"
        return [], [Problem(path, message, at_key=True)]
    stages, problems = [], []
    for index, inner in enumerate(steps.stages):
        here = (*path, "stages", index)
        if isinstance(inner, dict) and STEPS in inner:
            problems.append(Problem((*here, STEPS), "steps cannot stand inside of steps", at_key=True))
            continue
        found, wrong = _read_one(inner, here, allow_code)
        stages += found
        problems += wrong
    if problems:
        return [], problems
    if not any(stage.kind == "prune" for stage in stages):
        return [], [Problem(path, "has no prune stage: there is nothing to do in steps", at_key=True)]
    return list(_written_out(stages, steps.count)), []


def _written_out(stages: list[ReadStage], count: int) -> Iterator[ReadStage]:
    for number in range(1, count + 1):
        for stage in stages:
            yield replace(stage, settings=stage.settings.part(number, count))


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
    method = settings.get("method", kind if kind in ONE_PASS else None)
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
        return ReadStage(found.kind, method, found.model_validate_json(json.dumps(options)), path), []
    except ValidationError as error:
        return None, problems_of(error, settings, path, found, "method")


def _described(entry: Any) -> str:
    if isinstance(entry, dict):
        return f"{len(entry)} keys ({', '.join(list(entry)[:4])})" if entry else "an empty mapping"
    return shown(entry)


def _meant(kind: str) -> str | None:
    return suggestion(kind, [*FOLDERS, STEPS])


def _example() -> str:
    for kind, methods in available_kinds().items():
        return f"{kind}: {{method: {methods[0]}}}"
    return "quantize: {method: …}"


def _example_kinds() -> str:
    return "; ".join(f"{kind} ({', '.join(methods)})" for kind, methods in available_kinds().items()) or "none yet"
