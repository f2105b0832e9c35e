"""An artifact's own policy: the report counts with it, and what cannot be obeyed is refused with file and field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.errors import ArtifactError, InputError
from compress.core.kv_scheme import with_scheme
from compress.core.model_files import KV_CACHE_KEY
from compress.kv_report import OWN, kv_report
from kv_compress._budget import Points
from kv_compress._evicted import at_once, held, longest
from kv_compress.policy import KVPolicy
from kv_compress.stage import KVCache
from runtime.llm import LLM
from runtime.params import SamplingParams
from tests.conftest import TinyModel

PROMPT, PAGES, BLOCK = 56, 9, 16
MEMORY: dict[str, Any] = {"numerics": "exact", "device": "cpu", "headroom_tokens": 0, "prefix_cache": False}
Keeping = Callable[[dict[str, Any]], Path]


@pytest.fixture
def keeping(tiny_model: TinyModel, tmp_path: Path) -> Keeping:
    """keeping(settings) -> a model folder whose config.json has the policy of such a stage."""

    def make(settings: dict[str, Any]) -> Path:
        folder = shutil.copytree(tiny_model("llama"), tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        policy = KVCache.model_validate_json(json.dumps(settings)).policy(Checkpoint.open(folder))
        (folder / "config.json").write_text(json.dumps(config | {KV_CACHE_KEY: policy.to_json()}))
        return folder

    return make


@pytest.mark.parametrize(
    ("settings", "token_bytes"),
    [
        ({"precision": "int8", "eviction": {"method": "streaming", "budget": {"tokens": 20}}}, 216),
        ({"precision": "int4", "eviction": {"method": "h2o", "budget": {"ratio": 0.5}}}, 192),
        ({"precision": "full", "eviction": {"method": "tova", "budget": {"bytes": 768 * 20}}}, 768),
    ],
)
def test_as_many_sequences_are_held_as_the_report_says(
    keeping: Keeping, settings: dict[str, Any], token_bytes: int
) -> None:
    """Prompts come one after the other, each when the one before has been read; the first too many has to wait."""
    settings["eviction"] |= {"sinks": 2, "recent": 8}
    folder, memory = keeping(settings), PAGES * BLOCK * token_bytes
    report = kv_report(folder, memory_bytes=memory, context=PROMPT, dtype=torch.float32)
    [own] = [way for way in report.ways if way.name.startswith(OWN)]
    kept = 20 if "ratio" not in settings["eviction"]["budget"] else 28
    assert own.name.startswith(f"{OWN}: {settings['precision']}, {settings['eviction']['method']} ")
    assert (own.token_bytes, own.share, own.tokens) == (token_bytes, kept / PROMPT, PAGES * BLOCK)
    assert own.sequences == (PAGES - 4) // 2 + 1  # two pages behind the prompt, four while it is read
    assert own.longest == PAGES * BLOCK  # only the prompt's end is a point
    llm = LLM(folder, kv_bytes=memory, **MEMORY)
    for number in range(own.sequences + 1):
        prompt = [(number * 7 + token) % 50 + 3 for token in range(PROMPT)]
        llm.add(prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        if number < own.sequences - 1:
            while llm.stats().running <= number or llm.stats().waiting:
                llm.step()
    llm.step()
    assert (llm.stats().running, llm.stats().waiting, llm.stats().preemptions) == (own.sequences, 1, 0)


def walked(points: Points, prompt: int) -> tuple[int, int]:
    """The most slots while a prompt is read, and those behind it, token by token."""
    slots = most = 0
    for position in range(1, prompt + 1):
        slots += 1
        most = max(most, slots)
        inside = points.prompt_every and position % points.prompt_every == 0 and position < prompt
        if inside or (points.prompt_end and position == prompt):
            slots = min(slots, points.kept(position))
    return most, slots


@pytest.mark.parametrize("every", [0, 5, 16])
@pytest.mark.parametrize(("tokens", "ratio"), [(12, 0.0), (None, 0.4), (40, 0.0)])
def test_what_fits_is_what_a_walk_finds(every: int, tokens: int | None, ratio: float) -> None:
    points = Points(every, True, 0, tokens, ratio, 6, 0, False, "")
    for pages in (1, 3, 7):
        found, room = longest(points, pages, 8), pages * 8
        fitting = [walked(points, prompt)[0] <= room for prompt in range(1, 400)]
        assert (found is None) == all(fitting)
        assert found is None or (fitting.index(False) == found)
        for prompt in (3, 20, 47):
            most, slots = walked(points, prompt)
            assert held(points, prompt) == slots
            needed, stays = -(-most // 8), -(-slots // 8)
            assert at_once(points, prompt, pages, 8) == (0 if needed > pages else 1 + (pages - needed) // stays)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config[KV_CACHE_KEY])
    (folder / "config.json").write_text(json.dumps(config))


def test_an_eviction_that_cannot_be_obeyed_is_refused_with_file_and_field(keeping: Keeping) -> None:
    folder = keeping({"precision": "int8", "eviction": {"method": "snapkv", "budget": {"bytes": "32KiB"}}})
    for change, says in (
        (
            lambda policy: policy["eviction"].update(budget={"bytes": 600}),
            "eviction.budget: a budget of 600 bytes hold",
        ),
        (lambda policy: policy["eviction"].update(budget={"tokens": "64"}), "eviction.budget.tokens: "),
        (lambda policy: policy["eviction"].update(method="foo"), "eviction.method: "),
    ):
        changed(folder, change)
        with pytest.raises(InputError) as refused:
            LLM(folder, kv_bytes=1 << 20, **MEMORY)
        assert str(refused.value).startswith(f"{folder / 'config.json'}: {KV_CACHE_KEY}.{says}"), refused.value


def test_a_policy_that_two_files_say_differently_is_not_run(keeping: Keeping) -> None:
    folder = keeping({"precision": "int8"})
    policy = json.loads((folder / "config.json").read_text())[KV_CACHE_KEY]
    (folder / "compress.json").write_text(json.dumps({"kv_cache": policy}))
    assert LLM(folder, kv_bytes=1 << 20, **MEMORY).engine.scheduler.pool.page.name == "int8"
    changed(folder, lambda policy: policy["layers"][1]["keys"].update(codec="int4"))
    says = (
        r"compress.json: kv_cache: is not the policy of config.json .*layers\[1\].keys.codec is 'int8' here and 'int4'"
    )
    for look in (
        lambda: LLM(folder, kv_bytes=1 << 20, **MEMORY),
        lambda: kv_report(folder, memory_bytes=1 << 20, context=8, dtype=torch.float32),
    ):
        with pytest.raises(ArtifactError, match=says + r" there \(compress verify .* tells more\)"):
            look()
    assert LLM(folder, kv_cache="int8", kv_bytes=1 << 20, **MEMORY).kv_tokens  # whoever asks for another gets it
    (folder / "compress.json").write_text(json.dumps({"kv_cache": None}))
    with pytest.raises(ArtifactError, match="it is missing here and {'layers'"):
        LLM(folder, kv_bytes=1 << 20, **MEMORY)


def refusals(folder: Path) -> list[str]:
    """What the runtime and the report say of a model folder."""
    found = []
    for look in (
        lambda: LLM(folder, kv_bytes=1 << 20, **MEMORY),
        lambda: kv_report(folder, memory_bytes=1 << 20, context=8, dtype=torch.float32),
    ):
        with pytest.raises(InputError) as refused:
            look()
        found.append(f"{refused.value} {refused.value.hint}")
    return found


PAGED = {"precision": "int4", "keys": "channel"}
EVICTING = {"precision": "int8", "eviction": {"method": "streaming", "budget": {"tokens": 64}}}


def widened(policy: dict[str, Any]) -> None:
    """All in full but the keys of one layer: pages that are hardly smaller."""
    policy["layers"][1:] = [{"keys": {"codec": "full"}, "values": {"codec": "full"}}] * 2
    policy["layers"][0]["values"] = {"codec": "full"}


@pytest.mark.parametrize(
    ("settings", "change", "says"),
    [
        (PAGED, lambda policy: policy["layers"].pop(), ": the policy has 2 layers, the model 3"),
        (PAGED, lambda policy: policy["layers"][0]["values"].update(per="channel"), ": layer 0 of the policy: only"),
        (PAGED, lambda policy: policy["layers"][0]["keys"].update(rotate=True), ": layer 0 of the policy: codes per"),
        (PAGED, widened, ".layers: a page of 16 tokens in full"),
        (EVICTING, lambda policy: policy.update(sinks=4), ": the policy codes whole pages"),
        (EVICTING, lambda policy: policy["eviction"].update(budget={"bytes": 600}), ".eviction.budget: a budget of"),
        (
            EVICTING | {"eviction": EVICTING["eviction"] | {"method": "adakv"}},
            lambda policy: policy["layers"][0]["keys"].update(codec="int4"),
            ".eviction.method: layers cannot keep unequal",
        ),
    ],
)
def test_the_report_refuses_what_the_runtime_refuses_in_the_same_words(
    keeping: Keeping, settings: dict[str, Any], change: Callable[[dict[str, Any]], object], says: str
) -> None:
    folder = keeping(settings)
    changed(folder, change)
    by_runtime, by_report = refusals(folder)
    assert by_report == by_runtime
    assert by_report.startswith(f"{folder / 'config.json'}: {KV_CACHE_KEY}{says}")


def test_a_sliding_window_that_eviction_would_break_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("mistral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    layers = [{"keys": {"codec": "int8"}, "values": {"codec": "int8"}}] * config["num_hidden_layers"]
    eviction = {"method": "streaming", "budget": {"tokens": 16}, "recent": 4}
    config[KV_CACHE_KEY] = {"layers": layers, "eviction": eviction}
    (folder / "config.json").write_text(json.dumps(config))
    by_runtime, by_report = refusals(folder)
    assert by_report == by_runtime
    assert f"{KV_CACHE_KEY}.eviction.recent: the model has layers with a sliding window of 8" in by_report


def test_the_report_counts_with_the_scheme_of_other_tools(tiny_model: TinyModel, tmp_path: Path) -> None:
    """fp8 in quantization_config alone: 3 layers of 2 heads of 16 channels, keys and values, a byte each."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(with_scheme(config)))
    found = kv_report(folder, memory_bytes=1 << 20, context=64, dtype=torch.float32)
    assert {(layer.keys, layer.values, layer.bytes) for layer in found.layers} == {("fp8", "fp8", 64)}
    assert [way.token_bytes for way in found.ways if way.name == f"{OWN}: fp8"] == [192] * 4
    assert LLM(folder, kv_bytes=1 << 20, **MEMORY).engine.scheduler.pool.page.bytes == 192 * BLOCK


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"sinks": 1 << 21},
            "config.json: kv.sinks: must be a whole number of tokens from 0 to 1,048,576, not 2097152",
        ),
        ({"recent": -1}, "config.json: kv.recent: must be a whole number of tokens from 0 to 1,048,576, not -1"),
        ({"recent": True}, "config.json: kv.recent: must be a whole number"),
        ({"layers": []}, "config.json: kv.layers: must be a list of 1 to 4,096 layers, not []"),
        ({"eviction": [1]}, "config.json: kv.eviction: must be a mapping of settings, not [1]"),
        ({"recnt": 4}, "config.json: kv: 'recnt' is no setting of a policy"),
    ],
)
def test_a_setting_that_is_wrong_is_named(change: dict[str, Any], says: str) -> None:
    layers = [{"keys": {"codec": "int8"}, "values": {"codec": "int8"}}] * 40  # more than a message has room for
    with pytest.raises(InputError) as refused:
        KVPolicy.parse({"layers": layers} | change, "config.json: kv")
    assert str(refused.value).startswith(says)
