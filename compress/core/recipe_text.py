"""A recipe as text: the resolved YAML that an artifact carries, and the JSON schema that editors read."""

from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from compress.core.methods import ONE_PASS, available_kinds, find_pass
from compress.core.recipe import Recipe
from compress.core.recipe_stages import STEPS, Steps

_ORDER = ("model", "revision", "calibration", "stages", "export", "evaluate", "gate")


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with all its defaults, as YAML that `load_recipe` reads back. Equal recipes give equal text."""
    data = recipe.model_dump(mode="json")
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    stream = StringIO()
    yaml.dump(_without_nothing({key: data[key] for key in _ORDER}), stream)
    return stream.getvalue()


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def recipe_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a recipe: `oneOf` the methods of each kind, each with its own settings."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    definitions.pop("Pass", None)
    kinds = {kind: _kind_schema(kind, methods, definitions) for kind, methods in available_kinds().items()}
    definitions["Stage"] = {"oneOf": [_stage_schema(kind, settings) for kind, settings in kinds.items()]}
    schema["properties"]["stages"] = {
        "type": "array",
        "minItems": 1,
        "description": "what is done to the model, in this order",
        "items": {"oneOf": [{"$ref": "#/$defs/Stage"}, _stage_schema(STEPS, _steps_schema())]},
    }
    schema["properties"] = {key: schema["properties"][key] for key in _ORDER}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "compress recipe"}


def _stage_schema(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {kind: settings}, "required": [kind], "additionalProperties": False}


def _steps_schema() -> dict[str, Any]:
    schema = Steps.model_json_schema()
    schema["properties"]["stages"]["items"] = {"$ref": "#/$defs/Stage"}
    return schema


def _kind_schema(kind: str, methods: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    return {"oneOf": [_method_schema(kind, method, definitions) for method in methods]}


def _method_schema(kind: str, method: str, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = find_pass(kind, method).model_json_schema()
    definitions.update(schema.pop("$defs", {}))
    properties = {"method": {"const": method, "type": "string"}, **schema.get("properties", {})}
    named = [] if kind in ONE_PASS else ["method"]
    return {**schema, "properties": properties, "required": [*named, *schema.get("required", [])]}
