"""The decoder against transformers: every family, in chunks and decodes of mixed batches, dense and quantized."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compress.core.checkpoint import Checkpoint
from compress.core.scheme import Scheme
from runtime.cache import KVCache, page_bytes
from runtime.layers.mlp import activation_of
from runtime.loader import load
from runtime.models.config import Activation
from runtime.ops.batch import AttentionBatch
from tests.conftest import TinyModel
from tests.quantized_folders import write_quantized
from tests.runtime._naive import NaiveRunner, exact, prompts_of, quantized_copy
from tests.tiny import FAMILIES, config_of

LENGTHS = (23, 37, 1, 12)
# prompt chunks beside whole prompts and single tokens; sequences come and go; the last step takes what is left
SCHEDULE = ({0: 7}, {0: 5, 1: 30}, {1: 1, 0: 1, 2: 1}, {3: 11, 1: 1, 0: 3}, {3: 1, 0: 4, 1: 2})
FORMS = [(family, odd) for family in FAMILIES for odd in (False, True)]
NAMES = [f"{family}-{'odd' if odd else 'plain'}" for family, odd in FORMS]
BOUND = 1e-4


def reference_logits(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What transformers computes, one prompt at a time, without a cache."""
    model = Checkpoint.open(folder).build_model(torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def reference_greedy(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    model = Checkpoint.open(folder).build_model(torch.float32)
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        kept = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        answers.append(kept[0, len(prompt) :].tolist())
    return answers


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    assert [part.shape for part in found] == [part.shape for part in wanted]
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def edited(source: Path, target: Path, changes: dict[str, Any], drop: Sequence[str] = ()) -> Path:
    """A copy of a model folder with another config."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


@pytest.mark.parametrize(("family", "odd"), FORMS, ids=NAMES)
def test_chunks_and_decodes_give_the_logits_of_transformers(tiny_model: TinyModel, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    prompts = prompts_of(LENGTHS, config_of(family, odd)["vocab_size"])
    found = exact(folder).feed(prompts, SCHEDULE)
    assert worst(found, reference_logits(folder, prompts)) < BOUND


@pytest.mark.parametrize(("family", "odd"), FORMS, ids=NAMES)
def test_greedy_tokens_are_those_of_transformers(tiny_model: TinyModel, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    prompts = prompts_of((5, 14), config_of(family, odd)["vocab_size"], seed=1)
    assert exact(folder).greedy(prompts, 32) == reference_greedy(folder, prompts, 32)


@pytest.mark.parametrize(("family", "odd"), FORMS, ids=NAMES)
def test_a_row_has_the_same_bits_in_any_batch_and_chunking(tiny_model: TinyModel, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    prompts = prompts_of(LENGTHS, config_of(family, odd)["vocab_size"])
    model = load(folder, numerics="exact")
    mixed = NaiveRunner(model).feed(prompts, SCHEDULE)
    for index, prompt in enumerate(prompts):
        alone = NaiveRunner(model, seed=index + 1).feed([prompt], [])[0]
        assert torch.equal(mixed[index], alone)


@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_has_the_same_bits_wherever_it_lies(name: Activation) -> None:
    function = activation_of(name, exact=True)
    fused = activation_of(name, exact=False)
    for width in (5, 85, 160, 1001):
        x_TF = 4 * torch.randn(37, width, generator=torch.Generator().manual_seed(width))
        y_TF = function(x_TF)
        assert torch.equal(y_TF, torch.cat([function(row_TF) for row_TF in x_TF.split(1)]))
        assert torch.allclose(y_TF, fused(x_TF), atol=1e-6)


def test_only_wanted_rows_are_given(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gemma2"), numerics="exact")
    ids = torch.tensor(prompts_of((9,), 320)[0])
    batch = AttentionBatch.build([0, 0], [6, 3], [0, 0], [[5, 2], [7]], block_size=4)
    every = model(ids, batch, KVCache(model.config, 8, 4), None)
    assert torch.equal(model(ids, batch, KVCache(model.config, 8, 4), torch.tensor([8, 2])), every[[8, 2]])


@pytest.mark.data
@pytest.mark.parametrize("name", ["tinystories-656k", "stories-7m"])
def test_real_models_agree_with_transformers(shared_data: Path, name: str) -> None:
    folder = shared_data / "models" / name
    prompts = prompts_of((40, 70, 9), 2048)
    runner = exact(folder)
    assert worst(runner.feed(prompts, [{0: 16, 1: 50}, {2: 9, 0: 1, 1: 16}]), reference_logits(folder, prompts)) < BOUND
    prompts = prompts_of((12, 30), 2048, seed=1)
    assert exact(folder).greedy(prompts, 32) == reference_greedy(folder, prompts, 32)


# rotary kinds

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn-tuned": (
        "llama",
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "truncate": False,
        },
    ),
    "gemma3": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
}


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_kinds_are_those_of_transformers(tiny_model: TinyModel, tmp_path: Path, kind: str, older: bool) -> None:
    family, values = ROPES[kind]
    if older:
        changes = {"rope_scaling": values, "rope_theta": 5000.0}
    elif family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 300.0}
        changes = {"rope_parameters": {"full_attention": values | {"rope_theta": 5000.0}, "sliding_attention": local}}
    else:
        changes = {"rope_parameters": values | {"rope_theta": 5000.0}}
    folder = edited(tiny_model(family), tmp_path / "model", changes, drop=["rope_parameters"] if older else [])
    prompts = prompts_of((90,), 320)
    assert worst(exact(folder).feed(prompts, [{0: 50}]), reference_logits(folder, prompts)) < BOUND


def test_longrope_runs_with_its_short_factors_up_to_their_length(tiny_model: TinyModel, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]}
    values = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **factors}
    changes = {"rope_parameters": values, "original_max_position_embeddings": 48}
    folder = edited(tiny_model("phi3"), tmp_path / "model", changes)
    runner = exact(folder)
    assert runner.model.config.max_length == 48
    prompts = prompts_of((48,), 320)
    assert worst(runner.feed(prompts, [{0: 20}]), reference_logits(folder, prompts)) < BOUND


# uneven and quantized weights


def test_unevenly_pruned_layers_run_at_their_own_widths(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A head group and some channels cut out of one layer: as if o and down had zeros there."""
    source = tiny_model("llama")
    state = load_file(source / "model.safetensors")
    zeroed, cut = dict(state), dict(state)
    layer = "model.layers.1"
    heads, channels = slice(0, 32), torch.arange(128) % 3 != 0  # two query heads with their key-value head
    o, down = (state[f"{layer}.{name}.weight"].clone() for name in ("self_attn.o_proj", "mlp.down_proj"))
    o[:, heads] = 0
    down[:, ~channels] = 0
    zeroed |= {f"{layer}.self_attn.o_proj.weight": o, f"{layer}.mlp.down_proj.weight": down}
    cut[f"{layer}.self_attn.o_proj.weight"] = o[:, 32:].contiguous()
    cut[f"{layer}.mlp.down_proj.weight"] = down[:, channels].contiguous()
    for name, first in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        cut[f"{layer}.self_attn.{name}.weight"] = state[f"{layer}.self_attn.{name}.weight"][first:].contiguous()
    for name in ("gate_proj", "up_proj"):
        cut[f"{layer}.mlp.{name}.weight"] = state[f"{layer}.mlp.{name}.weight"][channels].contiguous()
    folders = []
    for name, tensors in (("zeroed", zeroed), ("cut", cut)):
        folder = edited(source, tmp_path / name, {})
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    prompts = prompts_of(LENGTHS, 320)
    runner = exact(folders[1])
    sizes = [(layer.heads, layer.kv_heads, layer.ffn) for layer in runner.model.config.layers]
    assert sizes == [(4, 2, 128), (2, 1, 85), (4, 2, 128)]
    assert runner.cache.k[1].shape[2:] == (1, 16)
    assert worst(runner.feed(prompts, SCHEDULE), reference_logits(folders[0], prompts)) < BOUND


SCHEMES = {
    "w4a16-g32": Scheme(4, 32),
    "w4a16-asymmetric": Scheme(4, 32, symmetric=False),
    "w3a16-channel": Scheme(3),
    "w8a16": Scheme(8, 64),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_models_equal_their_dequantized_weights(tmp_path: Path, name: str) -> None:
    folder = write_quantized(tmp_path / "model", SCHEMES[name], tied=True).path
    prompts = prompts_of((20, 9), 96)
    runner = exact(folder)
    assert worst(runner.feed(prompts, [{0: 8}, {0: 1, 1: 5}]), reference_logits(folder, prompts)) < BOUND
    dense = sum(weight.numel() * 4 for weight in Checkpoint.open(folder).build_model(torch.float32).parameters())
    kept = sum(buffer.numel() * buffer.element_size() for buffer in runner.model.buffers())
    assert kept < 0.6 * dense  # packed weights stay packed


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_families_with_other_layouts_run_quantized(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    def scheme_of(module: str) -> Scheme | None:
        return None if module.endswith((".gate", "lm_head")) else Scheme(4, 16, symmetric="down" in module)

    folder = quantized_copy(tiny_model(family, odd=True), tmp_path / "model", scheme_of)
    prompts = prompts_of((20, 9), 311)
    assert worst(exact(folder).feed(prompts, [{0: 8}, {0: 1, 1: 5}]), reference_logits(folder, prompts)) < BOUND


def test_a_quantized_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", odd=True)
    folder = quantized_copy(source, tmp_path / "model", lambda module: Scheme(4, 16) if module == "lm_head" else None)
    prompts = prompts_of((9,), 311)
    runner = exact(folder)
    assert runner.model.head.bytes < 311 * 112
    assert worst(runner.feed(prompts, []), reference_logits(folder, prompts)) < BOUND


@pytest.mark.parametrize("name", ["llmcompressor-w4a16", "llmcompressor-w4a16-asymmetric", "gptqmodel-w4"])
def test_artifacts_of_other_tools(name: str) -> None:
    folder = Path(__file__).parents[1] / "oracles" / name
    prompts = prompts_of((20, 9), 64)
    assert worst(exact(folder).feed(prompts, [{0: 8}, {0: 1, 1: 5}]), reference_logits(folder, prompts)) < BOUND


def test_bitsandbytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=settings, dtype=torch.float32
    )
    source.save_pretrained(tmp_path / "model")
    prompts = prompts_of((20, 9), 320)
    runner = exact(tmp_path / "model")
    assert runner.model.slow_reasons == {}
    found = runner.feed(prompts, [{0: 8}, {0: 1, 1: 5}])
    assert worst(found, reference_logits(tmp_path / "model", prompts)) < BOUND


def test_activation_order_is_kept_dense_and_said(tmp_path: Path) -> None:
    """The layers of a GPTQ file whose groups are shuffled."""
    source = Path(__file__).parents[1] / "oracles" / "gptqmodel-w4"
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.g_idx"
    state[name] = state[name].flip(0).contiguous()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    runner = exact(tmp_path)
    assert list(runner.model.slow_reasons) == ["blocks.0.attention.output"]
    assert "kept dense: groups follow an activation order" in runner.model.slow_reasons["blocks.0.attention.output"]
    prompts = prompts_of((20,), 64)
    assert worst(runner.feed(prompts, [{0: 8}]), reference_logits(tmp_path, prompts)) < BOUND


def test_layers_of_different_schemes_are_not_merged(tmp_path: Path) -> None:
    def scheme_of(module: str) -> Scheme | None:
        kind = module.rpartition(".")[2]
        return {"q_proj": Scheme(4, 32), "k_proj": Scheme(8, 32), "gate_proj": None}.get(kind, Scheme(4, 16))

    folder = write_quantized(tmp_path / "model", scheme_of, shards=True).path
    prompts = prompts_of((20, 9), 96)
    runner = exact(folder)
    attention = runner.model.blocks[0].attention
    assert len(attention.qkv.linears) == 3
    assert worst(runner.feed(prompts, [{0: 8}]), reference_logits(folder, prompts)) < BOUND


def test_layers_of_one_scheme_are_merged(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "model", Scheme(4, 32)).path
    block = load(folder, numerics="exact").blocks[0]
    assert len(block.attention.qkv.linears) == len(block.ffn.gate_up.linears) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_fast_numerics_stay_near_exact_ones(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    prompts = prompts_of((20, 9), 320)
    fast = NaiveRunner(load(folder, numerics="fast")).feed(prompts, [{0: 8}, {0: 1, 1: 5}])
    for found, wanted in zip(fast, exact(folder).feed(prompts, []), strict=True):
        gap = torch.nn.functional.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
        )
        assert float(gap) < 1e-2


# the cache


def test_the_cache_takes_the_bytes_it_promises(tiny_model: TinyModel) -> None:
    config = load(tiny_model("gemma2"), numerics="exact").config
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config, 5, 16, dtype=dtype)
        assert cache.bytes == 5 * page_bytes(config, 16, dtype) == 5 * 16 * 3 * 2 * 2 * 16 * dtype.itemsize


def test_pages_are_copied_as_they_were_before(tiny_model: TinyModel) -> None:
    cache = KVCache(load(tiny_model("llama"), numerics="exact").config, 4, 2)
    for pages in (*cache.k, *cache.v):
        pages.copy_(torch.arange(4.0)[:, None, None, None].expand_as(pages))
    cache.copy_pages([(0, 1), (1, 0), (3, 2)])
    for pages in (*cache.k, *cache.v):
        assert pages[:, 0, 0, 0].tolist() == [1.0, 0.0, 3.0, 3.0]


# what is loaded


def test_loading_and_running_needs_no_hugging_face_library(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "model", Scheme(4, 32)).path
    code = f"""
import sys
from pathlib import Path
from tests.runtime._naive import exact
exact(Path({str(folder)!r})).step({{0: [1, 2, 3]}})
print(sorted({{"transformers", "pydantic", "datasets", "tokenizers", "safetensors"}} & set(sys.modules)))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
