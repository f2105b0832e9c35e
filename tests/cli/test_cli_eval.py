"""compress eval: what the numerics of the runtime add is said beside the figures."""

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("One day a hen and a cat went to see the sea. " * 20)
    return path


def test_fast_numerics_are_compared_with_exact_ones(call, tiny_model, text: Path) -> None:
    called = call("eval", tiny_model("llama"), "--text", text, "--window", "64")
    assert called.code == 0, called.err
    assert "KL from exact ones" in called.err
    [evaluation] = [each["evaluation"] for each in call(
        "eval", tiny_model("llama"), "--text", text, "--window", "64", "--json"
    ).objects if "evaluation" in each]  # fmt: skip
    assert 0 <= evaluation["fast_to_exact"]["kl"] < 0.01
    assert evaluation["fast_to_exact"]["greedy_agreement"] > 0.9


@pytest.mark.parametrize("options", [("--numerics", "exact"), ("--through", "transformers")])
def test_nothing_is_compared_where_nothing_was_fast(call, tiny_model, text: Path, options: tuple[str, ...]) -> None:
    called = call("eval", tiny_model("llama"), "--text", text, "--window", "64", *options)
    assert called.code == 0, called.err
    assert "KL from exact" not in called.err
