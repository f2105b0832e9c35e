"""What pydantic found, in a person's words: path, what is wrong, what was probably meant."""

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.core.methods import suggestion
from compress.core.positions import NodePath, Problem, nested

_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "unknown key",
    "string_type": "should be text",
    "string_too_short": "must not be empty",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be a mapping of keys to values",
    "model_type": "should be a mapping of keys to values",
    "too_short": "must not be empty",
}
_BOUNDS = {"greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "more than")}
_BOUNDS |= {"less_than_equal": ("le", "at most"), "less_than": ("lt", "less than")}
_WITHOUT_VALUE = {"missing", "extra_forbidden", "string_too_short", "too_short"}
_SHOWN = 40


def problems_of(
    error: ValidationError, data: Any, prefix: NodePath, model: type[BaseModel], *others: str
) -> list[Problem]:
    """One Problem for each thing that pydantic refused in `data`, which stands at `prefix` of the recipe.

    `others` are keys that are allowed at the top of `data` besides the fields of `model`.
    """
    problems = []
    for entry in error.errors(include_url=False):
        if entry["type"] == "default_factory_not_called":
            continue
        path = _known_part(entry["loc"], data, entry["type"])
        known = sorted({*known_keys(model, path[:-1]), *(others if len(path) == 1 else ())})
        problems.append(_problem(entry, prefix, path, known))
    return problems


def _problem(entry: Any, prefix: NodePath, path: NodePath, known: list[str]) -> Problem:
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        hint = suggestion(str(path[-1]), known) or (f"known keys: {', '.join(known)}" if known else None)
        return Problem((*prefix, *path), _WORDS[kind], hint, at_key=True)
    if kind == "missing":
        return Problem((*prefix, *path), _WORDS[kind], missing=True)
    words, hint = _words_of(kind, entry, context)
    value = "" if kind in _WITHOUT_VALUE or kind == "value_error" else f", not {shown(entry['input'])}"
    return Problem((*prefix, *path), words + value, hint)


def _words_of(kind: str, entry: Any, context: dict[str, Any]) -> tuple[str, str | None]:
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"should be {words} {context[key]:g}", None
    if kind in ("literal_error", "enum"):
        choices = _choices(context["expected"])
        meant = suggestion(str(entry["input"]), choices)
        return f"should be {_either(choices)}", meant
    if kind == "string_pattern_mismatch":
        return f"should match {context['pattern']}", None
    if kind == "value_error":
        return str(context["error"]), None
    if kind in _WORDS:
        return _WORDS[kind], None
    message = entry["msg"].removeprefix("Input ")
    return message[:1].lower() + message[1:], None


def _choices(expected: str) -> list[str]:
    """pydantic writes "'auto', True or False"; a recipe says auto, true, false."""
    parts = expected.replace(" or ", ", ").split(", ")
    return [{"True": "true", "False": "false"}.get(part, part.strip("'")) for part in parts]


def _either(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def shown(value: Any) -> str:
    """A value as a recipe writes it, short and on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _known_part(location: tuple[Any, ...], data: Any, kind: str) -> NodePath:
    """The part of pydantic's location that exists in the data; it also names union members and validators."""
    path: NodePath = ()
    for part in location:
        if nested(data, (*path, part), default=...) is not ...:
            path = (*path, part)
        elif kind == "missing" and part == location[-1]:
            return (*path, part)
    return path


def known_keys(model: type[BaseModel], path: NodePath) -> set[str]:
    """Keys that a recipe may use at `path` below `model`; empty where anything goes."""
    models = {model}
    for part in path:
        models = {
            found
            for current in models
            if isinstance(part, str) and part in current.model_fields
            for found in _models_in(current.model_fields[part].annotation)
        } or (models if isinstance(part, int) else set())
    return {name for current in models for name in current.model_fields}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, dict, typing.Annotated):
        return {found for part in typing.get_args(annotation) for found in _models_in(part)}
    return set()
