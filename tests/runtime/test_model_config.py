"""config.json -> ModelConfig: what files leave out is what transformers takes; what is not understood is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from compress.core.architectures import ARCHITECTURES
from compress.core.errors import InputError, UsageError
from compress.core.scheme import Scheme
from runtime.loader import load
from runtime.models._families import FAMILIES as RUN
from runtime.models.reading import read
from tests.conftest import TinyModel
from tests.quantized_folders import write_quantized
from tests.runtime._folders import rewritten
from tests.tiny import FAMILIES, config_of

SMALL = {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 1000,
    "intermediate_size": 384,
    "max_position_embeddings": 8192,
}


def test_every_family_that_can_be_compressed_can_be_run() -> None:
    assert set(RUN) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    small = SMALL | {"model_type": family}
    full = json.loads(AutoConfig.for_model(**small).to_json_string(use_diff=False))
    assert read(small) == read(full)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_windows_and_experts_are_those_of_transformers(family: str, odd: bool) -> None:
    config = AutoConfig.for_model(family, **config_of(family, odd))
    model = read(json.loads(config.to_json_string(use_diff=False)))
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 3
    window = getattr(config, "sliding_window", None)
    assert [layer.window for layer in model.layers] == [window if kind[0] == "s" else None for kind in kinds]
    for index, layer in enumerate(model.layers):
        assert (layer.heads, layer.kv_heads, layer.head_dim) == ((7, 1, 24) if odd else (4, 2, 16))
        has_experts = family == "mixtral" or (family == "qwen3_moe" and index != 1)
        assert (layer.experts is not None) == has_experts
    assert model.max_length == 256


def test_null_key_value_heads_mean_one_for_each_query_head() -> None:
    mistral = SMALL | {"model_type": "mistral"}
    assert read(mistral).layers[0].kv_heads == 8
    assert read(mistral | {"num_key_value_heads": None}).layers[0].kv_heads == 4


def test_sizes_of_single_layers() -> None:
    own = {"2": {"intermediate_size": 100, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}}
    layers = read(SMALL | {"model_type": "llama", "per_layer_config": own}).layers
    assert (layers[2].ffn, layers[2].heads, layers[2].kv_heads, layers[2].head_dim) == (100, 2, 1, 32)
    assert layers[2].scale == 32**-0.5
    assert (layers[1].ffn, layers[1].heads, layers[1].head_dim) == (384, 4, 128)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown setting": ("llama", {"attention_sinks": 4}, "attention_sinks is 4, a setting that the runtime does not"),
    "a family's setting in another": ("mistral", {"attention_bias": True}, "attention_bias is True, a setting"),
    "window in a family without": ("llama", {"sliding_window": 128}, "sliding_window is 128, a setting"),
    "soft-cap that transformers ignores": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "activation": ("qwen2", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', not one of silu"),
    "window missing": ("gemma2", {"sliding_window": None}, "sliding_window is None, but layer_types gives layer 0"),
    "layer types": ("qwen3", {"layer_types": ["full_attention"]}, "not 8 times full_attention or sliding_attention"),
    "chunked layers": ("qwen2", {"layer_types": ["chunked_attention"] * 8}, "layer_types is"),
    "mixed layers": ("mistral", {"layer_types": ["full_attention"] * 8}, "the layers of this family are all alike"),
    "dynamic rope": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "as a sequence grows"),
    "unknown rope": ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral', which the runtime"),
    "unknown rope setting": ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [8]}}, "mrope"),
    "rope without factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    "partial rotation": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which this family"),
    "partial rotation in rope": ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "factor is 0.5, which"),
    "more than all channels": ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    "short factors": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "short_factor has 1 numbers, heads need 64",
    ),
    "too many active experts": ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8"),
    "two numbers of experts": (
        "mixtral",
        {"num_local_experts": 4, "num_experts": 8},
        "num_experts is 8, but num_local",
    ),
    "skipped part": ("llama", {"per_layer_config": {"1": {"skip": ["mlp"]}}}, "skip is ['mlp'], a setting"),
    "layer out of range": ("llama", {"per_layer_config": {"8": {"intermediate_size": 4}}}, "no layer of 8"),
    "heads as text": ("llama", {"num_attention_heads": "4"}, "num_attention_heads is '4', not a positive whole number"),
    "no heads": ("llama", {"num_attention_heads": None}, "num_attention_heads is None, not a positive"),
    "family": ("mamba", {}, "unknown model family 'mamba'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str) -> None:
    family, changes, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        read(SMALL | {"model_type": family} | changes, "model/config.json")
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_sinks": None},
        {"attention_sinks": False},
        {"_private": 3},
        {"attention_dropout": 0.1},
        {"top_p": 0.9},
    ],
)
def test_what_changes_nothing_is_taken(extra: dict[str, Any]) -> None:
    plain = SMALL | {"model_type": "llama"}
    assert read(plain | extra) == read(plain)


# tensors


Change = Callable[[dict[str, Tensor]], None]
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"


def _without(name: str) -> Change:
    def change(state: dict[str, Tensor]) -> None:
        del state[name]

    return change


def _with(name: str, *shape: int) -> Change:
    return lambda state: state.update({name: torch.ones(shape)})


TENSORS: dict[str, tuple[Change, str]] = {
    "missing weight": (_without(Q), f"tensor {Q!r} is missing"),
    "missing norm": (_without("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
    "missing layer": (_without(DOWN), f"tensor {DOWN!r} is missing"),
    "rows that are no whole head": (_with(Q, 60, 64), f"tensor {Q!r} has shape [60, 64], the model needs [64, 64]"),
    "wrong input": (_with(Q, 64, 60), "has shape [64, 60]"),
    "norm": (_with("model.norm.weight", 63), "tensor 'model.norm.weight' has shape [63], the model needs [64]"),
    "embedding": (_with("model.embed_tokens.weight", 320, 60), "'model.embed_tokens.weight' has shape [320, 60]"),
    "gate and down": (_with(DOWN, 64, 120), "gate_proj.weight' has shape [128, 64], the model needs [120, 64]"),
    "extra bias": (_with("model.layers.0.mlp.up_proj.bias", 128), "up_proj.bias' has no place in this model"),
    "extra layer": (_with("model.layers.3.mlp.up_proj.weight", 128, 64), "layers.3.mlp.up_proj.weight' has no place"),
    "stranger": (_with("medusa.weight", 3), "tensor 'medusa.weight' has no place"),
    "tied head that differs": (_with("lm_head.weight", 320, 64), "lm_head.weight differs from the embedding"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path, case: str) -> None:
    change, words = TENSORS[case]
    folder = rewritten(tiny_model("llama"), tmp_path / "model", change)
    with pytest.raises(InputError) as caught:
        load(folder, numerics="exact")
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_bias_of_zeros_and_computed_angles_are_taken(tiny_model: TinyModel, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128)
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    load(rewritten(tiny_model("llama"), tmp_path / "model", change), numerics="exact")


def test_an_untied_model_needs_its_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = rewritten(tiny_model("llama"), tmp_path / "model", lambda state: None, tie_word_embeddings=False)
    with pytest.raises(InputError, match="'lm_head.weight' is missing"):
        load(folder, numerics="exact")


def test_a_missing_part_of_a_quantized_layer_is_named(tmp_path: Path) -> None:
    written = write_quantized(tmp_path / "source", Scheme(4, 32)).path
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with pytest.raises(InputError, match=name):
        load(rewritten(written, tmp_path / "model", _without(name)), numerics="exact")


def test_exact_numerics_are_fp32(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="exact numerics compute in float32"):
        load(tiny_model("llama"), numerics="exact", dtype=torch.bfloat16)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        load(tmp_path / "nowhere", numerics="exact")
