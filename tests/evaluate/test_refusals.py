"""Refusals: what counts as one, that the bundled prompts are those of their script, and what the figures come to."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compress.cli.tables import NOTHING, quality_rows
from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, RecipeError
from compress.core.recipe import Evaluation, Gate, parse_recipe
from compress.core.recipe_sections import Refusals
from compress.evaluate import check_gate, evaluate
from compress.evaluate.make_refusal_prompts import HARMLESS, main
from compress.evaluate.refusals import BUNDLED, measure_refusals, read_prompts, refuses
from compress.report import words
from compress.report.figures import refusal_rows
from tests.conftest import TinyModel

REFUSED = [
    "I'm sorry, but I can't help with that.",
    "I\N{RIGHT SINGLE QUOTATION MARK}m really sorry, but no.",
    "  **Sorry**, I cannot assist.",
    "I cannot provide instructions for this.",
    "As an AI language model, I am unable to do so.",
    "Unfortunately, I am not able to help.",
    "I must decline.",
    "I apologize, but this is illegal.",
    "It's not appropriate to explain this.",
]
ANSWERED = [
    "Sure, here is how: first, find a window.",
    "First, warm the oven. I'm sorry if that takes long.",
    "I can help with that.",
    "Sorrel grows in the garden.",
    "I cannotate texts for a living.",
    "It is a sunny day.",
    "",
]


def test_refusals_are_known_by_their_first_words() -> None:
    assert [text for text in REFUSED if not refuses(text)] == []
    assert [text for text in ANSWERED if refuses(text)] == []


def test_the_bundled_prompts_are_those_of_the_script(tmp_path: Path) -> None:
    main(tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_bytes() == BUNDLED.read_bytes()
    prompts = read_prompts(BUNDLED)
    assert len(set(prompts)) == 48 and sum(kind == "harmful" for kind, _ in prompts) == 24


def test_other_prompts_are_read_or_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"kind": "harmful", "prompt": "a"}\n\n{"kind": "bad", "prompt": "b"}\n')
    with pytest.raises(InputError, match="no prompt with its kind") as error:
        read_prompts(path)
    assert str(error.value.where).endswith("own.jsonl:3")
    path.write_text('{"kind": "harmful", "prompt": "a"}\n')
    with pytest.raises(InputError, match="not both"):
        read_prompts(path)


class Speaker:
    """A scorer that refuses prompts by rule."""

    folder = Path()
    protocol: dict[str, Any] = {}

    def __init__(self, rule: Any) -> None:
        self._rule = rule

    @contextmanager
    def language_model(self, stage: str, events: Any) -> Any:
        yield self

    def generate_until(self, requests: list) -> list[str]:
        return ["I'm sorry, no." if self._rule(request.args[0]) else "Well," for request in requests]


def test_a_change_in_both_directions_is_a_change() -> None:
    harmless = [f" {act}" for act in HARMLESS[:6]]
    before = Speaker(lambda text: "guide" in text)
    after = Speaker(lambda text: "guide" in text and "bully" not in text or any(act in text for act in harmless))
    figures, protocol = measure_refusals((before, after), Refusals(), Evaluation())  # type: ignore[arg-type]
    asked = read_prompts(BUNDLED)
    moved = [text for _, text in asked if ("guide" in text) != after._rule(text)]
    assert 0 < len(moved) < 12
    assert figures["changed"]["share"] == len(moved) / 48 and figures["harmful"]["n"] == 24
    low, high = figures["changed"]["interval"]
    assert low < figures["changed"]["share"] < high
    assert figures["harmful"]["original"] == sum("guide" in t for k, t in asked if k == "harmful") / 24
    alone, _ = measure_refusals((None, after), Refusals(), Evaluation())  # type: ignore[arg-type]
    assert alone["changed"] is None and alone["harmless"] == {**figures["harmless"], "original": None}
    assert protocol["prompts"] == 48


def test_bounds_on_flips_and_refusals() -> None:
    found = {"flips": {"share": 0.06}, "refusals": {"changed": {"share": 0.03}}}
    assert check_gate(Gate(max_flip_rate=0.06, max_refusal_change=0.03), found, {}) == []
    [flips, refusals] = check_gate(Gate(max_flip_rate=0.05, max_refusal_change=0.02), found, {})
    assert flips == "the share of flips is 6 %, more than the 5 % that the gate allows"
    assert refusals == "the share of changed refusals is 3 %, more than the 2 % that the gate allows"
    assert len(check_gate(Gate(max_flip_rate=0.5, max_refusal_change=0.5), {}, {})) == 2  # not measured


def test_a_report_shows_them() -> None:
    harmful, harmless = ({"original": share, "artifact": 0.25, "n": 24} for share in (0.75, None))
    changed = {"share": 0.5, "interval": [0.4, 0.6]}
    found = {"refusals": {"harmful": harmful, "harmless": harmless, "changed": changed}}
    rows = {row.name: (row.before, row.after, row.interval) for row in refusal_rows(found)}
    assert rows["harmful prompts refused (n = 24)"][:2] == ("75 %", "25 %")
    assert rows["harmless prompts refused (n = 24)"][:2] == (words.NONE, "25 %")
    assert rows["refused by one of the two alone"] == (words.NONE, "50 %", "40 % … 60 %")
    assert list(quality_rows(found))[-1][:3] == ("refused by one alone", NOTHING, "50.0 %")
    assert refusal_rows({}) == refusal_rows({"refusals": None}) == []


@pytest.mark.parametrize(
    ("bound", "missing"),
    [("max_flip_rate", "perplexity"), ("max_refusal_change", "refusals"), ("max_recall_drop", "long_context")],
)
def test_a_bound_needs_its_measurement(tmp_path: Path, bound: str, missing: str) -> None:
    data = {"model": "m", "stages": [{"quantize": {"method": "rtn"}}], "gate": {bound: "5%"}}
    with pytest.raises(RecipeError, match="needs a measurement") as error:
        parse_recipe(data, base_folder=tmp_path)
    assert missing in str(error.value.hint)


@pytest.mark.parametrize("through", ["runtime", "transformers"])
def test_models_are_asked(tiny_model: TinyModel, through: Any) -> None:
    model = Checkpoint.open(tiny_model("llama"))
    asked = Evaluation(refusals=Refusals(new_tokens=2), through=through)
    found = evaluate(model, model, asked)["refusals"]
    assert found["changed"]["share"] == 0
    assert found["harmless"]["original"] == found["harmless"]["artifact"] == 0
