"""Preference recovery: the loss is the paper's, pairs follow from the seed, runs go on, and zeros and grids stay."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint, load_tokenizer
from compress.core.errors import EnvironmentRefused, InputError, UsageError
from compress.core.events import Event, Notice
from compress.core.files import sha256_file
from compress.core.journal import Journal
from compress.core.kept import Kept
from compress.core.passes import Job
from compress.core.verify import verify
from compress.pipeline import RunOptions, run
from compress.sampling import RuntimeSampler
from distill._preference import judged
from distill._preference_pairs import Pair, PairBatch, answered, asked
from distill.preference import Preference
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for
from tests.distill.test_generated import changed
from tests.distill.test_logits import Losses, Stopped, recipe_of

WANDA = {"prune": {"method": "wanda", "pattern": "2:4"}}
W3 = {"quantize": {"method": "rtn", "scheme": "w3a16", "group_size": 16}}
PAIRS = [Pair([5, 6, 7], [8, 9], [10]), Pair([20], [30, 31, 32, 257], [33, 34, 35, 36, 37]), Pair([1, 2], [3], [4])]


def lessons(**settings: Any) -> dict[str, Any]:
    asked = {"method": "preference", "prompt_tokens": 6, "new_tokens": 8, "batch": 2, "epochs": 2.0}
    return {"distill": {**asked, "learning_rate": 1e-3, "save_every": 2, "rows_at_once": 2, **settings}}


def by_hand(model: Any, pair: Pair) -> tuple[float, float]:
    """How likely both answers are, in nats, from the logits of each alone."""
    found = []
    for answer in (pair.chosen, pair.rejected):
        with torch.no_grad():
            log_p_TV = model(input_ids=torch.tensor([pair.prompt + answer])).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_p_TV[len(pair.prompt) - 1 + n, token]) for n, token in enumerate(answer)))
    return found[0], found[1]


def expected(loss: str, beta: float, before: tuple[float, float], after: tuple[float, float], pair: Pair) -> float:
    """The paper's formulas (2305.18290 eq. 7; 2310.12036 eq. 17, with log-probabilities a token as its authors use)."""
    chosen, rejected = after[0] - before[0], after[1] - before[1]
    if loss == "ipo":
        return (chosen / len(pair.chosen) - rejected / len(pair.rejected) - 1 / (2 * beta)) ** 2
    return math.log1p(math.exp(-beta * (chosen - rejected)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_the_loss_is_that_of_the_paper(tiny_model: TinyModel, family: str) -> None:
    from distill._preference_trl import Objective

    source = Checkpoint.open(tiny_model(family))
    model, other = source.build_model(torch.float32), changed(source, 1).build_model(torch.float32)
    states = random.getstate(), torch.random.get_rng_state()
    reference_N2 = Objective(Preference(), other, PAIRS).log_probabilities()
    by_pair = [by_hand(other, pair) for pair in PAIRS]
    assert torch.allclose(reference_N2, torch.tensor(by_pair), atol=1e-3)
    for loss, beta in (("sigmoid", 0.3), ("ipo", 0.5)):
        objective = Objective(Preference(loss=loss, beta=beta), model, PAIRS)  # type: ignore[arg-type]
        value = objective.loss(reference_N2)(PairBatch(torch.tensor([2, 0, 1])))
        nows = [by_hand(model, pair) for pair in PAIRS]
        both = zip(by_pair, nows, PAIRS, strict=True)
        assert float(value) == pytest.approx(sum(expected(loss, beta, *each) for each in both) / 3, rel=1e-4), loss
        objective.loss(reference_N2)(PairBatch(torch.tensor([1])))
        won = [(now[0] - then[0]) - (now[1] - then[1]) for then, now in zip(by_pair, nows, strict=True)]
        won.append(won[1])
        figures = {"reward_accuracy": sum(each > 0 for each in won) / 4, "reward_margin": beta * sum(won) / 4}
        assert objective.figures() == pytest.approx(figures, rel=1e-3), loss
    assert states[0] == random.getstate() and torch.equal(states[1], torch.random.get_rng_state())


def test_what_training_won_is_counted() -> None:
    before_N2, after_N2 = torch.tensor([[-4.0, -2.0], [-1.0, -1.0]]), torch.tensor([[-3.0, -5.0], [-2.0, -1.5]])
    assert judged(before_N2, after_N2) == {"accuracy": 0.5, "margin": 1.75, "chosen": 0.0}


def test_pairs_follow_from_the_weights_and_equal_answers_drop_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_model("llama"))
    compressed = changed(source, 3)
    opened: list[Checkpoint] = []

    def sampler(of: Checkpoint, *asked: Any) -> RuntimeSampler:
        opened.append(of)
        return RuntimeSampler(of, *asked, device="cpu")

    def pairs(student: Checkpoint, keep: Any = None, **asked: Any) -> list[Pair]:
        job = Job(student, tokens_for(source, samples=5), Shelf(), original=source, open_sampler=sampler)
        job = Job(**{**job.__dict__, "keep": keep}) if keep else job
        found, prompts = answered(Preference(prompt_tokens=4, new_tokens=5, **asked), job)
        assert len(found) <= prompts
        return found

    kept = Kept(tmp_path / "kept", Journal(tmp_path / "journal.jsonl", {}), 0)
    found = pairs(compressed, kept)
    assert 0 < len(found) <= 5 and all(pair.chosen != pair.rejected for pair in found)
    assert found == pairs(compressed)
    count = len(opened)
    assert found == pairs(compressed, kept) and len(opened) == count  # the files say it: nothing is generated again
    assert pairs(source) == []


def test_a_prompt_ends_where_it_is_told(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("llama"))
    mark = load_tokenizer(source.folder).encode("boat:\n", add_special_tokens=False)
    assert len(mark) > 1
    rows = [[9, 9, *mark, 5], [*mark[:-1], 9, *mark], [9] * 6, [9] * 9 + mark, [*mark, *mark]]
    ids = torch.zeros(5, 24, dtype=torch.int64)
    for row, begun in zip(ids, rows, strict=True):
        row[: len(begun)] = torch.tensor(begun)
    lengths = torch.tensor([len(begun) for begun in rows])
    lengths[4] = len(mark) - 1  # what is behind it is padding
    job = Job(source, Tokens.of(ids, lengths), Shelf())
    most = len(mark) + 8
    found, prompts = asked(Preference(until="boat:\n", prompt_tokens=most), job)
    assert found == ([0, 1] if 2 * len(mark) <= most else [0])
    assert prompts(torch.tensor([0]), frozenset({9})) == [[9, 9, *mark]]
    with pytest.raises(InputError, match="no row of the text has 'whale' in its first 4 tokens"):
        asked(Preference(until="whale", prompt_tokens=4), job)


@pytest.mark.parametrize(
    ("stage", "asked"),
    [(WANDA, {}), (WANDA, {"rank": 4, "learning_rate": 0.02}), (W3, {"code_rate": 0.05})],
    ids=["weights", "low-rank", "codes"],
)
def test_a_stopped_run_ends_with_the_same_losses_and_bytes(
    tiny_model: TinyModel, tmp_path: Path, stage: dict[str, Any], asked: dict[str, Any]
) -> None:
    recipe = recipe_of(tmp_path, tiny_model("llama", False, "bfloat16"), stage, lessons(**asked))
    whole, first, second = Losses(), Losses(3), Losses()
    result = run(recipe, RunOptions(tmp_path / "whole"), whole)
    with pytest.raises(Stopped):
        run(recipe, RunOptions(tmp_path / "stopped"), first)
    again = run(recipe, RunOptions(tmp_path / "stopped"), second)
    assert len(whole.values) > 4 and first.values == whole.values[:3] and second.values == whole.values[2:]
    assert whole.values[0] == pytest.approx(math.log(2), abs=1e-4) and whole.values[-1] < 0.5
    same = [{p.name: sha256_file(p) for p in folder.iterdir()} for folder in (result.artifact, again.artifact)]
    assert same[0] == same[1]
    figures, after_stop = (each.summary["stages"][-1]["figures"] for each in (result, again))
    assert figures == after_stop and len(figures["reward_margin"]) == len(whole.values)
    assert figures["reward_accuracy"][-1] > 0.5 and figures["reward_margin"][-1] > figures["reward_margin"][0]
    assert verify(result.artifact).ok
    student = Checkpoint.open(result.artifact)
    assert student.kind == ("quantized" if stage is W3 else "masked")
    for index in range(student.num_blocks if stage is WANDA else 0):
        for name in student.sites(index):
            assert int((student.weight(name).reshape(-1, 4) != 0).sum(1).max()) == 2, name


def test_a_model_that_answers_alike_is_left_as_it_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, heard = tiny_model("llama", False, "bfloat16"), []

    def listener(event: Event) -> None:
        heard.append(event)

    result = run(recipe_of(tmp_path, folder, lessons()), RunOptions(tmp_path / "out"), listener)
    source, same = Checkpoint.open(folder), Checkpoint.open(result.artifact)
    assert all(torch.equal(source.tensor(name), same.tensor(name)) for name in source.tensors)
    assert any("nothing is trained" in event.message for event in heard if isinstance(event, Notice))


def test_plans(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(source, samples=40)
    short = {"prompt_tokens": 8, "new_tokens": 8}
    once, twice = (Preference(**short, epochs=epochs).plan(source, tokens) for epochs in (1.0, 2.0))
    assert 1 < twice.minutes / once.minutes < 2  # answers are written once
    low_rank = Preference(**short, rank=2, layers=("*.q_proj",)).plan(source, tokens)
    assert low_rank.peak_memory_bytes < once.peak_memory_bytes
    assert {layer.name.rpartition(".")[2] for layer in low_rank.layers if layer.reason} == {"q_proj"}
    with pytest.raises(UsageError, match="pairs are 41, and the calibration text has 40 rows"):
        Preference(**short, pairs=41).plan(source, tokens)
    assert "codes are trained" in (Preference(rank=4).refusal("quantized") or "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="trains in one process"):
        Preference(**short).plan(source, tokens)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentRefused, match="needs the package trl"):
        Preference(**short).plan(source, tokens)
