"""A teacher that cannot be opened is told at its line of the recipe, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.core.errors import RecipeError
from compress.core.recipe import load_recipe
from compress.pipeline import RunOptions, plan
from tests.conftest import TinyModel

RECIPE = """\
model: {model}
calibration: {{dataset: text.txt, samples: 2, length: 16}}
stages:
  - prune: {{method: wanda, pattern: '2:4'}}
  - distill:
      method: recover
      teacher: {teacher}
"""


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("./nowhere", "there is no such folder"),
        ("text.txt", "not a model folder: it is a file"),
        ("empty", "not a model folder: it has no config.json"),
        ("weightless", "the folder holds no weights: model.safetensors is missing"),
        ("half", "the shard model-2.safetensors is missing"),
    ],
)
def test_the_line_and_what_to_do(tiny_model: TinyModel, tmp_path: Path, teacher: str, said: str) -> None:
    model = tiny_model()
    (tmp_path / "text.txt").write_text("A small boat sailed to the island. " * 10)
    for name in ("empty", "weightless", "half"):
        (tmp_path / name).mkdir()
    for name in ("weightless", "half"):
        shutil.copy(model / "config.json", tmp_path / name)
    (tmp_path / "half" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}')
    text = RECIPE.format(model=model, teacher=teacher)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        plan(load_recipe(tmp_path / "recipe.yaml"), RunOptions(tmp_path / "out"))
    error = refused.value
    assert error.where == f"{tmp_path / 'recipe.yaml'}:7:16"
    assert error.message.startswith("stages[1].distill.teacher: ") and said in error.message
    assert Path(teacher).name in error.message
    assert error.hint and "or original" in error.hint
    assert error.excerpt and error.excerpt.splitlines()[0].strip() == f"teacher: {teacher}"
    assert not (tmp_path / "out.partial").exists()
