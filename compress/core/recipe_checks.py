"""What a recipe must be beyond its types: overrides, reserved words, stages that fit together, gates measured."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.core.errors import RecipeError
from compress.core.positions import NodePath, Problem, YamlSource, dotted, nested
from compress.core.yaml_source import parse_value

if TYPE_CHECKING:
    from compress.core.recipe import Recipe

_STEP = re.compile(r"(?:^|\.)([A-Za-z_][A-Za-z0-9_-]*)|\[([0-9]{1,4})\]")


def apply_overrides(source: YamlSource, overrides: Sequence[str], named: Mapping[str, str | None]) -> None:
    """Put `--set path=value`, `--model` and `--adapter` into the data; where they came from is remembered."""
    for text in overrides:
        _apply(source, text)
    for key, value in named.items():
        if value is not None and isinstance(source.data, dict):
            source.data[key] = value
            source.overrides[(key,)] = f"--{key}"


def _apply(source: YamlSource, text: str) -> None:
    label = f"--set {text}"
    target, equals, value = text.partition("=")
    path = _parse_path(target.strip())
    if not equals or not path:
        raise RecipeError("should look like stages[0].quantize.bits=3", where=label)
    parent = source.data
    for depth, step in enumerate(path[:-1]):
        child = _child(parent, step, path[: depth + 1], label)
        if child is None:
            child = {}
            _put(parent, step, child)
            source.overrides[path[: depth + 1]] = label
        parent = child
    _child(parent, path[-1], path, label)
    _put(parent, path[-1], parse_value(value, label))
    source.overrides[path] = label


def _parse_path(target: str) -> NodePath:
    path: list[str | int] = []
    end = 0
    while end < len(target):
        match = _STEP.match(target, end)
        if match is None:
            return ()
        path.append(match[1] if match[1] is not None else int(match[2]))
        end = match.end()
    return tuple(path)


def _child(parent: Any, step: str | int, path: NodePath, label: str) -> Any:
    """The value at one step; None where a mapping lacks it. RecipeError where the recipe has no such place."""
    if isinstance(step, int):
        if not isinstance(parent, list) or step >= len(parent):
            count = len(parent) if isinstance(parent, list) else 0
            raise RecipeError(f"there is no entry [{step}]: the recipe has {count} there", where=label)
        return parent[step]
    if not isinstance(parent, dict):
        hint = "entries of a list are written stages[0]" if isinstance(parent, list) else None
        raise RecipeError(f"the recipe has no mapping that could hold {step!r}", where=label, hint=hint)
    if len(path) == 3 and path[0] == "stages" and step not in parent:
        kinds = ", ".join(parent)
        raise RecipeError(f"stages[{path[1]}] is not a {step} stage", where=label, hint=f"it is {kinds}")
    return parent.get(step)


def _put(parent: Any, step: str | int, value: Any) -> None:
    parent[step] = value


def reserved_problem(data: dict[str, Any]) -> Problem | None:
    """Words that mean something to come: refused by name, so that nobody believes that they work."""
    if "budget" in data:
        return Problem(
            ("budget",), "reserved for a later version, which will search settings for a budget", at_key=True
        )
    if nested(data, ("evaluate", "through")) == "transformers" and nested(data, ("evaluate", "numerics")) == "exact":
        return Problem(("evaluate", "numerics"), "is of the runtime: with through: transformers nothing would heed it")
    return None


def composition_problem(recipe: "Recipe", places: Sequence[NodePath]) -> Problem | None:
    """A stage that does not take what the one before it gives, or lacks its calibration data. `places`: where each
    stage stands."""
    state, left_by = "dense", "the model's"
    for number, (stage, path) in enumerate(zip(recipe.stages, places, strict=True)):
        settings = stage.settings
        if number and recipe.stages[number - 1].kind == "kv_cache":
            message = "stands behind kv_cache, which comes once and last: it says of the finished model what to keep"
            return Problem(path, message, at_key=True)
        refusal = settings.refusal(state)
        if refusal:
            hint = "put this stage before that one" if stage.kind == "prune" and number else None
            return Problem(path, f"{stage.method} {refusal}, but {left_by} are {state}", hint, at_key=True)
        if settings.calibrated and recipe.calibration is None:
            message = f"{stage.method} needs calibration data"
            return Problem(path, message, "add calibration: {dataset: …}", at_key=True)
        if settings.samples is not None and not settings.calibrated:
            message = f"{stage.method} looks at no calibration text"
            return Problem((*path, "samples"), message, "leave it out", at_key=True)
        if settings.gives is not None:
            state, left_by = settings.gives, f"those that {dotted(path[:-1])} leaves"
    return None


def gate_problem(recipe: "Recipe") -> Problem | None:
    """A gate whose measurement the recipe does not ask for."""
    gate, evaluate = recipe.gate, recipe.evaluate
    if gate is None:
        return None
    needs_text = ("max_perplexity_increase", "max_perplexity", "max_kl", "max_flip_rate")
    for name in needs_text:
        if getattr(gate, name) is not None and (evaluate is None or evaluate.perplexity is None):
            return Problem(
                ("gate", name), "needs a measurement", "add evaluate: {perplexity: {dataset: …}}", at_key=True
            )
    if gate.max_refusal_change is not None and (evaluate is None or evaluate.refusals is None):
        return Problem(
            ("gate", "max_refusal_change"), "needs a measurement", "add evaluate: {refusals: {}}", at_key=True
        )
    if gate.max_recall_drop is not None and (evaluate is None or evaluate.long_context is None):
        return Problem(
            ("gate", "max_recall_drop"), "needs a measurement", "add evaluate: {long_context: {}}", at_key=True
        )
    tasks = evaluate.tasks if evaluate else ()
    if gate.max_accuracy_drop is not None and not tasks:
        return Problem(("gate", "max_accuracy_drop"), "needs a measurement", "add evaluate: {tasks: […]}", at_key=True)
    for task in gate.min_accuracy:
        if task not in tasks:
            message = f"needs a measurement: evaluate.tasks has no {task!r}"
            return Problem(("gate", "min_accuracy", task), message, at_key=True)
    return None


def evaluation_problem(recipe: "Recipe") -> Problem | None:
    """An evaluation that measures nothing, or in strides that skip tokens."""
    evaluate = recipe.evaluate
    if evaluate is None:
        return None
    if not evaluate.measures_quality and evaluate.speed is None:
        return Problem(("evaluate",), "measures nothing", "add perplexity: {dataset: …} or tasks: […]", at_key=True)
    if evaluate.long_context is not None and evaluate.through == "transformers":
        return Problem(("evaluate", "long_context"), "is answered through the runtime alone", at_key=True)
    if evaluate.stages and evaluate.perplexity is None:
        return Problem(("evaluate", "stages"), "needs a text", "add perplexity: {dataset: …}")
    text = evaluate.perplexity
    if text is not None and text.stride is not None and text.stride > text.window:
        message = f"should be at most the window of {text.window}, not {text.stride}: tokens would be skipped"
        return Problem(("evaluate", "perplexity", "stride"), message)
    return None


def export_problem(recipe: "Recipe") -> Problem | None:
    """A format for quantized weights, and no stage that quantizes; or one that makes what the format does not hold."""
    last = next((stage for stage in reversed(recipe.stages) if stage.settings.gives), None)
    state = last.settings.gives if last else "dense"
    format = recipe.export.format
    if last is not None and state == "quantized" and format not in last.settings.formats:
        message = f"{format} does not hold the weights that {last.method} makes"
        return Problem(("export", "format"), message, f"these do: {', '.join(last.settings.formats)}")
    if format == "compressed-tensors" or state == "quantized":
        return None
    message = f"{format} holds quantized weights, but the stages leave them {state}"
    return Problem(("export", "format"), message, "add a quantize stage")


CHECKS = (export_problem, evaluation_problem, gate_problem)
