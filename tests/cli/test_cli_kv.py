"""compress kv: its own kind of stage, as the other kinds have theirs."""

from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.conftest import TinyModel


def test_a_recipe_is_planned_and_run(call: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: demo\nstages: [{kv_cache: {precision: int8}}]\n")
    planned = call("kv", "--recipe", recipe, "--output", tmp_path / "out", "--dry-run")
    assert planned.code == 0, planned.err
    assert not (tmp_path / "out").exists()
    done = call("kv", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "compress.json").is_file()


def test_check_measures_chooses_and_writes_a_stage_that_the_option_takes(
    call: Call, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model, stage = tiny_model("llama"), tmp_path / "kv.yaml"
    few = ("--samples", "2", "--length", "32", "--max-increase", "50%")
    checked = call("kv", "check", model, *few, "--budget", "7", "--output", stage, "--json")
    assert checked.code == 0, checked.err
    last = checked.objects[-1]
    chosen = {row["name"]: row for row in last["tried"]}["chosen"]
    assert chosen["bits_per_number"] <= 7 and len(last["layers"]) == 3
    answered = call("generate", model, "Once", "--max-tokens", "4", "--kv-cache", stage, "--json")
    assert answered.code == 0, answered.err
    pool = answered.objects[-1]
    assert pool["kv_pool_bytes"] == pool["kv_tokens"] * chosen["bytes_per_token"]

    refused = call("kv", "check", model, *few, "--budget", "1")
    assert (refused.code, refused.out) == (2, "")
    assert "a row must have more than" in refused.err.partition("no choice of precisions fits")[0]
    assert "int4 with keys per channel takes" in refused.err
    stage.write_text("- kv_cache:\n    precision: int7\n")
    wrong = call("generate", model, "Once", "--kv-cache", stage)
    assert (wrong.code, wrong.out) == (2, "") and "kv.yaml:2:16" in wrong.err and "int8" in wrong.err


def test_a_pool_of_coded_pages_holds_more_tokens_and_is_obeyed(call: Call, tiny_model: TinyModel) -> None:
    """3 layers of 2 heads of 16 channels, keys and values: 216 bytes of a token in int8, 144 in int4."""
    model, shape = tiny_model("llama"), ("--requests", "2", "--prompt-tokens", "60", "--output-tokens", "4")
    found = {}
    for spec in ("int8", "int4,streaming:40"):
        called = call("bench", model, *shape, "--kv-cache", spec, "--json")
        assert called.code == 0, called.err
        found[spec] = called.objects[-1]["models"][0]["memory"]
        size = 216 if spec == "int8" else 144
        assert found[spec]["kv_pool_bytes"] == size * found[spec]["kv_tokens"]
    assert found["int4,streaming:40"]["kept_as"] == "int4, streaming 40 tokens"
    assert found["int8"]["kept_as"] == "int8"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("int9", "did you mean int8?"),
        ("snapk:128", "did you mean snapkv?"),
        ("snapkv:", "METHOD:BUDGET"),
        ("snapkv:3", "less than the 36 that always stay"),
        ("int8,int4", "METHOD:BUDGET"),
        ("nowhere.yaml", "--kv-cache nowhere.yaml: there is no such file"),
        ("recipes/kv-int8.yaml", "is a whole recipe, not a kv_cache stage alone"),
        ("snapkv", "snapkv drops keys and values: say how much stays"),
        ("int8,tova", "for example tova:512 (tokens)"),
        ("int8:512", "int8 keeps every token and takes no budget"),
    ],
)
def test_what_no_cache_can_be_is_refused_before_the_model_is_read(call: Call, spec: str, says: str) -> None:
    called = call("generate", "/nowhere", "Once", "--kv-cache", spec)
    assert (called.code, called.out) == (2, "")
    assert says in called.err


def test_a_sliding_window_that_eviction_would_break_is_refused_before_the_run(
    call: Call, tiny_model: TinyModel, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model('mistral')}\n"
        "stages: [{kv_cache: {eviction: {method: tova, recent: 4, budget: {tokens: 16}}}}]\n"
    )
    called = call("kv", "--recipe", recipe, "--output", tmp_path / "out", "--dry-run")
    assert called.code == 2
    assert "sliding window of 8" in called.err and "set recent to 8" in called.err
