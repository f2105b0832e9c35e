"""Where commands write and look: nothing that is there is spoiled, and what is named elsewhere is said or found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.core.recipe import load_recipe
from compress.pipeline import RunOptions, plan
from tests.conftest import TinyModel

RECIPE = """\
model: model
calibration: {dataset: text.txt, samples: 2, length: 16}
stages:
  - quantize: {method: rtn, group_size: 16}
evaluate:
  perplexity: {dataset: text.txt, window: 32, stride: 16}
"""


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with a model, a text and a recipe of both."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("One day a hen and a cat went to see the sea. " * 20)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def artifact(place: Path, call: Any) -> Path:
    assert call("run", "-r", "recipe.yaml", "-o", "out", "--quiet").code == 0
    return place / "out"


def test_reports_do_not_go_into_a_model_folder(call: Any, artifact: Path) -> None:
    shutil.copytree(artifact, "other")
    for command in (
        ("report", "out", "-o", "other"),
        ("compare", "out", "other", "-o", "other"),
        ("bench", "out", "--requests", "1", "-o", "other"),
        ("bench", "out", "--requests", "1", "-o", "model"),
    ):
        called = call(*command)
        assert called.code == 2, command
        assert "is a model's folder" in called.err and "choose another --output" in called.err
    assert call("verify", "other").code == 0


def test_calibrate_replaces_token_ids_and_nothing_else(call: Any, place: Path) -> None:
    weights = (place / "model" / "model.safetensors").read_bytes()
    called = call("calibrate", "-r", "recipe.yaml", "-o", "model/model.safetensors")
    assert called.code == 2 and "holds no token ids" in called.err
    assert (place / "model" / "model.safetensors").read_bytes() == weights
    called = call("calibrate", "-r", "recipe.yaml", "-o", "nowhere/ids.safetensors")
    assert called.code == 2 and "no such folder" in called.err
    for _ in range(2):
        assert call("calibrate", "-r", "recipe.yaml", "-o", "ids.safetensors", "--quiet").code == 0


def test_a_budget_is_for_all_files(call: Any, place: Path) -> None:
    recipe = load_recipe("recipe.yaml")
    least = plan(recipe, RunOptions(output=place / "x")).artifact_bytes
    for budget in (least, least + 30_000, least + 60_000):
        called = call("recipes", "init", "-m", "model", "--budget", f"{budget}B", "-o", "made.yaml", "--force")
        assert called.code == 0, called.err
        written = (
            (place / "made.yaml")
            .read_text()
            .replace("wikitext, samples: 128, length: 256", "text.txt, samples: 2, length: 16")
            .replace("wikitext", "text.txt")
        )
        (place / "made.yaml").write_text(written)
        planned = plan(load_recipe("made.yaml"), RunOptions(output=place / "x"))
        assert planned.artifact_bytes <= budget
        assert not any("max_size" in notice for notice in planned.notices)


def test_a_size_that_will_be_missed_is_said_before_the_work(call: Any, place: Path) -> None:
    called = call("run", "-r", "recipe.yaml", "--set", "gate.max_size=1kB", "--dry-run")
    assert called.code == 0
    assert "gate.max_size will be missed" in " ".join(called.out.split())


def test_a_recipe_made_elsewhere_names_its_model_from_there(call: Any, place: Path) -> None:
    (place / "there").mkdir()
    assert call("recipes", "init", "-m", "model", "-o", "there/recipe.yaml").code == 0
    assert load_recipe("there/recipe.yaml").model == str(place / "model")


def test_a_link_keeps_its_own_name_however_it_is_given(place: Path) -> None:
    (place / "link").symlink_to(place / "model")
    assert load_recipe("recipe.yaml", model="link").model == "link"
    assert load_recipe("recipe.yaml", model="./model/../link").model == "link"


def test_a_revision_of_a_folder_is_refused(call: Any, place: Path) -> None:
    called = call("run", "-r", "recipe.yaml", "--set", "revision=abc", "--dry-run")
    assert called.code == 2
    assert "revision 'abc' is of a model of the hub, and this is a folder" in called.err


def test_all_files_with_a_fault_are_named(call: Any, artifact: Path) -> None:
    for number in range(5):
        (artifact / f"more-{number}.txt").write_text("")
    said = " ".join(call("verify", "out", "--quiet").out.split())
    assert "more-0.txt, more-1.txt, more-2.txt and 2 more: are not listed in the manifest" in said
    (artifact / "README.md").unlink()
    (artifact / "tokenizer.json").unlink()
    said = " ".join(call("verify", "out", "--quiet").out.split())
    assert "README.md, tokenizer.json: are missing" in said


def test_an_artifact_without_a_parity_record_is_said_to_have_none(call: Any, artifact: Path) -> None:
    assert "parity" not in call("verify", "out").err
    assert call("run", "-r", "recipe.yaml", "-o", "unscored", "--set", "evaluate.through=transformers").code == 0
    assert "parity: there is no record" in call("verify", "unscored").err
    manifest = json.loads((artifact / "compress.json").read_text())
    (artifact / "compress.json").write_text(json.dumps(manifest | {"lineage": {}}))
    called = call("verify", "out", "--level", "parity")
    assert "the manifest is not sound" in called.err and "has no manifest" not in called.err


def test_eval_takes_options_beside_the_recipe(call: Any, artifact: Path) -> None:
    called = call("eval", "out", "-r", "recipe.yaml", "--window", "24", "--json", "--through", "transformers")
    assert called.code == 0, called.err
    [evaluation] = [each["evaluation"] for each in called.objects if "evaluation" in each]
    assert evaluation["protocol"]["text"]["window"] == 24


def test_an_artifacts_own_recipe_finds_its_data_where_it_was_run_or_says_so(call: Any, artifact: Path) -> None:
    called = call("eval", "out", "--quiet")
    assert called.code == 0, called.err
    (artifact.parent / "text.txt").unlink()
    called = call("eval", "out")
    assert called.code == 2
    assert "names data by a path that leads nowhere from here: text.txt" in called.err
    assert "--recipe" in called.err


def test_gguf_folders_are_told_apart_from_broken_ones(call: Any, place: Path) -> None:
    (place / "gguf").mkdir()
    (place / "gguf" / "model.gguf").write_bytes(b"GGUF")
    assert "holds a GGUF file" in call("generate", "gguf", "hi").err
    assert "holds a GGUF file" in call("inspect", "gguf").err


def test_the_bundled_model_goes_by_its_name(call: Any, place: Path) -> None:
    assert call("inspect", "demo", "--quiet").code == 0
    called = call("generate", "demo", "Once upon a time", "--max-tokens", "3", "--quiet")
    assert called.code == 0 and called.out.strip()


def test_a_full_disk_behind_standard_output_is_no_bug(place: Path) -> None:
    command = [sys.executable, "-m", "compress", "recipes", "schema"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4
    assert done.stderr.startswith("error: the output cannot be written: No space left on device")


def test_a_terminal_of_another_encoding_shows_marks(place: Path) -> None:
    script = "from compress.cli import main; import sys; sys.argv[1:] = ['--version']; main()"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "latin-1"}
    said = "from compress.cli.console import speak; speak().answer('caf\\u00e9 \\u65e5')"
    script = script.replace(
        "main()", f"\ntry:\n    main()\nexcept SystemExit:\n    {said.replace('; ', chr(10) + '    ')}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("latin-1").splitlines()[-1] == "café ?"
