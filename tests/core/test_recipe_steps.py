"""steps: several stages several times, written out when the recipe is read."""

from __future__ import annotations

from typing import Any

import pytest

from compress.core.errors import RecipeError
from compress.core.recipe import Recipe, load_recipe, parse_recipe
from compress.core.recipe_text import recipe_yaml

TEXT = """\
model: some/model
calibration: {dataset: wikitext}
stages:
  - steps:
      count: 3
      stages:
        - prune: {method: channels, ratio: 0.5}
        - prune: {method: wanda, sparsity: 0.5}
  - quantize: {method: gptq}
"""
ONE = "        - prune: {method: wanda, sparsity: 0.5}\n"
PLAIN = TEXT.replace("        - prune: {method: channels, ratio: 0.5}\n", "")


def settings(recipe: Recipe, kind: str = "prune") -> list[dict[str, Any]]:
    return [stage.settings.model_dump() for stage in recipe.stages if stage.kind == kind]


def prune(words: str, count: int = 3) -> list[dict[str, Any]]:
    return settings(parse_recipe(PLAIN.replace("method: wanda, sparsity: 0.5", words).replace("3", str(count))))


def test_steps_are_written_out_in_order_and_read_again() -> None:
    recipe = parse_recipe(PLAIN)
    assert [stage.method for stage in recipe.stages] == ["wanda"] * 3 + ["gptq"]
    assert parse_recipe(recipe_yaml(recipe)) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert "steps" not in recipe_yaml(recipe)


def test_sparsities_rise_by_the_cubic_schedule() -> None:
    assert [found["sparsity"] for found in prune("method: wanda, sparsity: 0.6")] == pytest.approx(
        [0.6 * (1 - (2 / 3) ** 3), 0.6 * (1 - (1 / 3) ** 3), 0.6], abs=1e-6
    )
    assert [found["sparsity"] for found in prune("method: alps")][:2] == pytest.approx([19 / 54, 26 / 54], abs=1e-6)
    assert [found["pattern"] for found in prune("method: wanda, pattern: '2:8'")] == ["4:8", "2:8", "2:8"]
    assert [found["sparsity"] for found in prune("method: wanda, sparsity: 0.6", 1)] == [0.6]


def test_ratios_multiply_to_the_one_that_is_asked_for() -> None:
    ratios = [found["ratio"] for found in prune("method: channels, ratio: 0.6")]
    assert len(set(ratios)) == 1 and (1 - ratios[0]) ** 3 == pytest.approx(0.4, abs=1e-5)
    assert [found["ratio"] for found in prune("method: heads")] == pytest.approx([1 - 0.75 ** (1 / 3)] * 3, abs=1e-6)
    for tiny in (1e-9, 1 - 1e-16):
        assert all(0 < found["ratio"] < 1 for found in prune(f"method: channels, ratio: {tiny!r}"))


def test_absolute_targets_say_how_many_steps_are_left() -> None:
    for words in ("keep: 64", "parameters: 500000", "max_size: 12MB"):
        assert [found["parts"] for found in prune(f"method: channels, {words}")] == [3, 2, 1]


def test_what_has_no_target_is_repeated() -> None:
    text = TEXT.replace("channels, ratio: 0.5", "magnitude, sparsity: 0.3")
    text = text.replace("  - quantize: {method: gptq}\n", "")
    assert [stage.method for stage in parse_recipe(text).stages] == ["magnitude", "wanda"] * 3


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("count: 3", "count: 0", "5:14", "stages[0].steps.count: should be at least 1, not 0"),
        ("count: 3", "count: many", "5:14", "should be a whole number"),
        ("count: 3", "count: 33", "5:14", "should be at most 32"),
        ("count: 3", "count: 32\n      cuont: 1", "6:7", "stages[0].steps.cuont: unknown key"),
        ("      count: 3\n", "", "4:5", "stages[0].steps.count: is missing"),
        (ONE, ONE * 11, "4:5", "stages[0].steps: are 33 stages, more than 32"),
        ("  - quantize", "  - quantize: {method: rtn}\n" * 30 + "  - quantize", "4:3", "has 34 stages with all steps"),
        ("sparsity", "sparcity", "7:34", "stages[0].steps.stages[0].prune.sparcity: unknown key"),
        ("sparsity: 0.5", "sparsity: 7", "7:44", "write 7% or 0.07"),
        ("method: wanda, sparsity: 0.5", "", "7:11", "prune.method: is missing"),
        ("prune: {method: wanda, sparsity: 0.5}", "quantize: {method: rtn}", "4:5", "has no prune stage"),
        ("prune: {", "steps: {", "7:11", "steps cannot stand inside of steps"),
        ("prune: {", "stpes: {", "7:11", "unknown kind of stage"),
        (ONE, ONE + "        - quantize: {method: rtn}\n", "7:11", "but those that stages[0].steps.stages[1] leaves"),
        ("calibration: {dataset: wikitext}\n", "", "6:11", "stages[0].steps.stages[0].prune: wanda needs calibration"),
        ("- steps:", "- stesp:", "4:5", "unknown kind of stage"),
        ("      stages:\n" + ONE, "      stages: []\n", "6:15", "stages[0].steps.stages: must not be empty"),
        ("      count: 3\n      stages:\n" + ONE, "", "4:5", "should be a mapping of count and stages, not nothing"),
    ],
)
def test_mistakes_are_shown_where_they_stand(old: str, new: str, where: str, words: str) -> None:
    assert old in PLAIN
    with pytest.raises(RecipeError) as caught:
        parse_recipe(PLAIN.replace(old, new, 1), "recipe.yaml")
    assert caught.value.where == f"recipe.yaml:{where}"
    assert words in caught.value.message


def test_steps_may_be_overridden(tmp_path: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(PLAIN)
    recipe = load_recipe(file, ["stages[0].steps.count=2", "stages[0].steps.stages[0].prune.sparsity=0.8"])
    assert [found["sparsity"] for found in settings(recipe)] == pytest.approx([0.7, 0.8])
