"""Shipped recipes are sound, their schema is current, and the commands about recipes say what they should."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from compress.cli.shipped import description, find_recipe, recipes_folder, shipped_recipes
from compress.core.errors import UsageError
from compress.core.recipe import load_recipe
from compress.core.recipe_sections import Export
from compress.core.recipe_text import recipe_schema
from compress.core.yaml_source import read_yaml

NAMES = sorted(shipped_recipes())
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether `value` fits a JSON schema: the part of JSON schema that ours uses."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for word, wanted in (("anyOf", lambda n: n > 0), ("oneOf", lambda n: n == 1)):
        if word in schema and not wanted(sum(fits(value, option, root) for option in schema[word])):
            return False
    if "type" in schema:
        right = isinstance(value, TYPES[schema["type"]])
        if not right or isinstance(value, bool) and schema["type"] in ("integer", "number"):
            return False
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        return fits_keys(value, schema, root)
    return True


def fits_keys(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", ())) <= set(value) or others is False and not set(value) <= set(known):
        return False
    return all(
        fits(item, known.get(key, others if isinstance(others, dict) else {}), root) for key, item in value.items()
    )


def test_the_shipped_recipes_are_those_of_the_readme() -> None:
    assert "demo-w4" in NAMES
    table = (recipes_folder() / "README.md").read_text()
    for name, path in shipped_recipes().items():
        assert f"[{name}]({path.relative_to(recipes_folder())})" in table


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_commented_and_has_its_modeline(name: str) -> None:
    path = shipped_recipes()[name]
    recipe = load_recipe(path)
    text = path.read_text()
    schema = "./schema.json" if path.parent == recipes_folder() else "../schema.json"
    assert text.startswith(f"# yaml-language-server: $schema={schema}\n")
    assert 20 < len(description(path)) < 140
    assert text.count("#") >= 5
    assert recipe.evaluate is not None and recipe.evaluate.through == "runtime"
    assert max(map(len, text.splitlines())) <= 120


def test_the_committed_schema_is_current() -> None:
    committed = json.loads((recipes_folder() / "schema.json").read_text())
    assert committed == recipe_schema(), "run `compress recipes schema > recipes/schema.json`"


WRONG_SETTINGS = {
    "quantize": ({"group_sise": 3}, {"group_size": "big"}, {"clip": "mes"}),
    "prune": ({"sparcity": 0.5}, {"sparsity": "much"}, {"allocation": "owls"}),
    "kv_cache": ({"precision": "int9"}, {"overrides": [{"layers": 3}]}, {"eviction": {"method": "snap", "budget": {}}}),
    "steps": ({"count": 0.5}, {"counts": 3}, {"stages": [{"steps": {"count": 2, "stages": []}}]}),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_takes_what_the_reader_takes(name: str) -> None:
    schema, data = recipe_schema(), read_yaml(shipped_recipes()[name]).data
    assert fits(data, schema, schema)
    assert not fits({**data, "modle": "m"}, schema, schema)
    assert not fits({**data, "gate": {"max_size": "much"}}, schema, schema)
    [(kind, settings)] = data["stages"][0].items()
    for wrong in ({"method": "gptk"}, *WRONG_SETTINGS[kind]):
        assert not fits({**data, "stages": [{kind: {**settings, **wrong}}]}, schema, schema)


@pytest.mark.parametrize("page", ["docs/recipes.md", "recipes/ci/README.md"])
def test_recipes_in_the_documentation_are_valid(page: str, call, tmp_path: Path) -> None:
    text = (recipes_folder().parent / page).read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(block)
        assert call("recipes", "validate", tmp_path / f"{number}.yaml").code == 0


def test_the_workflow_asks_for_no_file_but_the_recipe() -> None:
    """setup-python's cache of packages fails in a repository that has no requirements.txt or pyproject.toml."""
    text = (recipes_folder() / "ci" / "compress.yml").read_text()
    steps = YAML(typ="safe", pure=True).load(text)["jobs"]["compress"]["steps"]
    [python] = [step for step in steps if step.get("uses", "").startswith("actions/setup-python@")]
    assert python["with"] == {"python-version": "3.12"}
    assert re.findall(r"hashFiles\('(.*?)'\)", text) == ["recipe.yaml"]


def test_the_formats_of_export_are_documented() -> None:
    """Exactly those that a recipe may name, in backticks."""
    page = (recipes_folder().parent / "docs" / "recipes.md").read_text()
    [row] = re.findall(r"^\| `export\.format` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    field = Export.model_fields["format"]
    assert set(re.findall(r"`([a-z0-9-]+)`", row[0])) == set(get_args(field.annotation))
    assert row[1] == f"`{field.default}`"


def test_list_names_every_recipe(call) -> None:
    called = call("recipes", "list")
    assert called.code == 0
    for name in NAMES:
        assert name in called.out
    assert max(map(len, called.out.splitlines())) <= 80
    assert call("recipes", "list", "--quiet").out.split() == NAMES
    assert call("recipes", "list", "--json").objects[-1]["recipes"] == NAMES


def test_show_prints_the_file_or_every_default(call) -> None:
    path = shipped_recipes()["demo-w4"]
    assert call("recipes", "show", "demo-w4").out == path.read_text()
    resolved = call("recipes", "show", "demo-w4", "--resolved")
    assert "damping: 0.01" in resolved.out
    assert "calibration.dataset: /" in resolved.err
    changed = call("recipes", "show", "demo-w4", "--set", "stages[0].quantize.group_size=32")
    assert "group_size: 32" in changed.out
    assert call("recipes", "show", "demo-w4", "--json").objects[0]["recipe"]["model"] == "demo"


def test_what_show_prints_is_a_recipe_again(call, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(call("recipes", "show", "demo-w4", "--resolved").out)
    assert load_recipe(tmp_path / "again.yaml").model_dump() == load_recipe(shipped_recipes()["demo-w4"]).model_dump()


def test_validate_shows_every_problem_of_every_file(call, tmp_path: Path, recipe_file: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: m\nstages:\n  - quantize: {method: rtn, group_sise: 4, clip: mes}\nevalute: {}\n")
    called = call("recipes", "validate", bad, recipe_file, "demo-w4", tmp_path / "none.yaml")
    assert called.code == 2
    for words in (
        "3:29: stages[0].quantize.group_sise",
        "3:50: stages[0].quantize.clip",
        "4:1: evalute",
        "No such file",
    ):
        assert words in called.err
    assert f"{recipe_file}: valid" in " ".join(called.out.split())
    assert "demo-w4: valid" in called.out
    summary = call("recipes", "validate", bad, "demo-w4", "--json").objects[-1]
    assert (summary["exit_code"], summary["checked"], summary["invalid"]) == (2, 2, 1)


def test_diff_speaks_of_meaning_not_of_spelling(call, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: m\nstages: [{quantize: {method: rtn}}]\n")
    second.write_text("# the same\nstages:\n  - quantize: {method: rtn, clip: mse}\nmodel: m\n")
    assert call("recipes", "diff", first, second, "--json").objects[-1]["equal"] is True
    second.write_text("model: m\nstages: [{quantize: {method: rtn, clip: minmax}}]\n")
    called = call("recipes", "diff", first, second)
    assert "-    clip: mse" in called.out and "+    clip: minmax" in called.out


def test_init_chooses_bits_for_the_budget(call, tmp_path: Path, tiny_model) -> None:
    model = tiny_model("llama")
    for budget, code in ((None, 0), ("100MB", 0), ("1kB", 2)):
        path = tmp_path / f"{budget}.yaml"
        asked = () if budget is None else ("--budget", budget)
        called = call("recipes", "init", "--model", model, "--output", path, *asked)
        assert called.code == code, called.err
        assert path.exists() == (code == 0)
    largest = load_recipe(tmp_path / "100MB.yaml")
    assert largest.stages[0].settings.scheme == "w8a16"
    assert largest.gate.max_size == 100_000_000
    assert largest.gate.max_perplexity_increase == 0.01  # the size was chosen to fit: quality is what can be missed
    assert load_recipe(tmp_path / "None.yaml").stages[0].settings.scheme == "w4a16"
    assert largest.calibration.length <= 2048
    again = call("recipes", "init", "--model", model, "--output", tmp_path / "None.yaml")
    assert again.code == 2 and "--force" in again.err


def test_init_writes_to_standard_output(call, tmp_path: Path, monkeypatch, tiny_model) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    assert call("recipes", "init", "--model", model, "-o", "there.yaml").code == 0
    written = (tmp_path / "there.yaml").read_text()
    for how in ((), ("--quiet",)):
        called = call("recipes", "init", "--model", model, "-o", "-", *how)
        assert (called.code, called.out) == (0, written), called.err
    assert call("recipes", "init", "--model", model, "-o", "-", "--json").objects[-1]["recipe"] == written
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]


def test_the_schema_is_json_either_way(call) -> None:
    plain, asked = call("recipes", "schema"), call("recipes", "schema", "--json")
    assert (asked.code, asked.out) == (0, plain.out)
    assert json.loads(plain.out)["type"] == "object"


def test_find_recipe_takes_paths_before_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo-w4") == shipped_recipes()["demo-w4"]
    (tmp_path / "demo-w4").write_text("model: m")
    assert find_recipe("demo-w4") == Path("demo-w4")
    assert find_recipe("folder/x") == Path("folder/x")
    with pytest.raises(UsageError, match="compress recipes list"):
        find_recipe("zzz")
