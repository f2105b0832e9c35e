"""The decoder against transformers: every family, in chunks and decodes of mixed batches, dense and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from runtime.cache import KVCache, page_bytes
from runtime.layers.mlp import activation_of
from runtime.loader import load
from runtime.models.config import Activation
from runtime.ops.batch import AttentionBatch
from tests.conftest import TinyModel
from tests.runtime._folders import edited
from tests.runtime._naive import NaiveRunner, exact, prompts_of
from tests.runtime._reference import reference_greedy, reference_logits, worst
from tests.tiny import FAMILIES, config_of

LENGTHS = (23, 37, 1, 12)
# prompt chunks beside whole prompts and single tokens; sequences come and go; the last step takes what is left
SCHEDULE = ({0: 7}, {0: 5, 1: 30}, {1: 1, 0: 1, 2: 1}, {3: 11, 1: 1, 0: 3}, {3: 1, 0: 4, 1: 2})
FORMS = [(family, odd) for family in FAMILIES for odd in (False, True)]
NAMES = [f"{family}-{'odd' if odd else 'plain'}" for family, odd in FORMS]
BOUND = 1e-4


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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_files_in_exact_numerics(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family, dtype="bfloat16")
    prompts = prompts_of((20, 9), 320)
    assert worst(exact(folder).feed(prompts, [{0: 8}, {0: 1, 1: 5}]), reference_logits(folder, prompts)) < BOUND


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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_fast_numerics_stay_near_exact_ones(
    tiny_model: TinyModel, family: str, dtype: torch.dtype, bound: float
) -> None:
    folder = tiny_model(family)
    prompts = prompts_of((20, 9), 320)
    fast = NaiveRunner(load(folder, numerics="fast", dtype=dtype)).feed(prompts, [{0: 8}, {0: 1, 1: 5}])
    for found, wanted in zip(fast, exact(folder).feed(prompts, []), strict=True):
        logs = found.log_softmax(-1), wanted.log_softmax(-1)
        divergence = torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
        assert float(divergence) < bound


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
