"""Overrides: which pattern counts, what they inherit, what is refused, and that layers solved together stay equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.recipe import parse_recipe
from compress.core.scheme import Scheme
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from quantize.rtn import RTN
from runtime.llm import LLM
from tests.conftest import TinyModel

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "


def rtn(**settings: Any) -> RTN:
    return RTN.model_validate_json(json.dumps(settings))


def test_the_last_match_counts_and_ignore_beats_it() -> None:
    settings = rtn(
        group_size=64,
        overrides=[{"layers": "*.v_proj", "scheme": "w8a16"}, {"layers": "a.*", "scheme": "w2a16", "symmetric": False}],
        ignore=["*.k_proj"],
    )
    assert settings.scheme_for("b.q_proj", 128) == Scheme(4, 64)
    assert settings.scheme_for("b.v_proj", 128) == Scheme(8, 64)
    assert settings.scheme_for("a.v_proj", 128) == Scheme(2, 64, symmetric=False)
    assert settings.scheme_for("a.k_proj", 128) is None


@pytest.mark.parametrize(
    ("stage", "override", "wanted"),
    [
        ({}, {"scheme": "w8a16"}, Scheme(8, 128)),
        ({"group_size": 32}, {"scheme": "w8a8"}, Scheme(8, activation_bits=8)),
        ({"scheme": "w8a8"}, {"scheme": "w4a16"}, Scheme(4, 128)),
        ({"group_size": 32}, {"scheme": "w4a8"}, Scheme(4, 32, activation_bits=8)),
        ({"scheme": "w4a8"}, {"group_size": -1}, Scheme(4, activation_bits=8)),
        ({"symmetric": False}, {"scheme": "w2a16"}, Scheme(2, 128, symmetric=False)),
        ({"symmetric": False, "group_size": 32}, {"symmetric": True, "group_size": -1}, Scheme(4)),
    ],
    ids=str,
)
def test_what_is_left_out_is_as_in_the_stage(stage: Any, override: Any, wanted: Scheme) -> None:
    settings = rtn(**stage, overrides=[{"layers": "x", **override}])
    assert settings.scheme_for("x", 256) == wanted


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"layers": "x", "scheme": "w9a16"}, "9 bits"),
        ({"layers": "x", "scheme": "four"}, "unknown scheme"),
        ({"layers": "x", "group_size": 4}, "at least 8"),
        ({"layers": "re:x"}, "regular expression"),
        ({"scheme": "w8a16"}, "layers"),
        ({"layers": "x", "bits": 8}, "bits"),
        ({"layers": "x", "scheme": "w8a8", "group_size": 64}, "one scale per channel"),
        ({"layers": "x", "scheme": "w4a8", "symmetric": False}, "needs symmetric weights"),
    ],
    ids=str,
)
def test_overrides_that_make_no_sense_are_refused(override: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rtn(overrides=[override])


def test_uneven_widths_are_those_of_the_override(tiny_model: TinyModel) -> None:
    override = {"layers": "*.o_proj", "scheme": "w8a16", "group_size": 48}
    assert rtn(overrides=[override], uneven="smaller").scheme_for("x.o_proj", 64) == Scheme(8, 32)
    assert rtn(overrides=[override], uneven="channel").scheme_for("x.o_proj", 64) == Scheme(8)
    recipe = parse_recipe({"model": str(tiny_model()), "stages": [{"quantize": {"method": "rtn", "group_size": 16}}]})
    assert plan(recipe, RunOptions(output=Path("x"))).bytes_out
    stage = {"method": "rtn", "group_size": 16, "overrides": [override, {"layers": "nothing"}]}
    with pytest.raises(UsageError, match=r"group_size 48 does not divide the width of 3 layers, e\.g\. .*o_proj"):
        plan(parse_recipe({"model": str(tiny_model()), "stages": [{"quantize": stage}]}), RunOptions(output=Path("x")))
    stage["overrides"] = [{"layers": "nothing"}]
    planned = plan(
        parse_recipe({"model": str(tiny_model()), "stages": [{"quantize": stage}]}), RunOptions(output=Path("x"))
    )
    assert "overrides pattern 'nothing' matches no layer" in planned.notices


def test_layers_solved_together_are_what_they_are_without_overrides(tiny_model: TinyModel, tmp_path: Path) -> None:
    """q in 8 bits beside k and v in 4: one Hessian and one order for all, and the codes of k and v do not change."""
    shutil.copytree(tiny_model(dtype="bfloat16"), tmp_path / "model")
    (tmp_path / "text.txt").write_text(STORY * 4)

    def artifact(name: str, **settings: Any) -> Any:
        stage = {"quantize": {"method": "gptq", "group_size": 16, "order": "block", **settings}}
        calibration = {"dataset": "text.txt", "samples": 4, "length": 16}
        recipe = parse_recipe({"model": "model", "calibration": calibration, "stages": [stage]}, base_folder=tmp_path)
        run(recipe, RunOptions(output=tmp_path / name))
        assert verify(tmp_path / name, source=tmp_path / "model").ok
        return Checkpoint.open(tmp_path / name)

    plain = artifact("plain")
    mixed = artifact("mixed", overrides=[{"layers": "*.0.self_attn.q_proj", "scheme": "w8a16"}])
    assert mixed.schemes["model.layers.0.self_attn.q_proj"] == Scheme(8, 16)
    for kind in ("k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{kind}"
        assert torch.equal(plain.weight(name), mixed.weight(name))
    assert not torch.equal(
        plain.weight("model.layers.0.self_attn.q_proj"), mixed.weight("model.layers.0.self_attn.q_proj")
    )
    with LLM(tmp_path / "mixed") as llm:
        assert llm.generate([[5, 6, 7]], max_tokens=4, ignore_eos=True)[0].token_ids
