"""What is scored through the bundled runtime: the same requests as through transformers, and figures that agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.events import silent
from compress.core.numerics import runtime_dtype
from compress.core.recipe import Evaluation
from compress.evaluate.parity import compare_logits, measure_parity
from compress.evaluate.scorers import RuntimeScorer, TransformersScorer
from compress.evaluate.tasks import measure_tasks

DEMO = Path("compress/demo/model").absolute()
STORY = "One day a small boat sailed to the island, and a bird sat down on its mast. "


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint.open(DEMO)


def tolerance(numerics: Literal["exact", "fast"], fp32: float, bf16: float) -> float:
    """Fast numerics compute in bf16 where the CPU has instructions for it."""
    return fp32 if runtime_dtype(numerics, "cpu") is torch.float32 else bf16


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_loglikelihoods_are_those_of_transformers(demo: Checkpoint, numerics: str) -> None:
    asked = requests(
        (STORY, " The bird sang."),
        (STORY, " The bird sang a song. "),
        (STORY, " sat"),
        ("", "A cat"),
        ("ends with spaces  ", "and goes on"),
        (STORY * 60, "too long a context is cut from the left"),
    )
    rolled = requests((STORY,), (STORY * 60,), ("A",))
    found = {}
    scorers = (
        ("reference", TransformersScorer(demo, dtype="float32")),
        ("ours", RuntimeScorer(demo, numerics=numerics)),
    )
    near = tolerance(numerics, 1e-3, 0.1)
    for name, scorer in scorers:
        with scorer.language_model("test", silent) as model:
            found[name] = model.loglikelihood(asked), model.loglikelihood_rolling(rolled)
    for reference, ours in zip(found["reference"][0][:-1], found["ours"][0][:-1], strict=True):
        assert ours[0] == pytest.approx(reference[0], abs=near)
        assert ours[1] == reference[1]
    # the runtime keeps one token less of an overlong context: a prompt may not be longer than the model
    assert found["ours"][0][-1][0] == pytest.approx(found["reference"][0][-1][0], rel=0.02)
    assert found["ours"][1][0] == pytest.approx(found["reference"][1][0], abs=near)
    assert found["ours"][1][1] == pytest.approx(found["reference"][1][1], rel=0.01)  # other windows
    assert found["ours"][1][2] == pytest.approx(found["reference"][1][2], abs=near)


def test_generations_are_those_of_transformers(demo: Checkpoint) -> None:
    asked = requests(
        (STORY, {"until": ["."], "max_gen_toks": 24}),
        (STORY, {"until": ["\n\n"], "max_gen_toks": 7, "do_sample": False}),
        (STORY + "Then", {"until": "bird", "max_gen_toks": 24, "temperature": 0.0}),
    )
    found = []
    for scorer in (TransformersScorer(demo), RuntimeScorer(demo, numerics="exact")):
        with scorer.language_model("test", silent) as model:
            found.append(model.generate_until(asked))
    assert found[0] == found[1]
    assert all(found[0])


def test_a_generation_setting_that_the_runtime_lacks_is_refused(demo: Checkpoint) -> None:
    with RuntimeScorer(demo).language_model("test", silent) as model, pytest.raises(UsageError, match="num_beams"):
        model.generate_until(requests((STORY, {"num_beams": 4, "max_gen_toks": 4})))


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_logits_of_windows_are_those_of_transformers(demo: Checkpoint, numerics: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.of(torch.randint(2048, (5, 70), generator=generator))
    reference = torch.cat(list(TransformersScorer(demo, dtype="float32").logits(tokens)))
    ours = torch.cat(list(RuntimeScorer(demo, numerics=numerics).logits(tokens)))
    torch.testing.assert_close(
        ours, reference, atol=1e-4 if numerics == "exact" else tolerance(numerics, 1e-3, 0.2), rtol=1e-3
    )


def test_tasks_have_the_same_figures_either_way(demo: Checkpoint) -> None:
    asked = Evaluation(tasks=("demo_word_swap",), task_folder="compress/demo/tasks", limit=12)
    tasks, _, _ = measure_tasks(TransformersScorer(demo), RuntimeScorer(demo, numerics="exact"), asked)
    assert tasks["demo_word_swap"]["acc"]["difference"] == 0


def test_parity_is_measured_and_noticed_when_it_is_not_there(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measure_parity(demo, None, None)
    assert record["passed"] is True
    assert record["exact_to_transformers"]["largest_logprob_difference"] < 1e-4
    logits = RuntimeScorer.logits
    monkeypatch.setattr(RuntimeScorer, "logits", lambda *given: (1.01 * part for part in logits(*given)))
    assert measure_parity(demo, None, None)["passed"] is False


def test_the_comparison_of_logits_leaves_padding_out() -> None:
    tokens = Tokens.of(torch.tensor([[1, 2, 3, 0]]), torch.tensor([3]))
    before, after = torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)
    after[0, 2:] = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    same = {"largest_logprob_difference": 0.0, "greedy_agreement": 1.0, "kl": 0.0}
    assert compare_logits(tokens, [before], [after]) == [same]


def test_three_models_are_compared_in_turn_in_one_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.of(torch.tensor([[1, 2, 3, 0], [4, 0, 2, 2]]))
    first, second, third = (torch.randn(2, 4, 5, generator=generator) for _ in range(3))
    read = []

    def once(logits: torch.Tensor) -> Iterator[torch.Tensor]:
        read.append(logits)
        yield from logits.split(1)

    together = compare_logits(tokens, once(first), once(second), once(third))
    assert len(read) == 3
    assert together == [*compare_logits(tokens, [first], [second]), *compare_logits(tokens, [second], [third])]
    log_p, log_q = (torch.log_softmax(logits[:, :-1].double(), -1) for logits in (first, second))
    assert together[0]["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)


def test_parity_runs_each_model_once(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    logits = RuntimeScorer.logits

    def counted(scorer: RuntimeScorer, tokens: Tokens) -> Iterator[torch.Tensor]:
        runs.append(scorer.numerics)
        return logits(scorer, tokens)

    monkeypatch.setattr(RuntimeScorer, "logits", counted)
    measure_parity(demo, None, None)
    assert sorted(runs) == ["exact", "fast"]
