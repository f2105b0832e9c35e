"""Recipes: defaults, overrides, bundled names, round trips, stages that fit together."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core import methods
from compress.core.errors import EnvironmentRefused, RecipeError, UsageError
from compress.core.methods import available_kinds
from compress.core.quantities import format_bytes, parse_fraction, parse_size
from compress.core.recipe import load_recipe, parse_recipe
from compress.core.recipe_text import recipe_schema, recipe_yaml

TEXT = """\
model: some/model
calibration: {dataset: wikitext}
stages:
  - quantize: {method: gptq, scheme: w4a16, group_size: 64}
evaluate:
  perplexity: {dataset: data/held-out.txt}
  tasks: [hellaswag]
gate: {max_perplexity_increase: 2%, max_size: 120MB, min_accuracy: {hellaswag: 30%}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_defaults_are_those_of_the_documentation(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.calibration is not None and recipe.evaluate is not None and recipe.gate is not None
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.pack) == (128, 2048, True)
    assert recipe.export.format == "compressed-tensors"
    assert (recipe.evaluate.through, recipe.evaluate.numerics) == ("runtime", "fast")
    assert recipe.gate.max_perplexity_increase == 0.02
    assert recipe.gate.max_size == 120_000_000
    assert recipe.gate.min_accuracy == {"hellaswag": 0.3}
    assert recipe.base_folder == recipe_file.parent
    stage = recipe.stages[0]
    assert (stage.kind, stage.method, stage.settings.group_size) == ("quantize", "gptq", 64)


def test_the_command_line_overrides_the_file(recipe_file: Path) -> None:
    overrides = ["stages[0].quantize.group_size=-1", "calibration.samples=2_000", "evaluate.perplexity.prefix='a: b'"]
    recipe = load_recipe(recipe_file, overrides, model="other/model")
    assert recipe.model == "other/model"
    assert recipe.stages[0].settings.group_size == -1
    assert recipe.calibration.samples == 2000
    assert recipe.evaluate.perplexity.prefix == "a: b"


def test_an_override_may_add_a_section(recipe_file: Path) -> None:
    recipe_file.write_text("stages: [{quantize: {method: rtn}}]\n")
    recipe = load_recipe(recipe_file, ["calibration.dataset=wikitext", "model=m"])
    assert recipe.calibration.dataset == "wikitext"
    assert recipe.model == "m"


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"], max_codepoint=0xFFFF), min_size=1), max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_written_recipe_reads_back_to_the_same(tasks: list[str]) -> None:
    data = {"model": "m", "stages": [{"quantize": {"method": "rtn"}}], "evaluate": {"tasks": [*tasks, "x"]}}
    recipe = parse_recipe(data)
    text = recipe_yaml(recipe)
    again = parse_recipe(text)
    assert again == recipe
    assert recipe_yaml(again) == text
    assert parse_recipe(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_a_token_file_keeps_its_size_open_when_written_back() -> None:
    data = {"model": "m", "calibration": {"dataset": "ids.safetensors"}, "stages": [{"quantize": {"method": "gptq"}}]}
    written = parse_recipe(data).model_dump(mode="json")["calibration"]
    assert "samples" not in written and "length" not in written
    data["calibration"]["samples"] = 8
    assert parse_recipe(data).model_dump(mode="json")["calibration"]["samples"] == 8


def test_relative_paths_start_at_the_recipe_and_stay_as_written_in_the_record(recipe_file: Path) -> None:
    (recipe_file.parent / "data").mkdir()
    (recipe_file.parent / "data" / "held-out.txt").write_text("text")
    recipe = load_recipe(recipe_file)
    located = recipe.located()
    assert located.evaluate.perplexity.dataset == str(recipe_file.parent / "data" / "held-out.txt")
    assert located.calibration.dataset == "wikitext"
    assert located.model == "some/model"
    assert recipe.evaluate.perplexity.dataset == "data/held-out.txt"


def test_a_model_folder_is_recorded_by_name_and_found_from_the_current_folder(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "my-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    recipe = load_recipe(recipe_file, model="./my-model")
    assert recipe.model == "my-model"
    assert recipe.located().model == str(tmp_path / "work" / "my-model")


def test_bundled_names_lead_to_bundled_files() -> None:
    data = {
        "model": "demo",
        "calibration": {"dataset": "demo/calibration"},
        "stages": [{"quantize": {"method": "gptq"}}],
        "evaluate": {"perplexity": {"dataset": "demo"}, "tasks": ["a"], "task_folder": "demo"},
    }
    recipe = parse_recipe(data)
    located = recipe.located()
    for path in (located.model, located.calibration.dataset, located.evaluate.task_folder):
        assert Path(path).is_absolute()
    assert located.evaluate.perplexity.dataset != located.calibration.dataset
    assert recipe.model == "demo", "the record must not hold a machine's paths"
    with pytest.raises(RecipeError, match="there is no bundled data 'demo/calibratoin'"):
        parse_recipe({**data, "calibration": {"dataset": "demo/calibratoin"}}).located()


FAKE = """
from typing import ClassVar
from compress.core.passes import Pass
class {name}(Pass):
    kind: ClassVar = "{kind}"
    takes: ClassVar = frozenset({takes})
    gives: ClassVar = {gives!r}
    paper: ClassVar = ""
    needs_calibration: ClassVar = False
    def plan(self, checkpoint, calibration): ...
    def run(self, job): ...
"""


@pytest.fixture
def fake_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune method that leaves masked weights and a quantize method that refuses them, found as files are."""
    for package, name, kind, takes, gives in (
        ("fake_prune", "Wanda", "prune", {"dense"}, "masked"),
        ("fake_prune", "Layers", "prune", {"dense"}, None),
        ("fake_quantize", "Dense", "quantize", {"dense"}, "quantized"),
        ("fake_quantize", "Any", "quantize", {"dense", "masked"}, "quantized"),
    ):
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        (folder / "_shared.py").touch()
        (folder / f"{name.lower()}.py").write_text(FAKE.format(name=name, kind=kind, takes=takes, gives=gives))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "FOLDERS", {"prune": "fake_prune", "quantize": "fake_quantize", "distill": "distill"})
    monkeypatch.setattr(methods, "package_folder", lambda package: tmp_path / package)
    yield
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def stages(*pairs: tuple[str, str]) -> dict[str, object]:
    return {"model": "m", "stages": [{kind: {"method": method}} for kind, method in pairs]}


@pytest.mark.usefixtures("fake_methods")
def test_stages_must_take_what_the_one_before_gives() -> None:
    assert len(parse_recipe(stages(("prune", "wanda"), ("quantize", "any"))).stages) == 2
    assert len(parse_recipe(stages(("prune", "layers"), ("quantize", "dense"))).stages) == 2
    with pytest.raises(RecipeError, match="dense takes dense weights, but those that stages.0. leaves are masked"):
        parse_recipe(stages(("prune", "wanda"), ("quantize", "dense")))
    with pytest.raises(RecipeError, match="any takes dense or masked weights, but those .* are quantized"):
        parse_recipe(stages(("quantize", "dense"), ("quantize", "any")))


@pytest.mark.usefixtures("fake_methods")
def test_a_method_is_a_file_without_underscore() -> None:
    assert methods.list_methods("prune") == ["layers", "wanda"]
    assert methods.available_kinds() == {"prune": ["layers", "wanda"], "quantize": ["any", "dense"]}
    assert methods.find_pass("prune", "wanda").__name__ == "Wanda"
    with pytest.raises(UsageError, match="unknown prune method 'wand'.*did you mean wanda"):
        methods.find_pass("prune", "wand")


def test_dotted_methods_need_permission_and_never_come_from_here(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise SystemExit('code from the current folder ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--allow-code mine"):
        methods.find_pass("quantize", "mine.method")
    with pytest.raises(UsageError, match="lies in the current folder"):
        methods.find_pass("quantize", "mine.method", ("mine",))
    with pytest.raises(UsageError, match="there is no package"):
        methods.find_pass("quantize", "not_there.method", ("not_there",))


def test_a_stranger_of_our_name_is_told_with_both_paths(tmp_path, monkeypatch) -> None:
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quantize", raising=False)
    with pytest.raises(EnvironmentRefused, match=f"{tmp_path}/quantize instead of .*/quantize") as caught:
        methods.package_folder("quantize")
    assert caught.value.exit_code == 6


def test_sizes_and_percentages_as_people_write_them() -> None:
    assert parse_size("120MB") == 120_000_000
    assert parse_size("4GiB") == 4 << 30
    assert parse_size("1.5 kb") == 1500
    assert parse_size(17) == 17
    assert parse_fraction("2%") == 0.02
    assert parse_fraction("0.5 %") == 0.005
    assert parse_fraction(0.02) == 0.02
    assert [format_bytes(n) for n in (0, 999, 1536, 999_949, 123_456_789)] == [
        "0 B",
        "999 B",
        "1.54 kB",
        "1.00 MB",
        "123 MB",
    ]


def test_the_schema_offers_each_method_with_its_settings() -> None:
    schema = recipe_schema()
    stages = schema["$defs"]["Stage"]["oneOf"]
    plain, steps = schema["properties"]["stages"]["items"]["oneOf"]
    assert plain == steps["properties"]["steps"]["properties"]["stages"]["items"] == {"$ref": "#/$defs/Stage"}
    kinds = {kind: offered["oneOf"] for stage in stages for kind, offered in stage["properties"].items()}
    methods = {kind: {s["properties"]["method"]["const"]: s for s in offered} for kind, offered in kinds.items()}
    assert {kind: sorted(offered) for kind, offered in methods.items()} == available_kinds()
    assert set(methods["prune"]) >= {"wanda", "sparsegpt"}
    by_method = methods["quantize"]
    assert "damping" in by_method["gptq"]["properties"] and "damping" not in by_method["rtn"]["properties"]
    assert by_method["gptq"]["additionalProperties"] is False
    assert schema["additionalProperties"] is False


def test_a_recipe_is_frozen_and_equal_by_value(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe == load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.model = "other"
