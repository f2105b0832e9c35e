"""compress kv: its own kind of stage, as the other kinds have theirs."""

from pathlib import Path

from tests.cli.conftest import Call


def test_a_recipe_is_planned_and_run(call: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: demo\nstages: [{kv_cache: {precision: int8}}]\n")
    planned = call("kv", "--recipe", recipe, "--output", tmp_path / "out", "--dry-run")
    assert planned.code == 0, planned.err
    assert not (tmp_path / "out").exists()
    done = call("kv", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "compress.json").is_file()
