"""Coded keys and values in a whole model: against transformers with the same loss, and through all that engines do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as softcapped

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from kv_compress._coding import round_trip
from kv_compress.policy import Coding, KVPolicy, LayerPolicy
from runtime.cache import page_bytes
from runtime.llm import LLM
from runtime.loader import load
from runtime.small_steps import SmallSteps
from tests.conftest import TinyModel
from tests.runtime._naive import NaiveRunner, prompts_of
from tests.runtime._reference import worst

INT8, INT4, FP8 = Coding("int8"), Coding("int4"), Coding("fp8", scale=(0.0625,))
TURNED = LayerPolicy(Coding("int4", rotate=True), Coding("int8", rotate=True))
MIXED = KVPolicy((LayerPolicy(INT8, INT4), TURNED, LayerPolicy(FP8)))
PLAIN = KVPolicy((LayerPolicy(INT8, INT4), LayerPolicy(INT4, INT8), LayerPolicy(FP8, FP8)))
POLICIES = {"int8": KVPolicy.uniform("int8", 3), "mixed": MIXED}


def transformers_logits(folder: Path, policy: KVPolicy, prompts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' own attention, over keys and values that went through the codecs."""

    def coded(module, query, key, value, mask, **more):
        of = policy.layers[module.layer_idx]
        seen = [
            round_trip(x.codec, y.transpose(1, 2), torch.tensor(x.scale), rotate=x.rotate).transpose(1, 2)
            for x, y in ((of.keys, key), (of.values, value))
        ]
        attend = softcapped if "softcap" in more else sdpa_attention_forward
        return attend(module, query, *seen, mask, **more)

    model = Checkpoint.open(folder).build_model(torch.float32)
    eager = model.config.model_type == "gemma2"
    AttentionInterface.register("coded", coded)
    AttentionMaskInterface.register("coded", eager_mask if eager else sdpa_mask)
    model.set_attn_implementation("coded")
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_model_is_transformers_over_rounded_keys(
    tiny_model: TinyModel, family: str, policy: str, numerics: str
) -> None:
    folder, prompts = tiny_model(family), prompts_of((30, 9), 320)
    model = load(folder, numerics=numerics, dtype=torch.float32, kv_cache=POLICIES[policy])
    wanted = transformers_logits(folder, POLICIES[policy], prompts)
    found = NaiveRunner(model).feed(prompts, [{0: 11, 1: 3}, {1: 1}, {0: 7, 1: 2}])
    # a number that lies between two codes falls to either side: a few rows may differ by the step of a code
    errors = torch.cat([(a - b).abs().amax(-1) for a, b in zip(found, wanted, strict=True)])
    assert errors.median() < 1e-4 and errors.max() < 0.05
    full = transformers_logits(folder, KVPolicy.uniform("full", 3), prompts)
    assert worst(found, full) > 100 * errors.median()  # the codecs were not left out


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_depend_on_nothing_that_an_engine_does(tiny_model: TinyModel, policy: str) -> None:
    """Batches, chunks, preemption, prefix hits and n > 1, in exact numerics: to the bit."""
    prompts = prompts_of((25, 23, 7, 20), 320)
    prompts.append(prompts[0][:24] + [5, 6])
    settings = {"max_tokens": 16, "ignore_eos": True, "logprobs": 1}
    folder, of = tiny_model("llama"), POLICIES[policy]
    alone = LLM(folder, numerics="exact", kv_cache=of, prefix_cache=False, max_sequences=1, max_length=64)
    wanted = [alone.generate([prompt], **settings)[0] for prompt in prompts]
    tight = LLM(
        folder, numerics="exact", kv_cache=of, block_size=8, max_length=64, token_budget=13, headroom_tokens=0,
        kv_bytes=11 * page_bytes(alone.config, 8, torch.float32, of),
    )  # fmt: skip
    found = [*tight.generate(prompts[:4], **settings), *tight.generate(prompts[:1], **settings)]
    found += tight.generate(prompts[4:], **settings)
    wanted.insert(4, wanted[0])
    assert [(each.token_ids, each.logprobs) for each in found] == [(each.token_ids, each.logprobs) for each in wanted]
    assert tight.stats().preemptions > 0
    assert tight.stats().pages.hit_tokens >= 24
    both = tight.generate([prompts[2]], n=2, temperature=0.0, max_tokens=16, ignore_eos=True)
    assert [each.token_ids for each in both] == [wanted[2].token_ids] * 2
    tight.engine.scheduler.pool.check_integrity([])


def test_small_steps_store_and_read_codes(tiny_model: TinyModel) -> None:
    """step.c against the layers: fp32 numbers on either side of a code may differ, and then by one step of it."""
    llm = LLM(tiny_model("llama"), kv_cache=PLAIN, dtype=torch.float32, device="cpu")
    if llm.engine.runner.whole is None:
        pytest.skip("needs gcc")
    assert SmallSteps.of(load(tiny_model("llama"), numerics="fast", dtype=torch.float32, kv_cache=MIXED),
                         llm.engine.runner.cache) is not None  # fmt: skip
    prompts = prompts_of((20, 3, 9), 320)
    found = llm.generate(prompts, max_tokens=12, ignore_eos=True)
    llm.engine.runner.whole = None
    llm.engine.scheduler.pool.forget()
    assert [each.token_ids for each in llm.generate(prompts, max_tokens=12, ignore_eos=True)] == [
        each.token_ids for each in found
    ]


def test_the_ledger_says_what_is_allocated(tiny_model: TinyModel) -> None:
    full, coded = (
        LLM(tiny_model("llama"), kv_bytes=1 << 20, max_length=64, kv_cache=policy, device="cpu", dtype=torch.float32)
        for policy in (None, PLAIN)
    )
    for llm in (full, coded):
        cache = llm.engine.runner.cache
        tensors = [tensor for layer in cache.layers() for pages in layer for tensor in pages.tensors()]
        assert llm.ledger.kv_pool_bytes == sum(tensor.nbytes for tensor in tensors) <= 1 << 20
        assert llm.ledger.kv_pool_bytes == cache.pages * llm.engine.scheduler.pool.page.bytes
    pages = [llm.engine.scheduler.pool.pages for llm in (full, coded)]
    rows = [18 + 12, 12 + 18, 16 + 16]  # bytes of a head's key and value, layer by layer
    assert pages == [(1 << 20) // (16 * 2 * 3 * 128), (1 << 20) // (16 * 2 * sum(rows))]
    assert coded.engine.scheduler.pool.page.name == "int8+int4+fp8"


def test_what_does_not_exist_or_fit_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="'int2'"):
        LLM(tiny_model("llama"), kv_cache="int2")
    with pytest.raises(InputError, match="2 layers, the model 3"):
        LLM(tiny_model("llama"), kv_cache=KVPolicy.uniform("int8", 2))
    with pytest.raises(InputError, match="no power of two"):
        LLM(tiny_model("llama", odd=True), kv_cache=KVPolicy.uniform("int8", 3, rotate=True))
