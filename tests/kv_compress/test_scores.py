"""Scores and what they keep, against what kvpress keeps on the same inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kv_compress._budget import falling
from kv_compress._scores import Observed, keep, scorer
from kv_compress.adakv import keep_among

ORACLE = Path(__file__).parents[1] / "oracles" / "expected" / "kvpress-keeps.safetensors"
PROTECTED = {"streaming": (4, 1), "tova": (0, 1), "snapkv": (0, 6), "expected_attention": (4, 0)}
QUERIES = {"tova": 1, "snapkv": 6, "expected_attention": 44}  # expected attention: all but the sinks'


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    return load_file(ORACLE)


def observed(oracle: dict[str, torch.Tensor], method: str, **changes) -> Observed:
    queries = QUERIES.get(method, 0)
    q_HTD = oracle["q"]
    fields = {
        "k_GSD": oracle["k"], "v_GSD": oracle["v"], "q_HWD": q_HTD[:, q_HTD.shape[1] - queries :],
        "scale": q_HTD.shape[2] ** -0.5, "softcap": None, "position": q_HTD.shape[1],
        "frequency_F": oracle["frequency"], "protected": PROTECTED.get(method, (0, 0)),
    }  # fmt: skip
    return Observed(**fields | changes)


@pytest.mark.parametrize("count", [12, 24, 40])
@pytest.mark.parametrize("method", ["streaming", "key_norm", "keydiff", "tova", "snapkv", "expected_attention"])
def test_the_same_slots_stay_as_in_kvpress(oracle: dict[str, torch.Tensor], method: str, count: int) -> None:
    given = observed(oracle, method)
    kept_GN = keep(scorer(method)(given), count, given.protected)
    assert torch.equal(kept_GN, oracle[f"{method}.{count}"].long())


@pytest.mark.parametrize("count", [12, 24, 40])
def test_layers_and_heads_keep_what_they_keep_in_kvpress(oracle: dict[str, torch.Tensor], count: int) -> None:
    """kvpress gives a layer its share of the budget with the window within it, here the window comes on top."""
    given = observed(oracle, "snapkv")
    kept_GN = keep_among(scorer("adakv")(given).unbind(), count, given.protected, 0.2)
    expected_GS = oracle[f"adakv.{count}"].bool()
    assert [kept_N.tolist() for kept_N in kept_GN] == [stays_S.nonzero()[:, 0].tolist() for stays_S in expected_GS]
    theirs = [oracle[f"pyramidkv.{count}.{layer}"] for layer in range(4)]
    for expected_GN in theirs:
        [*kept_GN] = keep_among(scorer("pyramidkv")(given).unbind(), expected_GN.shape[1], given.protected, 1.0)
        assert torch.equal(torch.stack(kept_GN), expected_GN.long())
    if count > 12:  # else kvpress gives up on layers
        ours = falling(count + 6, 6, [48] * 4, 3)
        assert all(abs(kept - 6 - of.shape[1]) <= 1 for kept, of in zip(ours, theirs, strict=True))
        assert sum(ours) == 4 * (count + 6) and (ours[0] > ours[3] or count == 40)


def test_ties_go_to_the_older_and_the_protected_stay() -> None:
    scores_GS = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert keep(scores_GS, 4, (1, 1)).tolist() == [[0, 1, 2, 5], [0, 1, 2, 5]]
    assert keep(scores_GS, 3, (0, 2)).tolist() == [[2, 4, 5], [0, 4, 5]]
    assert keep(torch.zeros(1, 6), 3, (0, 0)).tolist() == [[0, 1, 2]]


def test_lots_follow_from_the_seed(oracle: dict[str, torch.Tensor]) -> None:
    draw = scorer("random")
    one, same, other = (draw(observed(oracle, "random", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (2, 48) and not torch.equal(one[0], one[1])


def test_observed_queries_do_not_see_what_is_later(oracle: dict[str, torch.Tensor]) -> None:
    """Attention with a soft-cap, one query and head at a time."""
    given = observed(oracle, "snapkv", softcap=3.0)
    attention_GRWS = given.attention()
    for head, query in ((0, 0), (3, 2), (2, 5)):
        seen = 48 - 6 + query + 1
        score = given.k_GSD[head // 2, :seen] @ given.q_HWD[head, query] * given.scale
        expected = torch.softmax(3.0 * torch.tanh(score / 3.0), dim=0)
        torch.testing.assert_close(attention_GRWS[head // 2, head % 2, query, :seen], expected)
        assert (attention_GRWS[head // 2, head % 2, query, seen:] == 0).all()
