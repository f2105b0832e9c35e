"""Settings of eviction, and the counts that follow from them."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from pydantic import ValidationError

from compress.core.errors import UsageError
from kv_compress.eviction import Budget, EvictionSettings

EVERYWHERE = ("prefill_chunk", "prefill_end", "decode")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"budget": {}}, "one of tokens, ratio and bytes, not none"),
        ({"budget": {"tokens": 64, "ratio": 0.5}}, "tokens and ratio"),
        ({"budget": {"tokens": 20}}, "20 tokens is less than the 36 that always stay"),
        ({"budget": {"ratio": 1.0}}, "less than 1"),
        ({"budget": {"bytes": "many"}}, "bytes"),
        ({"budget": {"tokens": 64}, "when": []}, "when names"),
        ({"budget": {"tokens": 64}, "method": "h3o"}, "method"),
        ({"budget": {"tokens": 64}, "sink": 3}, "sink"),
        ({"budget": {"tokens": "64"}}, "valid integer"),
        ({"budget": {"tokens": True}}, "valid integer"),
        ({"budget": {"ratio": "0.5"}}, "valid number"),
        ({"budget": {"bytes": True}}, "valid"),
        ({"budget": {"tokens": 64}, "every": "64"}, "valid integer"),
        ({"budget": {"tokens": 64}, "method": "streaming", "beta": 4.0}, "beta is of pyramidkv, and the method is str"),
        ({"budget": {"tokens": 64}, "alpha_safeguard": 0.5}, "alpha_safeguard is of adakv"),
        ({"budget": {"tokens": 64}, "when": ("prefill_end",), "every": 64}, "every is from one point"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        EvictionSettings(**fields)


def test_bytes_are_tokens_of_a_model() -> None:
    settings = EvictionSettings(budget=Budget(bytes="64KiB"))
    assert settings.points(token_bytes=512).tokens == 128
    with pytest.raises(UsageError, match=r"holds 32 tokens of 2,048 bytes.*36"):
        settings.points(token_bytes=2048)


def test_the_salt_is_the_policys() -> None:
    one, same, other = (
        EvictionSettings(budget=Budget(tokens=64), every=every).points(1).salt for every in (64, 64, 65)
    )
    assert one == same != other


@pytest.mark.parametrize("seed", range(60))
def test_points_and_peak_are_those_of_a_walk(seed: int) -> None:
    """Token by token: what is stored, when it is evicted, and the most there ever was."""
    rng = random.Random(seed)
    budget = Budget(tokens=rng.randint(4, 20)) if seed % 2 else Budget(ratio=rng.choice([0.25, 0.5, 0.9]))
    when = tuple(name for name in EVERYWHERE if rng.random() < 0.7) or EVERYWHERE
    every = {} if when == ("prefill_end",) else {"every": rng.randint(1, 12)}
    settings = EvictionSettings(budget=budget, sinks=1, recent=3, when=when, **every)
    points, prompt, end = settings.points(1), rng.randint(1, 60), 100
    stored, most, last = 0, 0, 0
    point = points.after(0, 0, prompt, end)
    for position in range(1, end + 1):
        stored += 1
        most = max(most, stored)
        inside = position < prompt and position % settings.every == 0 and "prefill_chunk" in when
        behind = position > prompt and (position - prompt) % settings.every == 0 and "decode" in when
        if inside or behind or (position == prompt and "prefill_end" in when):
            kept = max(4, budget.tokens or -int(-(budget.ratio or 0) * position // 1))
            if kept < stored:
                assert point is not None and tuple(point[:3]) == (position, stored, kept)
                assert point.queries == (min(3, position - last) if position <= prompt else 1)
                stored, last = kept, position
                point = points.after(kept, position, prompt, end)
    assert point is None
    assert points.peak(0, 0, prompt, end) == most


def test_settings_need_no_torch() -> None:
    script = (
        "import sys\nfrom kv_compress.eviction import EvictionSettings\n"
        "for method in ('streaming', 'snapkv', 'random', 'expected_attention'):\n"
        "    EvictionSettings(method=method, budget={'tokens': 64}).points(1)\n"
        "sys.exit('torch' in sys.modules and 'torch._C' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
