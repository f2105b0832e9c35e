"""Recall of facts from long contexts: a model that copies finds all, one that sees no farther than a window finds what
stands within it, and the report names what was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.core.calibration import Encoder
from compress.core.checkpoint import Checkpoint, load_tokenizer
from compress.core.errors import InputError, RecipeError, UsageError
from compress.core.recipe import Evaluation, parse_evaluation, parse_recipe
from compress.evaluate import evaluate
from compress.evaluate._haystack import filler, read_haystack
from compress.evaluate._recall import KEYS, ROOM, questions
from compress.evaluate.long_context import judged
from compress.report.data import report_data
from compress.report.figures import long_context_rows
from tests.sample_run import sample_run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIGHT = 160
TEXT = "A ferry left the pier at dawn. Gulls followed it over the bar. The captain kept his hands in his coat. " * 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a model that copies from anywhere, the same weights under a sliding window)."""
    folder = tmp_path_factory.mktemp("copying")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import make_induction_model

        make_induction_model.make_model(folder / "whole", heads=2, kv_heads=1, context_tokens=1024)
    shutil.copytree(folder / "whole", folder / "window")
    config = json.loads((folder / "whole" / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": SIGHT}
    (folder / "window" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "bias" not in k}))
    (folder / "text.txt").write_text(TEXT)
    return folder / "whole", folder / "window"


def asked(**settings: Any) -> Evaluation:
    return parse_evaluation({"numerics": "exact", "long_context": {"lengths": [400], "samples": 5, **settings}})


def encoder(folder: Path) -> Encoder:
    return Encoder(load_tokenizer(folder))


@pytest.fixture(scope="module")
def result(models: tuple[Path, Path]) -> dict[str, Any]:
    whole, window = map(Checkpoint.open, models)
    long_context = asked(dataset=str(models[0].parent / "text.txt"))
    return evaluate(whole, window, long_context)


def test_what_stands_beyond_the_window_is_lost_and_told(models: tuple[Path, Path], result: dict[str, Any]) -> None:
    found = result["long_context"]
    long_context = asked(dataset=str(models[0].parent / "text.txt")).long_context
    assert long_context is not None
    haystack = read_haystack(long_context, None, offline=True, seed=0)
    seen = {}
    for question in questions(long_context, haystack, encoder(models[0]), 0):
        far = len(question.text) - question.text.index(question.answer)  # a byte is a token
        seen[question.task, question.number] = far < SIGHT
    lost = {(each["task"], each["sample"]) for each in found["regressions"]}
    assert lost == {which for which, near in seen.items() if not near}
    assert 0 < len(lost) < len(seen)
    for task, lengths in found["tasks"].items():
        near = [which for which, is_near in seen.items() if which[0] == task and is_near]
        assert lengths["400"]["original"] == 1.0
        assert lengths["400"]["artifact"] == pytest.approx(len(near) / 5)
        assert lengths["400"]["regressed"] == 5 - len(near)
        assert lengths["400"]["exact_tokens"]["original"] == 1.0
    # windows of text end at 400 tokens, and repeat themselves within the window: both models know as much
    windows = found["perplexity"]["400"]
    assert windows["n"] == 5 and windows["original"] > 1
    assert result["protocol"]["long_context"]["windows"] == {"400": 5}


def test_perplexity_is_that_of_transformers(models: tuple[Path, Path], result: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(models[1])
    ids = torch.tensor(encoder(models[1])(TEXT))[:2000].view(5, 400)
    with torch.no_grad():
        losses = [float(network(row[None], labels=row[None]).loss) for row in ids]
    expected = float(torch.tensor(losses).mean().exp())
    assert result["long_context"]["perplexity"]["400"]["artifact"] == pytest.approx(expected, rel=1e-3)


def test_questions_fill_their_length_and_hide_one_fact(models: tuple[Path, Path]) -> None:
    long_context = asked(lengths=[300, 700]).long_context
    assert long_context is not None
    encode = encoder(models[0])
    found = questions(long_context, filler(3), encode, seed=3)
    assert len(found) == 4 * 2 * 5
    longest = max(map(len, filler(3).sentences))
    for question in found:
        prompt, answer = question.ids(encode)
        size = len(prompt) + len(answer) + ROOM
        assert question.length - longest - 2 < size <= question.length
        assert encode.tokenizer.decode(answer).strip() == question.answer
        assert question.text.count(question.answer) == 1
    assert questions(long_context, filler(3), encode, seed=3) == found
    assert questions(long_context, filler(3), encode, seed=4) != found
    assert len({key[-4:] for key in KEYS}) == len(KEYS)


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 58213.", True), ("58213", True), (" 582134", False), (" 5821", False), (" It is 58213", False)],
)
def test_right_is_the_whole_number_first(text: str, right: bool) -> None:
    completion: Any = SimpleNamespace(text=text, token_ids=(1, 2, 3))
    assert judged(completion, "58213", (1, 2)).right is right
    assert judged(completion, "58213", (1, 2)).exact and not judged(completion, "58213", (1, 3)).exact


def test_a_split_keeps_tokens_whole(tiny_models: tuple[Path, Path]) -> None:
    """A tokenizer joins the space to the word behind it: the token belongs to the end."""
    encode = encoder(Path("compress/demo/model"))
    before, after = encode.split("The “little” dog is ", "here")
    assert before + after == encode("The “little” dog is here")
    assert encode.tokenizer.decode(after) in ("here", " here")
    assert "here" not in encode.tokenizer.decode(before)
    with pytest.raises(InputError, match="no tokens that read"):
        encoder(tiny_models[0]).split("the dog sat ", "58213")


def test_the_report_shows_what_was_lost(result: dict[str, Any]) -> None:
    rows = {row.name: row for row in long_context_rows(result)}
    assert rows["needle, 400 tokens (n = 5)"].before == "100 %"
    lost = result["long_context"]["regressions"]
    assert rows["answers: right before, wrong now"].after == str(len(lost))
    shown = report_data(sample_run() | {"evaluation": result}).regressions
    assert len(shown) == len(lost) and shown[0][3] == lost[0]["answer"]


def test_what_cannot_be_asked_is_refused(models: tuple[Path, Path]) -> None:
    whole = Checkpoint.open(models[0])
    with pytest.raises(UsageError, match="alone takes"):
        evaluate(None, whole, asked(lengths=[256], tasks=["table"], prefix="x" * 200))
    with pytest.raises(UsageError, match="max_length"):
        evaluate(None, whole, asked(lengths=[1200], samples=1))
    stages = [{"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}}]
    wrong = {"model": "m", "stages": stages, "evaluate": {"through": "transformers", "long_context": {}}}
    with pytest.raises(RecipeError, match="through the runtime alone"):
        parse_recipe(wrong)
