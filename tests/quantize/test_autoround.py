"""AutoRound: a learned block is nearer to the original's output, whatever it learned is what is stored, and experts
without tokens are left at the nearest codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.events import Event, Metric, Notice
from compress.core.methods import find_pass
from compress.core.passes import Job
from compress.core.tensors import QuantTensor
from quantize._autoround import original_outputs
from quantize.autoround import AutoRound
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run, tokens_for
from tests.contracts.test_passes import same


def job_of(
    checkpoint: Checkpoint, tokens: Tokens, events: list[Event] | None = None, shelf: Shelf | None = None
) -> Job:
    heard = [] if events is None else events
    return Job(checkpoint, tokens, Shelf() if shelf is None else shelf, events=heard.append)


def output_error(checkpoint: Checkpoint, tokens: Tokens, shelf: Shelf) -> float:
    """Mean squared difference of the logits."""
    model = checkpoint.build_model(torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        expected = model(input_ids=tokens.ids).logits
        for name, tensor in shelf.quantized.items():
            weights[f"{name}.weight"].copy_(tensor.dequantize())
        return float((model(input_ids=tokens.ids).logits - expected).square().mean())


@pytest.mark.parametrize(("start", "symmetric", "part"), [("gptq", True, 0.98), ("rtn", False, 0.9)])
def test_learning_beats_its_start_on_other_tokens(
    tiny_model: TinyModel, start: str, symmetric: bool, part: float
) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(checkpoint, 24, 32)
    fresh = Tokens(tokens.ids.flip(0, 1), None, sha256="", source="reversed")
    settings = AutoRound(scheme="w2a16", group_size=16, symmetric=symmetric, start=start, steps=30, tokens_per_step=256)
    errors = {}
    for reach, scale_reach in ((0.2, 0.1), (1e-6, 0.0)):  # with next to no reach a place stays in its bin: the start
        shelf = Shelf()
        here = settings.model_copy(update={"reach": reach, "scale_reach": scale_reach})
        here.run(job_of(checkpoint, tokens, shelf=shelf))
        errors[reach] = output_error(checkpoint, fresh, shelf)
    assert errors[0.2] < part * errors[1e-6]


def test_targets_are_the_original_models_own_outputs(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("gemma2"))
    tokens = tokens_for(checkpoint, 3, 20)
    model = checkpoint.build_model(torch.float32)
    with torch.no_grad():
        states = model(input_ids=tokens.ids, output_hidden_states=True).hidden_states
    found = [[sample.clone() for sample in outputs] for outputs in original_outputs(job_of(checkpoint, tokens))]
    assert len(found) == checkpoint.num_blocks
    for index in range(checkpoint.num_blocks - 1):  # the last of transformers' states is behind the final norm
        torch.testing.assert_close(torch.stack(found[index]), states[index + 1], rtol=1e-4, atol=1e-4)


def test_a_resumed_run_gets_the_targets_of_its_first_unfinished_block(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(checkpoint, 2, 16)
    whole = [[sample.clone() for sample in outputs] for outputs in original_outputs(job_of(checkpoint, tokens))]
    shelf = Shelf()
    shelf.blocks = [{}, {}]
    (last,) = original_outputs(job_of(checkpoint, tokens, shelf=shelf))
    assert all(torch.equal(one, other) for one, other in zip(whole[2], last, strict=True))


def test_padding_is_not_learned_from(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(checkpoint, 8, 32)
    lengths = torch.tensor([32, 20, 9, 32, 5, 30, 17, 25])
    shelves = []
    for filling in (7, 11):
        ids = tokens.ids.clone()
        ids[torch.arange(32) >= lengths[:, None]] = filling
        shelf = Shelf()
        padded = Tokens(ids, lengths, sha256="", source="padded")
        AutoRound(group_size=16, steps=5, tokens_per_step=64).run(job_of(checkpoint, padded, shelf=shelf))
        shelves.append(shelf.quantized)
    first, second = shelves
    assert all(torch.equal(first[name].packed, second[name].packed) for name in first)


def test_experts_without_tokens_keep_the_nearest_codes_and_are_named(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("mixtral"))
    tokens, events = tokens_for(checkpoint, 2, 6), []
    shelf = Shelf()
    AutoRound(scheme="w4a16", group_size=16, steps=3, start="rtn").run(job_of(checkpoint, tokens, events, shelf))
    records = {site.name: site for record in shelf.records for site in record.sites}
    starved = {name for name, site in records.items() if ".experts." in name}
    assert starved and all("tokens" in records[name].fallback for name in starved)
    assert {event.where for event in events if isinstance(event, Notice)} >= starved
    attention = records["model.layers.0.self_attn.q_proj"]
    assert attention.method in ("autoround", "rtn") and not attention.fallback


def test_what_is_not_better_on_held_back_samples_is_not_kept(tiny_model: TinyModel) -> None:
    """Steps of many bins make a block worse: its start comes back, and the event says that nothing was gained."""
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(checkpoint, 8, 32)
    shelves, events = [], []
    wild = AutoRound(scheme="w8a16", group_size=16, steps=1, reach=16)
    for settings in (wild, wild.model_copy(update={"reach": 1e-9, "scale_reach": 0.0})):
        shelf = Shelf()
        settings.run(job_of(checkpoint, tokens, events, shelf))
        shelves.append(shelf.quantized)
    worse, untouched = shelves
    assert all(torch.equal(worse[name].packed, untouched[name].packed) for name in worse)
    left = [event.value for event in events if isinstance(event, Metric) and event.name == "error_left"]
    assert left == [1.0] * len(left) and left


def test_another_seed_learns_otherwise(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(checkpoint, 16, 24)
    results = []
    for seed in (0, 1):
        shelf = Shelf()
        settings = AutoRound(
            scheme="w2a16", group_size=16, start="rtn", steps=30, reach=0.2, scale_reach=0.1, tokens_per_step=96
        )
        settings.run(replace(job_of(checkpoint, tokens, shelf=shelf), seed=seed))
        results.append(shelf.quantized)
    assert any(not torch.equal(results[0][name].packed, results[1][name].packed) for name in results[0])


def test_the_plan_grows_with_steps_and_tokens(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_for(checkpoint)
    short, long = (AutoRound(group_size=16, steps=steps).plan(checkpoint, tokens) for steps in (10, 10_000))
    assert long.minutes > short.minutes and long.peak_memory_bytes == short.peak_memory_bytes
    wide = AutoRound(group_size=16, steps=10, tokens_per_step=1).plan(checkpoint, tokens)
    assert wide.peak_memory_bytes < short.peak_memory_bytes


def test_learned_tensors_are_ordinary(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    shelf = Shelf()
    settings = AutoRound(scheme="w2a16", group_size=16, symmetric=False, steps=10, reach=2)
    settings.run(job_of(checkpoint, tokens_for(checkpoint), shelf=shelf))
    for tensor in shelf.quantized.values():
        assert isinstance(tensor, QuantTensor) and tensor.scale.dtype is checkpoint.dtype
        assert int(tensor.codes().min()) >= -2 and int(tensor.codes().max()) <= 1


@pytest.mark.parametrize("step", [{"rotate": {}}, {"awq_scale": {"steps": 3}}], ids=["rotate", "awq_scale"])
def test_learning_starts_from_prepared_weights(tiny_model: TinyModel, step: dict[str, dict[str, int]]) -> None:
    """Codes of the prepared weights, near them; interrupted and resumed to the bit."""
    folder = tiny_model("llama")
    same_for_both = {"scheme": "w4a16", "group_size": 16, "prepare": (step,), "ignore": ("*.up_proj",)}
    settings = AutoRound(**same_for_both, steps=4, reach=0.05, scale_reach=0.02)
    gptq = find_pass("quantize", "gptq")(**same_for_both)
    whole = run(folder, settings, Shelf())
    assert same(whole, run(folder, settings, Shelf(whole, 1)))
    expected = run(folder, gptq, Shelf()).quantized
    for name, tensor in whole.quantized.items():
        weight = expected[name].dequantize()
        assert float((tensor.dequantize() - weight).square().mean() / weight.square().mean()) < 0.03, name
