"""The teacher cache: it trains as the teacher does, outlives kills to the byte, and refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import distill._cache
import distill._cached
from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError, RecipeError, UsageError
from compress.core.events import Event, Metric, Notice, Progress
from compress.core.files import sha256_file
from compress.core.recipe import Recipe, parse_recipe
from compress.core.safetensors_io import read_header
from compress.pipeline import RunOptions, plan, run
from distill._cache import TeacherCache, positions
from distill._cache_settings import Cache
from distill._sparse import encode, random_numbers
from distill.logits import Logits
from tests.conftest import TinyModel
from tests.contracts.shelf import tokens_for

ROWS, LENGTH = 6, 24
CUT = {"prune": {"method": "channels", "ratio": 0.5, "importance": "magnitude"}}


class Stopped(Exception):
    pass


class Ear:
    """Hears losses and notices, and stops the run behind a unit of a stage if asked."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.losses: list[float] = []
        self.notices: list[str] = []
        self.shards = 0
        self._stop = stop

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metric) and event.name == "loss":
            self.losses.append(event.value)
        if isinstance(event, Notice):
            self.notices.append(event.message)
        if isinstance(event, Progress):
            self.shards += event.stage == "teacher"
            if (event.stage, event.done) == self._stop:
                raise Stopped


def recipe_of(
    place: Path, model: Path, cache: dict[str, Any] | None, *, steps: int = 4, stages: int = 1, **settings: Any
) -> Recipe:
    place.mkdir(exist_ok=True)
    texts = [f"A bird sat on mast {n} all day. " + "It sang. " * (n % 4) for n in range(40)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    calibration = {"dataset": "text.jsonl", "samples": ROWS, "length": LENGTH + 16, "pack": False}
    asked = {"method": "logits", "tokens": steps * 3 * (LENGTH + 16), "batch": 3, "learning_rate": 1e-3}
    lesson = {"distill": {**asked, "save_every": 2, **settings, **({} if cache is None else {"cache": cache})}}
    return parse_recipe(
        {"model": str(model), "calibration": calibration, "stages": [CUT, *[lesson] * stages]}, base_folder=place
    )


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a shard, so that three of them hold the text."""
    monkeypatch.setattr(distill._cache, "SHARD_TOKENS", 2 * (LENGTH + 16))


def files_of(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob(pattern))}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_all_tokens_trains_as_the_teacher_does(
    tiny_model: TinyModel, tmp_path: Path, small_shards: None, temperature: float
) -> None:
    heard = []
    for name, cache in (("online", None), ("cached", {"codec": "topk", "k": 320})):
        heard.append(Ear())
        asked = {"temperature": temperature, "cross_entropy": 0.25, "rows_at_once": 2}
        recipe = recipe_of(tmp_path, tiny_model(), cache, **asked)
        run(recipe, RunOptions(tmp_path / name), heard[-1])
    assert len(heard[0].losses) == 4
    assert heard[1].losses == pytest.approx(heard[0].losses, rel=1e-4)
    assert heard[1].shards == 3


def test_a_sampled_cache_teaches_all_stages_of_a_run(tiny_model: TinyModel, tmp_path: Path, small_shards: None) -> None:
    online, cached = Ear(), Ear()
    run(recipe_of(tmp_path, tiny_model(), None), RunOptions(tmp_path / "online"), online)
    run(recipe_of(tmp_path, tiny_model(), {"draws": 200}, stages=2), RunOptions(tmp_path / "cached"), cached)
    assert cached.losses[0] == pytest.approx(online.losses[0], rel=0.1)
    assert len(cached.losses) == 8 and cached.losses[-1] < cached.losses[0]
    assert cached.shards == 3  # the second stage found them
    assert not (tmp_path / "cached.partial").exists()


@pytest.mark.parametrize("stop", [("teacher", 1), ("teacher", 2), ("train", 3)], ids=str)
def test_a_stopped_run_ends_with_the_same_shards_losses_and_bytes(
    tiny_model: TinyModel, tmp_path: Path, small_shards: None, stop: tuple[str, int]
) -> None:
    model = tiny_model("llama", False, "bfloat16")
    recipes = [recipe_of(tmp_path / name, model, {"folder": "cache"}) for name in ("one", "two")]
    whole, first, second = Ear(), Ear(stop), Ear()
    result = run(recipes[0], RunOptions(tmp_path / "whole"), whole)
    with pytest.raises(Stopped):
        run(recipes[1], RunOptions(tmp_path / "stopped"), first)
    again = run(recipes[1], RunOptions(tmp_path / "stopped"), second)
    assert first.shards + second.shards == whole.shards == 3
    assert second.losses == whole.losses[2 * (stop[0] == "train") :]
    names = ("shard*", "*.jsonl")
    assert all(files_of(tmp_path / "one/cache", n) == files_of(tmp_path / "two/cache", n) != {} for n in names)
    assert files_of(result.artifact) == files_of(again.artifact)


def test_a_whole_cache_is_used_without_the_teacher(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Ear(), Ear()
    recipe = recipe_of(tmp_path, tiny_model(), {"folder": "cache"})
    one = run(recipe, RunOptions(tmp_path / "one"), first)
    monkeypatch.setattr(distill._cached, "load_teacher", None)  # calling it would raise
    two = run(recipe, RunOptions(tmp_path / "two"), second)
    assert second.losses == first.losses and second.shards == 0
    assert files_of(one.artifact) == files_of(two.artifact)
    assert any("the teacher is not loaded" in notice for notice in second.notices)
    with pytest.raises(TypeError):  # of other text there is none
        run(recipe_of(tmp_path, tiny_model(), {}), RunOptions(tmp_path / "three"))


def test_another_cache_is_refused_by_the_field_that_differs(tiny_model: TinyModel, tmp_path: Path) -> None:
    run(recipe_of(tmp_path, tiny_model(), {"folder": "cache"}, steps=1), RunOptions(tmp_path / "one"))
    others: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"temperature": 2.0}, {}, r"temperature: 1\.0 → 2\.0 \("),
        ({}, {"draws": 49}, r"codec\.draws: 24 → 49 \("),
        ({}, {"seed": 1}, r"codec\.seed: 0 → 1 \("),
        ({}, {"codec": "topk"}, r"codec\.codec: sampled → topk; "),
        ({"teacher": str(tiny_model("llama", False, "bfloat16"))}, {}, ".*teacher: "),
    ]
    for number, (settings, cache, fields) in enumerate(others):
        recipe = recipe_of(tmp_path, tiny_model(), {"folder": "cache", **cache}, steps=1, **settings)
        with pytest.raises(InputError, match="another one than the recipe asks for: " + fields):
            run(recipe, RunOptions(tmp_path / f"two-{number}"))


def test_damage_is_refused(tiny_model: TinyModel, tmp_path: Path, small_shards: None) -> None:
    recipe = recipe_of(tmp_path, tiny_model(), {"folder": "cache"}, steps=1)
    run(recipe, RunOptions(tmp_path / "one"))
    shard = tmp_path / "cache" / "shard-000001.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), None):
        shard.write_bytes(damaged) if damaged else shard.unlink()
        with pytest.raises(ArtifactError, match="not as it was written" if damaged else "is missing") as refused:
            run(recipe, RunOptions(tmp_path / "two"))
        assert refused.value.where == str(shard)
    journal = tmp_path / "cache" / "shards.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b"schema", b"shemac"))
    with pytest.raises(ArtifactError, match="the list of shards is damaged"):
        run(recipe, RunOptions(tmp_path / "two"))


def test_a_cache_that_was_exchanged_under_a_run_is_refused(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, tiny_model(), {"folder": "cache"})
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "out"), Ear(("train", 2)))
    folder = tmp_path / "cache"
    for path in folder.iterdir():
        path.unlink()
    # one with an equal header and other bytes, as another machine writes it
    monkeypatch.setattr(distill._cached, "random_numbers", lambda cache, row, n: random_numbers(cache, row + 1, n))
    with pytest.raises(ArtifactError, match="not the one that this run began with"):
        run(recipe, RunOptions(tmp_path / "out"))


def test_a_folder_with_something_else_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    recipe = recipe_of(tmp_path, tiny_model(), {"folder": "mine"})
    with pytest.raises(InputError, match=r"this is no teacher cache: letter\.txt is here"):
        run(recipe, RunOptions(tmp_path / "out"))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl", "skew_rkl", "alpha_beta", "tv"])
def test_divergences_of_whole_distributions_are_refused_by_name(tmp_path: Path, divergence: str) -> None:
    with pytest.raises(RecipeError, match=f"cache: {divergence} needs the teacher's whole distribution"):
        recipe_of(tmp_path, tmp_path, {}, divergence=divergence)


def test_the_plan_counts_the_disk_and_no_teacher(tiny_model: TinyModel, tmp_path: Path) -> None:
    online = plan(recipe_of(tmp_path, tiny_model(), None), RunOptions(tmp_path / "out"))
    recipe = recipe_of(tmp_path, tiny_model(), {"folder": "cache"})
    cached = plan(recipe, RunOptions(tmp_path / "out"))
    assert not (tmp_path / "cache").exists()
    teacher_bytes = cached.bytes_in  # that of the original, which nothing was cut from; it is fp32
    assert teacher_bytes > cached.stages[1].bytes_out
    assert online.stages[1].peak_memory_bytes - cached.stages[1].peak_memory_bytes == teacher_bytes
    run(recipe, RunOptions(tmp_path / "out"))
    tensors = [info for path in (tmp_path / "cache").glob("*.safetensors") for info in read_header(path).values()]
    most = cached.disk_bytes - online.disk_bytes
    assert 0.1 * most < sum(info.bytes for info in tensors) <= most
    assert any("the teacher cache takes up to" in notice and "minutes to write" in notice for notice in cached.notices)


def test_the_plan_counts_the_minutes_of_both_models(tiny_model: TinyModel) -> None:
    """Online the teacher reads as many tokens as the student is trained on, for a cache those of the text."""
    checkpoint = Checkpoint.open(tiny_model())
    tokens = tokens_for(checkpoint, 4, 32)
    online = Logits(tokens=8 * 128).plan(checkpoint, tokens).minutes
    cached = Logits(tokens=8 * 128, cache=Cache()).plan(checkpoint, tokens).minutes
    assert cached / online == pytest.approx((3 * 8 + 1) / (4 * 8))


def test_more_tokens_than_there_are_cannot_be_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cache\.k is 321, and the vocabulary has 320 tokens"):
        plan(recipe_of(tmp_path, tiny_model(), {"codec": "topk", "k": 321}), RunOptions(tmp_path / "out"))
    assert plan(recipe_of(tmp_path, tiny_model(), {"codec": "topk", "k": 320}), RunOptions(tmp_path / "out")).stages


def test_rows_come_back_in_any_order_and_without_padding(tmp_path: Path, small_shards: None) -> None:
    settings = Cache(draws=4)
    tokens = Tokens.of(torch.zeros(5, LENGTH + 16, dtype=torch.int64), torch.tensor([3, 1, 5, 2, 4]))
    cache = TeacherCache(tmp_path / "cache", settings, tokens, {"vocabulary": 11})
    every = torch.randn(int(positions(tokens).sum()), 11, generator=torch.Generator().manual_seed(0))
    starts = [0, 2, 2, 6, 7, 10]
    while cache.missing:
        rows = cache.rows(cache.missing[0])
        part = every[starts[rows.start] : starts[rows.stop]]
        cache.add(encode(settings, part, torch.full((len(part), 1), 0.5, dtype=torch.float64)))
    again = TeacherCache(tmp_path / "cache", settings, tokens, {"vocabulary": 11})
    assert not again.missing and again.token_count == 10 and again.sha256 == cache.sha256
    entropy = torch.distributions.Categorical(logits=every).entropy()
    for rows in ([4, 0], [1], [3, 2, 2]):
        wanted = torch.cat([entropy[starts[row] : starts[row + 1]] for row in rows])
        assert torch.allclose(-again.batch(torch.tensor(rows)).negentropy_N, wanted, atol=1e-5)
