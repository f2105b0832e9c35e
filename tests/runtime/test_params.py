"""Sampling settings: what is wrong is refused by name before it reaches a batch (bad sampling inputs)."""

from __future__ import annotations

import math

import pytest

from compress.core.errors import UsageError
from runtime.params import SamplingParams

WRONG = [
    ("max_tokens", -1),
    ("max_tokens", 1.0),
    ("max_tokens", True),
    ("temperature", -1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "0.7"),
    ("temperature", None),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.2),
    ("repetition_penalty", math.nan),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", math.inf),
    ("stop", ""),
    ("stop", ["ok", ""]),
    ("stop", [1]),
    ("stop", 7),
    ("stop", ["x"] * 65),
    ("stop_token_ids", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("ignore_eos", "yes"),
    ("seed", -1),
    ("seed", 1.5),
    ("logprobs", -1),
    ("logprobs", True),
    ("prompt_logprobs", 1.0),
    ("prompt_logprobs_start", 0),
    ("n", 0),
    ("n", 10_000),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_bad_sampling_input_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams.of({name: value})


def test_unknown_setting_is_refused_and_not_ignored() -> None:
    with pytest.raises(UsageError, match="temprature"):
        SamplingParams.of({"temprature": 0.5})


def test_what_is_given_is_what_is_kept() -> None:
    params = SamplingParams.of({"stop": "\n", "stop_token_ids": [3], "temperature": 1, "top_p": 1})
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (3,)
    assert isinstance(params.temperature, float)
    assert not params.greedy
    assert SamplingParams(temperature=0.0).greedy
