"""What is asked: model, calibration data, stages, export, evaluation and gate. A recipe names no machine and no output.

Frozen, strict and closed: a wrong type is an error and so is an unknown key. Reading one imports neither torch nor
transformers; each stage's settings are checked by the Pass of its method.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, SerializeAsAny, ValidationError, model_serializer

from compress.core.errors import RecipeError, UsageError
from compress.core.methods import ONE_PASS
from compress.core.passes import Pass
from compress.core.places import locate
from compress.core.positions import ROOT, NodePath, Problem, YamlSource
from compress.core.recipe_checks import CHECKS, apply_overrides, composition_problem, reserved_problem
from compress.core.recipe_sections import Calibration, Evaluation, Export, Gate, Perplexity, Section, Text
from compress.core.recipe_stages import Kind, read_stages
from compress.core.recipe_words import problems_of
from compress.core.yaml_source import parse_yaml, read_yaml

__all__ = [
    "Calibration",
    "Evaluation",
    "Export",
    "Gate",
    "Perplexity",
    "Recipe",
    "Stage",
    "check_recipe",
    "load_recipe",
    "parse_evaluation",
    "parse_recipe",
]


@dataclass(frozen=True)
class _Place:
    """Where a stage stands in a text. It is nothing of what the stage is: all places are equal."""

    source: YamlSource | None = field(default=None, compare=False)
    path: NodePath = field(default=(), compare=False)


class Stage(Section):
    """One step: its kind, its method, and the method's settings. Written as `- quantize: {method: gptq, bits: 4}`."""

    kind: Kind
    method: Text
    settings: SerializeAsAny[Pass]

    _place: "_Place" = PrivateAttr(default_factory=lambda: _Place())

    def refused(self, error: UsageError, number: int) -> UsageError:
        """What the method says against stage `number`, with the line of the recipe that it stands in, if that is known.
        Errors about something else than the stage's own settings stay as they are."""
        field = "" if error.where is None else error.where.removeprefix(f"{self.kind}.")
        if isinstance(error, RecipeError) or (error.where is not None and field == error.where):
            return error
        source = self._place.source
        if source is None:
            where = f"stages[{number}].{self.kind}" + (f".{field}" if field else "")
            return UsageError(error.message, where=where, hint=error.hint)
        inside = (*self._place.path, *([field] if field else []))
        return source.error(Problem(inside, error.message, error.hint, at_key=not field))

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        method = {} if self.kind in ONE_PASS else {"method": self.method}
        return {self.kind: method | self.settings.model_dump(mode="json")}


class _WithoutStages(Section):
    model: Text = Field(description="hub id or folder, or demo; --model replaces it")
    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    calibration: Calibration | None = Field(None, description="text that calibrated methods look at")
    export: Export = Field(default_factory=Export, description="how the result is stored")
    evaluate: Evaluation | None = Field(None, description="what is measured on original and artifact")
    gate: Gate | None = Field(None, description="bounds; a miss ends the command with exit code 5")


class Recipe(_WithoutStages):
    """A whole recipe. `model_dump(mode="json")` gives data that `parse_recipe` reads back to an equal recipe."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    _base_folder: Path = PrivateAttr(default_factory=Path.cwd)
    _model_folder: str | None = PrivateAttr(default=None)

    @property
    def stage_format(self) -> str:
        """The format that the last stage keeps quantized weights in."""
        found = [stage.settings.formats[0] for stage in self.stages if stage.settings.gives == "quantized"]
        return found[-1] if found else Export().format

    @property
    def base_folder(self) -> Path:
        """Where relative paths in the recipe start: the folder of its file."""
        return self._base_folder

    def located(self) -> "Recipe":
        """This recipe with every name of bundled data and every relative path that exists made an absolute path.

        For working with; the recipe as written is what gets recorded, since it is the same on every machine.
        """
        base = self._base_folder
        update: dict[str, Any] = {"model": self._model_folder or locate(self.model, "model", base)}
        if self.calibration:
            dataset = locate(self.calibration.dataset, "calibration", base)
            update["calibration"] = self.calibration.model_copy(update={"dataset": dataset})
        if self.evaluate:
            update["evaluate"] = self.evaluate.located(base)
        return self.model_copy(update=update)


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), model: str | None = None, allow_code: Sequence[str] = ()
) -> Recipe:
    """Read a recipe file. `overrides` are "stages[0].quantize.bits=3"; `model` replaces the recipe's model.

    A `model` that is a folder is recorded by its name alone, so that the record is the same wherever it lies.

    RecipeError names file, line and column, the path of the key, and the likely spelling.
    """
    return build_recipe(read_yaml(Path(path)), overrides, model, allow_code, Path(path).absolute().parent)


def parse_recipe(
    data: dict[str, Any] | str, name: str = "recipe", base_folder: Path | None = None, allow_code: Sequence[str] = ()
) -> Recipe:
    """A recipe from YAML text, or from plain data such as `Recipe.model_dump(mode="json")` gave."""
    source = parse_yaml(data, name) if isinstance(data, str) else YamlSource(name, [], data)
    return build_recipe(source, (), None, allow_code, base_folder)


def parse_evaluation(data: dict[str, Any], name: str = "evaluation") -> Evaluation:
    """An evaluation from plain data, without a recipe around it. RecipeError says what is wrong."""
    try:
        return Evaluation.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise YamlSource(name, [], data).errors(problems_of(error, data, ROOT, Evaluation))[0] from None


def build_recipe(
    source: YamlSource,
    overrides: Sequence[str] = (),
    model: str | None = None,
    allow_code: Sequence[str] = (),
    base_folder: Path | None = None,
) -> Recipe:
    """The recipe in `source`, or its first problem as a RecipeError."""
    folder = _folder(model)
    recipe, problems = check_recipe(source, overrides, folder.name if folder else model, allow_code)
    if problems or recipe is None:
        raise problems[0]
    if folder:
        recipe._model_folder = str(folder)
    if base_folder is not None:
        recipe._base_folder = base_folder
    return recipe


def _folder(model: str | None) -> Path | None:
    path = Path(os.path.abspath(Path(model).expanduser())) if model else None  # a link keeps its own name
    return path if path is not None and path.is_dir() else None


def check_recipe(
    source: YamlSource, overrides: Sequence[str] = (), model: str | None = None, allow_code: Sequence[str] = ()
) -> tuple[Recipe | None, list[RecipeError]]:
    """The recipe if it is sound, else None, and all its problems in the order of the file."""
    apply_overrides(source, overrides, model)
    data = source.data
    if not isinstance(data, dict):
        what = "is empty" if data is None else "should be a mapping of keys to values"
        return None, source.errors([Problem(ROOT, f"the recipe {what}", "start with model: and stages:")])
    reserved = reserved_problem(data)
    if reserved:
        return None, source.errors([reserved])
    stages, problems = read_stages(data, tuple(allow_code))
    rest = {key: value for key, value in data.items() if key != "stages"}
    try:
        shell = _WithoutStages.model_validate_json(json.dumps(rest))
    except ValidationError as error:
        return None, source.errors(problems + problems_of(error, data, ROOT, _WithoutStages, "stages"))
    if problems:
        return None, source.errors(problems)
    fields = {name: getattr(shell, name) for name in shell.model_fields_set}
    recipe = Recipe(stages=tuple(Stage(kind=s.kind, method=s.method, settings=s.settings) for s in stages), **fields)
    for stage, read in zip(recipe.stages, stages, strict=True):
        stage._place = _Place(source, read.path)
    if "format" not in recipe.export.model_fields_set:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"format": recipe.stage_format})})
    found = [composition_problem(recipe, [stage.path for stage in stages]), *(check(recipe) for check in CHECKS)]
    problems = [problem for problem in found if problem]
    return (None if problems else recipe), source.errors(problems)
