"""LLM on model folders: texts in and out, streams, memory, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.core.checkpoint import Checkpoint, load_tokenizer
from compress.core.errors import EnvironmentRefused, InputError, ResourceError, UsageError
from runtime.llm import LLM, SchedulerKeywords
from runtime.memory import Ledger
from runtime.params import SamplingParams, SamplingSettings
from runtime.scheduler import RequestTooLong, SchedulerSettings
from runtime.trace import replay
from tests.conftest import TinyModel

DEMO = Path(__file__).resolve().parents[2] / "compress" / "demo" / "model"
PROMPTS = ["The sun", "Once upon a time, there was a dog", "", "Lily saw a café — “hello”"]


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(DEMO, numerics="exact", device="cpu", max_sequences=8)


@pytest.fixture(scope="module")
def reference() -> list[dict[str, Any]]:
    """What transformers makes of the prompts: greedy tokens and text."""
    model = Checkpoint.open(DEMO).build_model(torch.float32)
    tokenizer = load_tokenizer(DEMO)
    made = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        kept = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=2
        )
        tokens = kept[0, ids.shape[1] :].tolist()
        made.append(
            {"ids": ids[0].tolist(), "tokens": tokens, "text": tokenizer.decode(tokens, skip_special_tokens=True)}
        )
    return made


def test_greedy_text_is_that_of_transformers(demo: LLM, reference: list[dict[str, Any]]) -> None:
    completions = demo.generate(PROMPTS, max_tokens=24)
    for completion, expected in zip(completions, reference, strict=True):
        assert list(completion.token_ids) == expected["tokens"]
        assert completion.text == expected["text"]
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 1 else "length")


@pytest.mark.parametrize("name", ["stories-7m", "tinystories-656k"])
def test_real_models_say_what_they_say_in_transformers(shared_data: Path, name: str) -> None:
    folder = shared_data / "models" / name
    llm = LLM(folder, numerics="exact", device="cpu", max_sequences=4, token_budget=20)
    model = Checkpoint.open(folder).build_model(torch.float32)
    prompts = [
        llm.encode(text) for text in ("Once upon a time", "The little dog was sad because", "Tom", "One day, Sue")
    ]
    completions = llm.generate(prompts, max_tokens=40, ignore_eos=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        kept = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert list(completion.token_ids) == kept[0, len(prompt) :].tolist()


def test_texts_and_ids_are_the_same_prompt(demo: LLM, reference: list[dict[str, Any]]) -> None:
    [text] = demo.generate("The sun", max_tokens=5)
    [one] = demo.generate(reference[0]["ids"], max_tokens=5)
    [other] = demo.generate([reference[0]["ids"]], max_tokens=5)
    assert text == one == other
    [bare] = demo.generate(reference[0]["ids"][1:], max_tokens=5)
    assert bare == demo.generate("The sun", max_tokens=5, special_tokens=False)[0] != text


def test_completions_come_in_the_order_of_their_prompts(demo: LLM) -> None:
    many = demo.generate(PROMPTS * 3, temperature=1.0, n=2, seed=3, max_tokens=4, top_k=50)
    assert [completion.index for completion in many] == [0, 1] * 12
    assert many[:8] == many[8:16] == many[16:]
    assert many[0].token_ids != many[1].token_ids


def test_each_prompt_may_have_its_own_params(demo: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=count) for count in (1, 5, 3, 2)]
    completions = demo.generate(PROMPTS, params)
    assert [len(completion.token_ids) for completion in completions] == [1, 5, 3, 2]
    with pytest.raises(UsageError, match="2 params for 4 prompts"):
        demo.generate(PROMPTS, params[:2])
    with pytest.raises(UsageError, match="max_tokens"):
        demo.generate(PROMPTS, params, max_tokens=3)


def test_stop_strings_end_and_are_cut_off(demo: LLM) -> None:
    [whole] = demo.generate("The sun", max_tokens=40)
    [cut] = demo.generate("The sun", max_tokens=40, stop=[" her toys", "never"])
    assert " her toys" in whole.text
    assert cut.text == whole.text.split(" her toys")[0]
    assert cut.finish_reason == "stop"


def test_streams_say_what_generate_says(demo: LLM) -> None:
    [expected] = demo.generate("The sun", max_tokens=20)
    updates = list(demo.stream("The sun", max_tokens=20))
    assert len(updates) == 20
    assert "".join(update.text for update in updates) == expected.text
    assert sum((update.token_ids for update in updates), ()) == expected.token_ids
    assert [update.finish_reason for update in updates] == [None] * 19 + ["length"]


def test_streams_and_batches_do_not_take_each_others_news(demo: LLM) -> None:
    [first] = demo.generate("The sun", max_tokens=12)
    [second] = demo.generate("A dog", max_tokens=12)
    streams = {"first": demo.stream("The sun", max_tokens=12), "second": demo.stream("A dog", max_tokens=12)}
    texts = dict.fromkeys(streams, "")
    for _ in range(6):
        for name, stream in streams.items():
            texts[name] += next(stream).text
    assert demo.generate("The sun", max_tokens=12) == [first]
    for name, stream in streams.items():
        texts[name] += "".join(update.text for update in stream)
    assert texts == {"first": first.text, "second": second.text}
    assert not demo.has_work


def test_closing_a_stream_frees_its_pages(demo: LLM) -> None:
    stream = demo.stream("The sun", max_tokens=200)
    next(stream)
    assert demo.stats().pages.owned > 0
    stream.close()
    assert demo.stats().pages.owned == 0
    assert not demo.has_work


def test_a_stream_that_nobody_reads_costs_nothing(demo: LLM) -> None:
    demo.stream("The sun", max_tokens=200)
    assert not demo.has_work
    with pytest.raises(UsageError, match="top_p"):
        demo.stream("The sun", top_p=7)


def test_a_refused_prompt_leaves_nothing_behind(demo: LLM) -> None:
    with pytest.raises(RequestTooLong, match="512"):
        demo.generate(["The sun", [5] * 600], max_tokens=10)
    assert not demo.has_work
    assert demo.stats().pages.owned == 0


def test_step_by_step(demo: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    demo.add("The sun", params, "kept", tenant="a", priority=1)
    demo.add("A dog", params, "dropped")
    demo.step()
    demo.abort("dropped")
    reasons = {}
    while demo.has_work:
        reasons |= {update.request: update.finish_reason for update in demo.step()}
    assert reasons.keys() == {"kept", "dropped"}
    assert reasons["dropped"] == "abort"
    assert reasons["kept"] in ("stop", "length")


def test_more_prompts_than_the_queue_takes(tiny_model: TinyModel) -> None:
    llm = LLM(tiny_model("llama"), numerics="exact", max_queue=2, max_sequences=2, block_size=4)
    prompts = [[number, 3] for number in range(12)]
    expected = [llm.generate([prompt], max_tokens=5)[0] for prompt in prompts]
    assert llm.generate(prompts, max_tokens=5) == expected


def test_nan_in_one_request_reaches_nobody_else(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Pages that held NaN are used again by others; what they hold beyond a sequence's end must not matter."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("mistral"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for numerics in ("exact", "fast"):
        options = {
            "numerics": numerics,
            "block_size": 4,
            "kv_bytes": 16 * 4 * 3 * 2 * 2 * 16 * 4,
            "prefix_cache": False,
        }
        healthy = [[number, 3, 9] for number in range(10, 14)]
        expected = [LLM(folder, **options).generate([prompt], max_tokens=9)[0] for prompt in healthy]
        llm = LLM(folder, **options)
        poisoned = llm.generate([[7, 1, 2], *healthy, [1] * 20 + [7], [7] * 40], max_tokens=9, logprobs=2)
        assert [completion.finish_reason for completion in poisoned] == ["error", *["length"] * 4, "error", "error"]
        for _ in range(3):  # every page has held NaN by now
            llm.generate([[7] * 40], max_tokens=2)
            for completion, wanted in zip(llm.generate(healthy, max_tokens=9), expected, strict=True):
                assert completion.token_ids == wanted.token_ids


def test_end_tokens_come_from_the_generation_settings(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    [free] = LLM(folder, numerics="exact").generate([[1, 2, 3]], max_tokens=6, ignore_eos=True)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [300, free.token_ids[2]]}))
    [ended] = LLM(folder, numerics="exact").generate([[1, 2, 3]], max_tokens=6)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]
    assert ended.finish_reason == "stop"
    settings.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(InputError, match="eos_token_id"):
        LLM(folder)


def test_without_a_tokenizer_ids_go_in_and_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    llm = LLM(folder)
    [completion] = llm.generate([[1, 2, 3]], max_tokens=4)
    assert (completion.text, len(completion.token_ids)) == ("", 4)
    with pytest.raises(UsageError, match="no tokenizer"):
        llm.generate("text")
    with pytest.raises(UsageError, match="stop"):
        llm.generate([[1]], stop="x")


def test_memory_is_kept_to(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    page = 16 * 3 * 2 * 2 * 16 * 4  # slots, layers, keys and values, heads, channels, bytes
    llm = LLM(folder, numerics="exact", kv_bytes=10 * page + 1)
    assert llm.ledger.kv_pool_bytes == 10 * page
    assert llm.engine.scheduler.pool.pages == 10
    whole = llm.ledger.weights_bytes + llm.ledger.activations_bytes
    assert LLM(folder, numerics="exact", memory=whole + 3 * page).ledger.kv_pool_bytes == 3 * page
    default = LLM(folder, numerics="exact", max_sequences=3, max_length=100)
    assert default.ledger.kv_pool_bytes == 3 * 7 * page
    assert isinstance(default.ledger, Ledger)
    assert default.ledger.total_bytes == sum(getattr(default.ledger, field.name) for field in fields(Ledger))
    with pytest.raises(ResourceError, match="kv_bytes") as refused:
        LLM(folder, kv_bytes=page - 1, block_size=16, dtype=torch.float32)
    [least] = re.findall(r"at least ([\d,]+)", refused.value.hint or "")
    assert int(least.replace(",", "")) == page
    assert LLM(folder, kv_bytes=page, dtype=torch.float32).engine.scheduler.pool.pages == 1
    with pytest.raises(ResourceError, match="memory"):
        LLM(folder, memory="10kB")


def test_weights_are_counted_once(tiny_model: TinyModel) -> None:
    tied = LLM(tiny_model("llama"), numerics="exact").ledger.weights_bytes
    on_disk = (tiny_model("llama") / "model.safetensors").stat().st_size
    assert abs(tied - on_disk) < 0.15 * on_disk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1000}, "max_length"),
        ({"max_length": 0}, "max_length"),
        ({"memory": "4 parrots"}, "memory"),
        ({"kv_bytes": 0}, "kv_bytes"),
        ({"block_size": 0}, "block_size"),
        ({"max_seqs": 3}, "max_seqs"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"policy": "lifo"}, "lifo"),
        ({"policy": ["fcfs"]}, "fcfs"),
        ({"max_length": "long"}, "max_length must be a whole number"),
        ({"max_length": 12.0}, "max_length must be a whole number"),
        ({"block_size": "16"}, "block_size must be a whole number"),
        ({"max_sequences": "4"}, "max_sequences must be a whole number"),
        ({"token_budget": True}, "token_budget must be a whole number"),
        ({"headroom_tokens": None}, "headroom_tokens must be a whole number"),
        ({"chunked_prefill": 1}, "chunked_prefill must be true or false"),
        ({"input_weight": "1"}, "input_weight must be a number"),
        ({"tenant_weights": ["a"]}, "tenant_weights"),
        ({"tenant_weights": {"a": "1"}}, "tenant 'a'"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"device": 0}, "device"),
        ({"dtype": "float32"}, "dtype"),
        ({"numerics": "rough"}, "rough"),
        ({"record": 3}, "record"),
        ({"memory": 1.5}, "memory"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tiny_model: TinyModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(tiny_model("llama"), **options)


def test_a_recording_goes_into_a_folder_that_is_there(tmp_path: Path) -> None:
    """Which is said before the model is loaded: this one is not there either."""
    with pytest.raises(UsageError, match="nowhere: there is no such folder for the trace"):
        LLM(tmp_path / "model", record=tmp_path / "nowhere" / "trace.jsonl")


def test_a_name_that_is_no_text_is_refused(demo: LLM) -> None:
    with pytest.raises(UsageError, match="a request's name is a text, not 7"):
        demo.add("The sun", SamplingParams(max_tokens=1), request=7)  # pyright: ignore[reportArgumentType]
    assert not demo.has_work


def test_unknown_sampling_keywords_are_refused(demo: LLM) -> None:
    with pytest.raises(UsageError, match="beam_width"):
        demo.generate("The sun", beam_width=3)  # pyright: ignore[reportCallIssue]


def test_recorded_steps_can_be_replayed(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with LLM(tiny_model("llama"), record=path, block_size=4) as llm:
        llm.generate([[1, 2, 3], [4, 5]], max_tokens=6, n=2, temperature=1.0)
        steps = llm.stats().steps
    assert len(list(replay(path))) == steps == 6


def test_keywords_are_those_of_the_settings() -> None:
    assert set(get_type_hints(SchedulerKeywords)) == {field.name for field in fields(SchedulerSettings)}
    assert set(get_type_hints(SamplingSettings)) == {field.name for field in fields(SamplingParams)}


def test_llm_is_part_of_the_lazy_public_api() -> None:
    assert compress.LLM is LLM
    assert "LLM" in compress.__all__
    script = "import sys, compress; sys.exit(int('runtime.llm' in sys.modules or 'torch._C' in sys.modules))"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", script], check=False, env=environment).returncode == 0


def test_threads_take_turns_and_get_their_own_answers(demo: LLM) -> None:
    alone = [demo.generate(prompt, max_tokens=12)[0].token_ids for prompt in PROMPTS if prompt]
    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda prompt: demo.generate(prompt, max_tokens=12)[0].token_ids, filter(None, PROMPTS))
        )
    assert found == alone
    demo.engine.check_integrity()


@pytest.mark.parametrize(
    ("device", "error"), [("tpu", UsageError), ("cpu:x", UsageError), ("cuda", EnvironmentRefused)]
)
def test_a_device_that_is_not_there_is_refused(device: str, error: type[Exception]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match="device|GPU"):
        LLM(DEMO, device=device)


@pytest.mark.parametrize("given", [{"tenant": 5}, {"priority": "high"}, {"priority": True}])
def test_a_tenant_or_priority_of_another_type_is_refused(demo: LLM, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="tenant is a text and priority a whole number"):
        demo.add("The sun", SamplingParams(), **given)
    assert not demo.has_work


@pytest.mark.parametrize("prompts", [None, 5, b"abc", [b"abc"]])
def test_prompts_of_another_type_are_refused(demo: LLM, prompts: Any) -> None:
    with pytest.raises(UsageError, match="prompt"):
        demo.generate(prompts)
