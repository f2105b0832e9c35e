"""Distillation of a pruned model: it gets better, stops and goes on to the bit, and leaves what it must."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError, RecipeError
from compress.core.events import Event, Metric, Progress
from compress.core.files import sha256_file
from compress.core.model_files import MASKED_KEY
from compress.core.recipe import Recipe, parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from distill._batches import batch_rows, targets_of
from distill._student import rate
from distill.logits import Logits
from tests.conftest import TinyModel

STORY = "A small boat sailed to the island and a bird sat on its mast all day, looking at %d fishes. "
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]


class Stopped(Exception):
    pass


def recipe_of(place: Path, model: Path, *stages: dict[str, Any]) -> Recipe:
    place.mkdir(exist_ok=True)
    (place / "text.txt").write_text("".join(STORY % number for number in range(40)))
    calibration = {"dataset": "text.txt", "samples": 6, "length": 32}
    return parse_recipe({"model": str(model), "calibration": calibration, "stages": list(stages)}, base_folder=place)


def lessons(steps: int = 10, **settings: Any) -> dict[str, Any]:
    asked = {"method": "logits", "tokens": steps * 4 * 32, "batch": 4, "learning_rate": 1e-3, "save_every": 3}
    return {"distill": {**asked, **settings}}


CUT = {"prune": {"method": "channels", "ratio": 0.5, "importance": "magnitude"}}


class Losses:
    """Hears the losses of a run, and stops it behind a step if asked."""

    def __init__(self, stop_behind: int | None = None) -> None:
        self.values: list[float] = []
        self._stop_behind = stop_behind

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metric) and event.name == "loss":
            self.values.append(event.value)
        if isinstance(event, Progress) and event.stage == "train" and event.done == self._stop_behind:
            raise Stopped


def require_the_same_after_a_stop(recipe: Recipe, place: Path) -> None:
    """Of 7 steps with saves every 3, stopped behind step 5: the losses, and all bytes of the artifact."""
    whole, first, second = Losses(), Losses(5), Losses()
    result = run(recipe, RunOptions(place / "whole"), whole)
    with pytest.raises(Stopped):
        run(recipe, RunOptions(place / "stopped"), first)
    again = run(recipe, RunOptions(place / "stopped"), second)
    assert whole.values[-1] < whole.values[0]
    assert first.values + second.values == whole.values[:5] + whole.values[3:]
    same = [{p.name: sha256_file(p) for p in folder.iterdir()} for folder in (result.artifact, again.artifact)]
    assert same[0] == same[1]


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(tiny_model: TinyModel, tmp_path: Path, family: str, odd: bool) -> None:
    model = tiny_model(family, odd, "bfloat16")
    heard = Losses()
    result = run(recipe_of(tmp_path, model, CUT, lessons()), RunOptions(tmp_path / "out"), heard)
    assert len(heard.values) == 10
    assert heard.values[-1] < 0.8 * heard.values[0]
    student, source = Checkpoint.open(result.artifact), Checkpoint.open(model)
    assert student.tied == source.tied
    assert verify(result.artifact).ok
    assert {info.dtype for info in student.tensors.values()} == {"BF16"}
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("divergence", "mix"), [("jsd", 0), ("jsd", 1), ("skew_kl", 1), ("skew_rkl", 1)])
def test_a_divergence_that_is_nothing_is_refused(tmp_path: Path, divergence: str, mix: float) -> None:
    with pytest.raises(RecipeError, match=f"with {mix} {divergence} is 0"):
        recipe_of(tmp_path, tmp_path, lessons(divergence=divergence, mix=mix))
    recipe_of(tmp_path, tmp_path, lessons(divergence=divergence, mix=0.5))


def test_the_plan_says_if_the_text_is_short(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), lessons(15))  # 15 steps of 4 rows, and 6 rows
    assert any(
        "reads the 6 rows of calibration text 10 times over" in said
        for said in plan(recipe, RunOptions(tmp_path / "out")).notices
    )
    enough = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), lessons(9))
    assert not any("times over" in said for said in plan(enough, RunOptions(tmp_path / "out")).notices)


@pytest.mark.parametrize("stop_behind", [1, 4, 6, 9])
def test_a_stopped_run_ends_with_the_same_losses_and_bytes(
    tiny_model: TinyModel, tmp_path: Path, stop_behind: int
) -> None:
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), CUT, lessons(9))
    whole, first, second = Losses(), Losses(stop_behind), Losses()
    result = run(recipe, RunOptions(tmp_path / "whole"), whole)
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "stopped"), first)
    saves = sorted(path.name for path in (tmp_path / "stopped.partial" / "saves").glob("*"))
    assert saves == [f"01-{step:08d}.safetensors" for step in range(3, stop_behind + 1, 3)][-2:]
    again = run(recipe, RunOptions(tmp_path / "stopped"), second)
    done = stop_behind // 3 * 3
    assert first.values == whole.values[:stop_behind]
    assert second.values == whole.values[done:]
    same = [{p.name: sha256_file(p) for p in folder.iterdir()} for folder in (result.artifact, again.artifact)]
    assert same[0] == same[1]


def test_a_save_that_was_damaged_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_model(), lessons(9))
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "out"), Losses(7))
    (newest,) = (tmp_path / "out.partial" / "saves").glob("*00006.safetensors")
    newest.write_bytes(newest.read_bytes()[:-4] + b"oops")
    with pytest.raises(ArtifactError, match="not as the journal says"):
        run(recipe, RunOptions(tmp_path / "out"))


def test_zeros_of_a_masked_model_stay(tiny_model: TinyModel, tmp_path: Path) -> None:
    pruned = {"prune": {"method": "wanda", "pattern": "2:4"}}
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), pruned, lessons(weight_decay=0.1))
    heard = Losses()
    student = Checkpoint.open(run(recipe, RunOptions(tmp_path / "out"), heard).artifact)
    assert heard.values[-1] < heard.values[0]
    assert student.config[MASKED_KEY] is True
    for index in range(student.num_blocks):
        for name in student.sites(index):
            kept = (student.weight(name).reshape(-1, 4) != 0).sum(1)
            assert int(kept.max()) == 2, name


def test_a_teacher_with_padding_rows_teaches(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "padded"
    shutil.copytree(tiny_model("llama"), teacher)
    tensors = load_file(teacher / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, embedding[:16]])
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    config = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(config.replace('"vocab_size": 320', '"vocab_size": 336'))
    heard = Losses()
    recipe = recipe_of(tmp_path, tiny_model("llama"), CUT, lessons(teacher=str(teacher), divergence="jsd"))
    run(recipe, RunOptions(tmp_path / "out"), heard)
    assert heard.values[-1] < heard.values[0]


def test_a_teacher_is_found_beside_the_recipe_or_refused_before_any_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_model(), CUT, lessons(teacher="parent"))
    with pytest.raises(RecipeError, match=r"distill\.teacher: parent: .*or name a folder"):
        plan(recipe, RunOptions(tmp_path / "out"))
    shutil.copytree(tiny_model(), tmp_path / "parent")
    assert plan(recipe, RunOptions(tmp_path / "out")).stages


def test_a_teacher_is_opened_once_for_a_plan(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copytree(tiny_model(), tmp_path / "parent")
    opened: list[str] = []
    own = Checkpoint.open
    monkeypatch.setattr(Checkpoint, "open", lambda model, **how: opened.append(str(model)) or own(model, **how))
    plan(recipe_of(tmp_path, tiny_model(), CUT, lessons(teacher="parent")), RunOptions(tmp_path / "out"))
    assert opened.count(str(teacher)) == 1


def test_the_time_of_a_run_that_was_stopped_counts(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_model(), lessons(4))

    def slow(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "train":
            time.sleep(2 * (event.done == 1))
            if event.done == 3:
                raise Stopped

    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "out"), slow)
    assert run(recipe, RunOptions(tmp_path / "out")).summary["stages"][0]["seconds"] > 2


def test_a_teacher_with_other_tokens_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    teacher = tmp_path / "stranger"
    shutil.copytree(tiny_model("llama"), teacher)
    text = (teacher / "tokenizer.json").read_text()
    (teacher / "tokenizer.json").write_text(text.replace('"a": ', '"ā": ', 1))
    recipe = recipe_of(tmp_path, tiny_model("llama"), lessons(teacher=str(teacher)))
    with pytest.raises(InputError, match="gives tokens other ids than the student's"):
        run(recipe, RunOptions(tmp_path / "out"))


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tiny_model: TinyModel, tmp_path: Path) -> None:
    heard = Losses()
    run(recipe_of(tmp_path, tiny_model(), lessons(2)), RunOptions(tmp_path / "out"), heard)
    assert heard.values[0] == pytest.approx(0.0, abs=1e-6)
    assert heard.values[1] == pytest.approx(0.0, abs=1e-3)  # Adam makes steps of rounding noise


def test_rows_at_once_change_nothing_but_memory(tiny_model: TinyModel, tmp_path: Path) -> None:
    values = []
    for rows in (1, 4):
        heard = Losses()
        recipe = recipe_of(tmp_path, tiny_model(), CUT, lessons(4, rows_at_once=rows))
        run(recipe, RunOptions(tmp_path / f"out-{rows}"), heard)
        values.append(heard.values)
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_every_row_is_seen_once_in_each_pass() -> None:
    settings = Logits(batch=4)
    seen = torch.cat([batch_rows(settings, 6, step) for step in range(3)])
    assert sorted(seen[:6].tolist()) == sorted(seen[6:].tolist()) == list(range(6))
    assert seen[:6].tolist() != seen[6:].tolist()
    assert not torch.equal(seen, torch.cat([batch_rows(Logits(batch=4, seed=1), 6, step) for step in range(3)]))


def test_padding_and_last_tokens_have_no_target() -> None:
    tokens = Tokens.of(torch.arange(10).view(2, 5), torch.tensor([5, 3]))
    assert targets_of(tokens, torch.tensor([1, 0])).tolist() == [[6, 7, -100, -100, -100], [1, 2, 3, 4, -100]]


def test_schedules() -> None:
    cosine = [rate(Logits(warmup=0.1, final=0.1), step, 100) for step in range(100)]
    assert cosine[0] == pytest.approx(0.1) and max(cosine) == 1.0
    assert cosine[9:] == sorted(cosine[9:], reverse=True) and cosine[-1] == pytest.approx(0.1, abs=0.01)
    wsd = [rate(Logits(warmup=0.1, final=0.0, schedule="wsd"), step, 100) for step in range(100)]
    assert set(wsd[10:82]) == {1.0} and wsd[-1] < 0.1


def test_a_teacher_that_was_exchanged_in_the_middle_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "parent")
    recipe = recipe_of(tmp_path, tiny_model(), CUT, lessons(teacher="parent"))
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "out"), Losses(stop_behind=4))
    weights = load_file(tmp_path / "parent" / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, tmp_path / "parent" / "model.safetensors")
    with pytest.raises(InputError, match="another than when this run began"):
        run(recipe, RunOptions(tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"max_position_embeddings": 16}, "reads 16 tokens at most"),
        ("config.json", {"vocab_size": 100}, "embeddings for 100 tokens"),
        ("tokenizer.json", {"added_tokens": [{"content": "<other>", "id": 1}]}, "other ids"),
    ],
    ids=["positions", "rows", "added tokens"],
)
def test_a_teacher_that_cannot_read_the_text_is_refused_before_any_work(
    tiny_model: TinyModel, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    teacher = Path(shutil.copytree(tiny_model(), tmp_path / "teacher"))
    data = json.loads((teacher / file).read_text())
    (teacher / file).write_text(json.dumps(data | change))
    with pytest.raises(InputError, match=message):
        plan(recipe_of(tmp_path, tiny_model(), lessons(teacher="teacher")), RunOptions(tmp_path / "out"))
