"""The kv_cache stage: what it writes, that the runtime obeys it, that verify sees when files disagree."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, RecipeError, UsageError
from compress.core.model_files import KV_CACHE_KEY
from compress.core.recipe import parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, run
from kv_compress.eviction import EvictionSettings
from kv_compress.policy import KVPolicy
from kv_compress.stage import KVCache
from runtime.llm import LLM
from runtime.loader import load
from runtime.params import SamplingParams
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for
from tests.contracts.shelf import run as on_shelf
from tests.kv_compress.conftest import RuntimeHolds

STORY = "A small boat sailed to the island and a bird sat on its mast all day. "


def made(place: Path, *stages: dict[str, Any]) -> Path:
    (place / "text.txt").write_text(STORY * 4)
    calibration = {"dataset": "text.txt", "samples": 4, "length": 16}
    recipe = parse_recipe({"model": "model", "calibration": calibration, "stages": list(stages)}, base_folder=place)
    return run(recipe, RunOptions(output=place / "out")).artifact


def cached(folder: Path, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys, rotated, and values [B, G, T, D] of each layer, as transformers caches them."""
    model = Checkpoint.open(folder).build_model(torch.float32)
    with torch.inference_mode():
        found = model(ids, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in found.layers]


def test_fp8_is_written_for_the_runtime_and_for_vllm(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama", dtype="bfloat16"), tmp_path / "model")
    out = made(tmp_path, {"kv_cache": {"precision": "fp8"}})
    config, manifest = (json.loads((out / name).read_text()) for name in ("config.json", "compress.json"))
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert config["quantization_config"]["kv_cache_scheme"] == scheme
    assert config["quantization_config"]["config_groups"] == {}
    assert manifest["kv_cache"] == config["compress_kv_cache"]
    tensors = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    for index, layer in enumerate(manifest["kv_cache"]["layers"]):
        for part, name in (("keys", "k_scale"), ("values", "v_scale")):
            assert tensors[f"model.layers.{index}.self_attn.{name}"].tolist() == layer[part]["scale"]
    checkpoint = Checkpoint.open(out)
    assert checkpoint.kind == "dense"
    assert verify(out, source=tmp_path / "model").ok
    llm = LLM(out, max_length=64, device="cpu", kv_bytes=1 << 20)
    assert llm.engine.scheduler.pool.page.name == "fp8"
    assert llm.engine.scheduler.pool.page.bytes == 16 * 3 * 2 * 2 * 16
    assert LLM(out, max_length=64, device="cpu", kv_cache="int8").engine.scheduler.pool.page.name == "int8"
    assert len(llm.generate([[1, 2, 3]], max_tokens=4, ignore_eos=True)[0].token_ids) == 4

    del config["compress_kv_cache"]  # another tool's artifact: the scheme alone, and no manifest
    (out / "compress.json").unlink()
    (out / "config.json").write_text(json.dumps(config))
    policy = load(out, numerics="fast").kv_policy
    assert policy is not None
    assert policy.to_json() == manifest["kv_cache"]


def test_eviction_travels_with_the_artifact(tiny_model: TinyModel, tmp_path: Path, runtime_holds: RuntimeHolds) -> None:
    runtime_holds("float32")
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    eviction = {"method": "snapkv", "budget": {"tokens": 16}, "recent": 8, "sinks": 2, "when": ["prefill_end"]}
    out = made(tmp_path, {"kv_cache": {"precision": "int8", "eviction": eviction}})
    manifest, config = (json.loads((out / name).read_text()) for name in ("compress.json", "config.json"))
    assert manifest["kv_cache"] == config["compress_kv_cache"] and manifest["kv_cache"]["eviction"]["recent"] == 8
    assert verify(out, source=tmp_path / "model").ok
    report = json.loads((tmp_path / "out.report" / "report.json").read_text())
    shown = {row["name"]: (row["before"], row["after"]) for row in [*report["rows"], *report["tiles"]]}
    assert shown["keys and values of a token"] == ("768 B in float32", "216 B")
    assert shown["tokens that keep theirs"] == ("all", "snapkv 16 tokens")
    assert shown["keys and values"] == ("", "3.56 × smaller") and "size" not in shown

    prompt = [token % 50 + 3 for token in range(48)]
    keywords = {"max_length": 64, "device": "cpu", "kv_bytes": 1 << 20, "numerics": "exact", "prefix_cache": False}

    def pages_of(llm: LLM) -> tuple[list[int], int]:
        """What is answered, and the most pages that are held behind the prompt."""
        llm.add(prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        held, answer = 0, []
        while llm.has_work:
            for update in llm.step():
                answer += update.token_ids
            held = max(held, llm.stats().pages.owned)
        return answer, held

    obeyed = pages_of(LLM(out, **keywords))
    asked = EvictionSettings.model_validate(eviction)
    assert obeyed == pages_of(LLM(tmp_path / "model", kv_cache="int8", eviction=asked, **keywords))
    assert (obeyed[1], pages_of(LLM(out, kv_cache="int8", **keywords))[1]) == (2, 4)

    manifest["kv_cache"]["eviction"]["recent"] = 0
    with pytest.raises(InputError, match="^kv_cache.eviction.recent: .*greater than or equal to 1"):
        LLM(tmp_path / "model", kv_cache=KVPolicy.parse(manifest["kv_cache"]), **keywords)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen2"])
def test_scales_clip_nothing_that_transformers_caches(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    checkpoint = Checkpoint.open(folder)
    tokens, settings = tokens_for(checkpoint), KVCache(precision="fp8", per_head=True)
    shelf = on_shelf(folder, settings, Shelf(), tokens)
    layers = shelf.describe({})["compress_kv_cache"]["layers"]
    assert shelf.added == {}  # no scheme says one scale for each head
    for layer, (keys, values) in zip(layers, cached(folder, tokens.ids), strict=True):
        largest = [x.abs().amax((0, 2, 3)).tolist() for x in (keys, values)]
        assert layer["values"]["scale"] == [2.0 ** math.ceil(math.log2(number / 448)) for number in largest[1]]
        for scale, number in zip(layer["keys"]["scale"], largest[0], strict=True):
            assert number <= 448 * scale < 8 * number


def test_layers_are_overridden_by_number_and_range(tiny_model: TinyModel, runtime_holds: RuntimeHolds) -> None:
    runtime_holds("float32")
    checkpoint = Checkpoint.open(tiny_model("llama"))
    settings = KVCache.model_validate_json(
        '{"precision": {"keys": "int8", "values": "int4"}, "rotate": true,'
        ' "overrides": [{"layers": "0-1", "precision": "int8"}, {"layers": "-1, 1", "precision": "full"}]}'
    )
    found = [(of.keys.codec, of.values.codec, of.keys.rotate) for of in settings.policy(checkpoint).layers]
    assert found == [("int8", "int8", True), ("full", "full", False), ("full", "full", False)]
    assert settings.plan(checkpoint, None).notices == (
        "keys and values of a token take 584 bytes instead of 768 in float32",  # 72 + 2 * 256
    )
    with pytest.raises(UsageError, match="no layer 3"):
        KVCache.model_validate_json('{"overrides": [{"layers": "2-3", "precision": "full"}]}').policy(checkpoint)
    with pytest.raises(UsageError, match="no power of two"):
        KVCache(rotate=True).policy(Checkpoint.open(tiny_model("llama", odd=True)))


def test_verify_sees_what_disagrees(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama", dtype="bfloat16"), tmp_path / "model")
    out = made(tmp_path, {"quantize": {"method": "rtn", "group_size": 16}}, {"kv_cache": {"precision": "int8"}})
    assert verify(out).ok
    assert "w4a16" in {scheme.name for scheme in Checkpoint.open(out).schemes.values()}
    config = json.loads((out / "config.json").read_text())
    config["compress_kv_cache"]["layers"][1]["keys"]["codec"] = "int4"
    (out / "config.json").write_text(json.dumps(config))
    failed = {check.name: check.detail for check in verify(out).checks if not check.ok}
    assert "is not the policy of config.json" in failed["kv_cache"]


def test_kv_cache_stands_last_and_needs_text_for_fp8_alone() -> None:
    quantize, kv = {"quantize": {"method": "rtn"}}, {"kv_cache": {}}
    with pytest.raises(RecipeError, match="comes once and last"):
        parse_recipe({"model": "m", "stages": [kv, quantize]})
    with pytest.raises(RecipeError, match="needs calibration data"):
        parse_recipe({"model": "m", "stages": [{"kv_cache": {"precision": "fp8"}}]})
    recipe = parse_recipe({"model": "m", "stages": [quantize, kv]})
    assert recipe.stages[1].settings == KVCache(precision="int8")
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_keys_per_channel_travel_with_the_artifact(
    tiny_model: TinyModel, tmp_path: Path, runtime_holds: RuntimeHolds
) -> None:
    runtime_holds("float32")
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    asked = {"precision": "int4", "keys": "channel", "recent": 9}
    out = made(tmp_path, {"kv_cache": asked})
    manifest, config = (json.loads((out / name).read_text()) for name in ("compress.json", "config.json"))
    policy = manifest["kv_cache"]
    assert policy == config["compress_kv_cache"] and (policy["sinks"], policy["recent"]) == (4, 9)
    assert policy["layers"][0] == {"keys": {"codec": "int4", "per": "channel"}, "values": {"codec": "int4"}}
    assert verify(out, source=tmp_path / "model").ok
    llm = LLM(out, max_length=256, device="cpu", kv_bytes=1 << 20, dtype=torch.float32)
    points = llm.engine.scheduler.points
    assert (points.page_tokens, points.sinks, points.recent) == (96, 16, 9)
    config["compress_kv_cache"]["recent"] = 8
    (out / "config.json").write_text(json.dumps(config))
    assert not verify(out).ok

    checkpoint = Checkpoint.open(tiny_model("llama"))
    assert KVCache(**asked).plan(checkpoint, None).notices == (
        "keys and values of a token take 128 bytes instead of 768 in float32, 96 in a page; the first 16 and the last "
        "9 to 104 are kept in full",
    )
    mixed = KVCache.model_validate_json(
        '{"precision": "int4", "keys": "channel", "overrides": [{"layers": "0", "precision": "full"}]}'
    ).policy(checkpoint)
    assert [of.keys.per for of in mixed.layers] == ["token", "channel", "channel"]
    for wrong, message in (
        ({"overrides": [{"layers": "0-1", "precision": "full"}]}, "holds only 20 that are coded"),
        ({"overrides": [{"layers": "0", "precision": "int4", "rotate": True}]}, "without rotation"),
    ):
        settings = KVCache.model_validate_json(json.dumps(asked | wrong))
        with pytest.raises(UsageError, match=message):
            settings.plan(checkpoint, None)
    for wrong, message in (
        ({"rotate": True}, "rotate mixes the channels"),
        ({"eviction": {"budget": {"tokens": 64}}}, "eviction cannot drop single tokens"),
    ):
        with pytest.raises(ValidationError, match=message):
            KVCache.model_validate_json(json.dumps(asked | wrong))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"precision": "int4", "overrides": [{"layers": "0", "precision": "int8"}], "eviction": {"method": "adakv"}},
            "differ in heads, channels or codecs",
        ),
        ({"precision": "int8", "overrides": [{"layers": "1-0", "precision": "full"}]}, "'1-0' is no range"),
        ({"precision": "int8", "overrides": [{"layers": "-2-1", "precision": "full"}]}, "'-2-1' is no range"),
    ],
)
def test_what_the_runtime_would_refuse_is_not_planned(
    tiny_model: TinyModel, asked: dict[str, Any], message: str
) -> None:
    if "eviction" in asked:
        asked["eviction"]["budget"] = {"tokens": 64}
    settings = KVCache.model_validate_json(json.dumps(asked))
    with pytest.raises(UsageError, match=message):
        settings.plan(Checkpoint.open(tiny_model("llama")), None)


INT8 = {"keys": {"codec": "int8"}, "values": {"codec": "int8"}}
FP8 = {"codec": "fp8", "scale": [0.5]}
PER_CHANNEL = {"codec": "int4", "per": "channel"}
ONE_LAYER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"layers": ["x"]}, "not its keys and values"),
        ({"layers": [INT8], "sinks": -3}, "sinks: must be a whole number"),
        ({"layers": [INT8], "eviction": {"method": "foo"}}, "eviction.method"),
        ({"layers": [{"keys": {"codec": "int8"}, "values": {"codec": "int8", "per": "channel"}}]}, "only keys"),
        ({"layers": [{"keys": FP8, "values": FP8}], "sinks": 16}, "more than kv_cache_scheme says"),
        ({"layers": [INT8, INT8]}, "2 layers, the model 1"),
        ({"layers": [{"keys": PER_CHANNEL | {"rotate": True}, "values": PER_CHANNEL}]}, "only keys"),
        ({"layers": [{"keys": PER_CHANNEL | {"rotate": True}, "values": INT8["values"]}]}, "without rotation"),
        ({"layers": [{"keys": PER_CHANNEL | {"codec": "int8"}, "values": {"codec": "full"}}]}, "holds only 20 that"),
        (
            {"layers": [INT8], "eviction": {"method": "tova", "budget": {"bytes": "0.1kB"}}},
            "100 bytes holds 1 tokens of 72 bytes",
        ),
    ],
)
def test_policies_that_no_runtime_obeys_are_told(policy: dict[str, Any], message: str) -> None:
    scheme = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True, "strategy": "tensor"}
    config = ONE_LAYER | {KV_CACHE_KEY: policy, "quantization_config": {"kv_cache_scheme": scheme}}
    with pytest.raises(InputError, match=message):
        KVCache.require_obeyed(config)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "full", "rotate": True}, "rotate turns what is coded, and all is kept in full"),
        ({"precision": "full", "recent": 9}, "sinks and recent stay in full where the rest is coded"),
        ({"precision": "int8", "per_head": True}, "per_head is of the scales of fp8"),
        (
            {"precision": {"keys": "fp8", "values": "int4"}, "keys": "channel"},
            "keys: channel is for keys in int8 or int4",
        ),
        ({"overrides": [{"layers": "0", "precision": "full", "rotate": True}]}, "these layers are kept in full"),
        ({"eviction": {"method": "tova", "budget": {"tokens": True}}}, "budget.tokens: should be a whole number"),
        ({"eviction": {"method": "tova", "budget": {"tokens": 64}, "beta": 3}}, "beta is of pyramidkv"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        parse_recipe({"model": "m", "stages": [{"kv_cache": asked}]})
    assert "stages[0].kv_cache" in str(refused.value)


def test_settings_that_mean_something_somewhere_stay() -> None:
    for asked in (
        {"precision": "full", "rotate": True, "overrides": [{"layers": "0", "precision": "int4"}]},
        {"precision": "int8", "per_head": True, "overrides": [{"layers": "0", "precision": "fp8"}]},
        {"eviction": {"method": "pyramidkv", "budget": {"tokens": 64}, "beta": 3}},
        {"eviction": {"method": "tova", "budget": {"tokens": 64}, "beta": 20.0}},  # as a resolved recipe has it
    ):
        recipe = parse_recipe({"model": "m", "calibration": {"dataset": "demo"}, "stages": [{"kv_cache": asked}]})
        assert parse_recipe(recipe.model_dump(mode="json")) == recipe
