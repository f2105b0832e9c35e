"""The gate: each bound, kept and missed; a bound without its figure fails."""

import pytest

from compress.core.recipe import Gate
from compress.evaluate import check_gate
from tests.sample_run import sample_evaluation

SIZES = {"bytes": 100_000_000}

CASES = {
    "perplexity increase": ({"max_perplexity_increase": "3%"}, {"max_perplexity_increase": "2%"}, "rose by 2.1 %"),
    "perplexity": ({"max_perplexity": 16.0}, {"max_perplexity": 15.7}, "perplexity is 15.95, more than the 15.7"),
    "kl": ({"max_kl": 0.03}, {"max_kl": 0.02}, "KL divergence is 0.0291"),
    "size": ({"max_size": "100MB"}, {"max_size": "99MB"}, "takes 100 MB, more than the 99.0 MB"),
    "accuracy": (
        {"min_accuracy": {"hellaswag": "43%"}},
        {"min_accuracy": {"hellaswag": "44%"}},
        "hellaswag is 43.2 %, less than the 44 %",
    ),
    "unknown task": ({}, {"min_accuracy": {"other": 0.1}}, "accuracy of other was not measured"),
}


@pytest.mark.parametrize("case", CASES)
def test_bounds(case):
    kept, missed, message = CASES[case]
    assert check_gate(Gate.model_validate(kept), sample_evaluation(), SIZES) == []
    failures = check_gate(Gate.model_validate(missed), sample_evaluation(), SIZES)
    assert len(failures) == 1
    assert message in failures[0]


def test_drop_of_accuracy():
    evaluation = sample_evaluation()
    evaluation["tasks"]["hellaswag"]["acc_norm"]["difference"] = -0.011
    assert check_gate(Gate(max_accuracy_drop=0.02), evaluation, SIZES) == []
    assert "fell by 1.1 %" in check_gate(Gate(max_accuracy_drop=0.01), evaluation, SIZES)[0]
    evaluation["tasks"] = {}
    assert "no task was measured" in check_gate(Gate(max_accuracy_drop=0.01), evaluation, SIZES)[0]


@pytest.mark.parametrize("evaluation", [None, {"perplexity": {"increase": None, "artifact": None}, "kl": None}])
def test_a_bound_without_its_figure_fails(evaluation):
    gate = Gate(max_perplexity_increase=0.5, max_perplexity=100.0, max_kl=1.0)
    failures = check_gate(gate, evaluation, SIZES)
    assert len(failures) == 3
    assert all("not measured" in failure for failure in failures)


def test_no_gate_is_passed():
    assert check_gate(None, None, {}) == []


def test_every_task_and_length_keeps_the_bound_on_recall() -> None:
    tasks = {
        "needle": {"512": {"difference": -0.25}, "4096": {"difference": -0.1}},
        "table": {"512": {"difference": 0.1}},
    }
    assert check_gate(Gate(max_recall_drop=0.25), {"long_context": {"tasks": tasks}}, {}) == []
    [missed] = check_gate(Gate(max_recall_drop=0.2), {"long_context": {"tasks": tasks}}, {})
    assert missed == "right answers of needle in 512 tokens fell by 25 %, more than the 20 % allowed"
    tasks["table"]["512"] = {"difference": None}
    for measured in ({}, {"long_context": {"tasks": tasks}}):
        [missed] = check_gate(Gate(max_recall_drop=0.2), measured, {})
        assert "was not measured" in missed
