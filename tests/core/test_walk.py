"""The walk: every family against transformers' own forward; orders, padding, spilling, resume, determinism."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.core._activations import Activations
from compress.core._skeleton import StoredLinear
from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.cuts import Cuts
from compress.core.errors import InputError, ResourceError, UsageError
from compress.core.events import Event, Metric, Progress
from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from compress.core.statistics import Hessian, SquaredMean
from compress.core.tensors import QuantTensor
from compress.core.walk import Block, BlockRecord, measure, stream_logits, walk
from tests.conftest import TinyModel
from tests.tiny import FAMILIES, LAYERS


def tokens_of(checkpoint: Checkpoint, samples: int = 5, length: int = 24, lengths: list[int] | None = None) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, checkpoint.config["vocab_size"], (samples, length), generator=generator)
    return Tokens.of(ids, None if lengths is None else torch.tensor(lengths))


def rounded(weight: Tensor, bits: int = 4) -> QuantTensor:
    return fit_grid(weight, Scheme(bits), scale_dtype=torch.float32).round(weight)


class Memory:
    """A sink in memory."""

    def __init__(self) -> None:
        self.blocks: list[tuple[dict[str, Tensor | QuantTensor], BlockRecord]] = []

    def finished(self) -> int:
        return len(self.blocks)

    def load(self, index: int) -> dict[str, Tensor | QuantTensor]:
        return self.blocks[index][0]

    def record(self, index: int) -> BlockRecord:
        return self.blocks[index][1]

    def commit(self, index: int, tensors: dict[str, Tensor | QuantTensor], record: BlockRecord, cuts: Cuts) -> None:
        assert index == len(self.blocks)
        self.blocks.append((dict(tensors), record))

    def bits(self) -> list[tuple[str, bytes]]:
        found = []
        for tensors, _ in self.blocks:
            for name, value in tensors.items():
                parts = [value.packed, value.scale] if isinstance(value, QuantTensor) else [value]
                found.append((name, b"".join(part.numpy().tobytes() for part in parts)))
        return found


def compress_with_hessian(blocks: Iterator[Block], stop_before: int | None = None) -> list[int]:
    """A stand-in for GPTQ whose result depends on every bit of the statistics. Returns the blocks that it worked on."""
    seen = []
    for block in blocks:
        if block.index == stop_before:
            break
        seen.append(block.index)
        for group in block.groups:
            scale_K = group.statistics[Hessian].diagonal().sqrt()
            for site in group.sites:
                site.replace(rounded(site.weight * (1 + 0.01 * scale_K / scale_K.mean().clamp(min=1e-9))))
                site.note(method="stand-in", bits=4)
            group.release()
    return seen


# every family


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_transformers(tiny_model: TinyModel, family: str, odd: bool) -> None:
    folder = tiny_model(family, odd)
    checkpoint = Checkpoint.open(folder)
    tokens = tokens_of(checkpoint)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens.ids).logits
        assert torch.equal(checkpoint.build_model()(tokens.ids).logits, expected)
    streamed = torch.cat(list(stream_logits(checkpoint, tokens, micro_batch=2)))
    torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_of_the_inputs_that_each_linear_layer_sees(
    tiny_model: TinyModel, family: str, odd: bool
) -> None:
    """Against hooks on transformers' own model where the layer exists there, and on what routing implies elsewhere."""
    checkpoint = Checkpoint.open(tiny_model(family, odd))
    tokens = tokens_of(checkpoint)
    expected = _inputs_of_linears(checkpoint, tokens)
    compared = 0
    for block in measure(checkpoint, tokens, {SquaredMean}, micro_batch=2):
        for group in block.groups:
            for site in group.sites:
                if site.name in expected:
                    x_NK = expected[site.name]
                    torch.testing.assert_close(
                        group.statistics[SquaredMean], x_NK.square().mean(0), atol=1e-5, rtol=1e-4
                    )
                    assert group.tokens == len(x_NK)
                    compared += 1
        routed = [group.tokens for group in block.groups if group.routed and group.name.endswith("gate_up")]
        if routed:
            assert sum(routed) == tokens.ids.numel() * checkpoint.config["num_experts_per_tok"]
            assert min(routed) < max(routed)
    assert compared >= 2 * LAYERS


def _inputs_of_linears(checkpoint: Checkpoint, tokens: Tokens) -> dict[str, Tensor]:
    model = checkpoint.build_model()
    found: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].reshape(-1, inputs[0].shape[-1])

        return listen

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(listener(name))
    with torch.no_grad():
        model(tokens.ids)
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_sites_under_their_disk_names_and_the_router_is_not(tiny_model: TinyModel, family: str) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    last = {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.3.down_proj"}[family]
    sites = checkpoint.sites(0)
    assert f"model.layers.0.{last}" in sites
    assert all(f"{site}.weight" in checkpoint.tensors for site in sites)
    assert not any(site.endswith(("mlp.gate", "moe.gate")) for site in sites)
    dense = checkpoint.sites(1)
    assert ("model.layers.1.mlp.down_proj" in dense) == (family == "qwen3_moe")


# what the caller sees


def test_identity_walk_has_no_error_and_reports_progress(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    events: list[Event] = []
    sink = Memory()
    for block in walk(checkpoint, tokens_of(checkpoint), sink=sink, events=events.append):
        assert [group.name for group in block.groups] == ["qkv", "o", "gate_up", "down"]
    assert [record.output_error for _, record in sink.blocks] == [0.0] * LAYERS
    assert [event.done for event in events if isinstance(event, Progress)] == [1, 2, 3]
    assert len([event for event in events if isinstance(event, Metric)]) == LAYERS


def test_output_error_is_that_of_the_compressed_block_on_compressed_inputs(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_of(checkpoint, samples=4)
    sink = Memory()
    expected = []
    blocks = walk(checkpoint, tokens, keep={"inputs", "targets"}, sink=sink, micro_batch=2)
    for block in blocks:
        x_BTD, y_BTD = torch.cat(list(block.inputs)), torch.cat(list(block.targets))
        with torch.no_grad():
            torch.testing.assert_close(block.forward(x_BTD), y_BTD)
            for site in block.sites:
                site.replace(rounded(site.weight, bits=3))
            wrong = (block.forward(x_BTD) - y_BTD)[:2]  # the first of two micro-batches is judged
        expected.append(float(wrong.square().sum() / y_BTD[:2].square().sum()))
    found = [record.output_error for _, record in sink.blocks]
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1e-5


def test_compressed_outputs_feed_the_next_block(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_of(checkpoint, samples=4)
    model = checkpoint.build_model()
    for block in walk(checkpoint, tokens, keep={"inputs"}):
        if block.index == LAYERS - 1:
            seen = torch.cat(list(block.inputs))
        for site in block.sites:
            value = rounded(site.weight, bits=3)
            site.replace(value)
            model.get_submodule(site.name).weight.data = value.dequantize()
    with torch.no_grad():
        hidden = model(tokens.ids, output_hidden_states=True).hidden_states[LAYERS - 1]
    torch.testing.assert_close(seen, hidden, atol=1e-5, rtol=1e-4)


def test_block_forward_is_differentiable(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("gemma3_text"))
    block = next(iter(walk(checkpoint, tokens_of(checkpoint), keep={"inputs"}, micro_batch=2)))
    x_BTD = block.inputs[0].clone().requires_grad_()
    block.forward(x_BTD).square().mean().backward()
    assert x_BTD.grad is not None
    assert float(x_BTD.grad.abs().sum()) > 0


def test_site_weight_is_a_fresh_copy(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    block = next(iter(walk(checkpoint, None)))
    site = next(block.sites)
    site.weight.zero_()
    assert torch.equal(site.weight, checkpoint.weight(site.name))
    value = rounded(site.weight)
    site.replace(value)
    assert torch.equal(site.weight, value.dequantize())
    site.weight.zero_()
    assert torch.equal(site.weight, value.dequantize())


def test_without_tokens_there_is_no_forward_and_no_error(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    sink = Memory()
    for block in walk(checkpoint, None, sink=sink):
        assert block.groups[0].tokens == 0
        site = next(block.sites)
        site.replace(site.weight * 2)
    assert [record.output_error for _, record in sink.blocks] == [None] * LAYERS
    assert [list(tensors) for tensors, _ in sink.blocks] == [
        [f"model.layers.{index}.self_attn.q_proj.weight"] for index in range(LAYERS)
    ]


def test_measure_refuses_changes(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    with pytest.raises(UsageError, match=r"model\.layers\.0 was changed inside measure"):
        for block in measure(checkpoint, tokens_of(checkpoint), {SquaredMean}):
            site = next(block.sites)
            site.replace(site.weight)


def test_a_token_outside_of_the_vocabulary_is_refused(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = Tokens.of(torch.full((1, 8), checkpoint.config["vocab_size"]))
    with pytest.raises(InputError, match="token 320 is outside of the vocabulary of 320 rows"):
        next(iter(walk(checkpoint, tokens)))


# orders


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_group_order_sees_what_earlier_groups_became(tiny_model: TinyModel, family: str) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    tokens = tokens_of(checkpoint)

    def statistics(order: str, change: bool) -> dict[str, Tensor]:
        block = next(iter(walk(checkpoint, tokens, collect={SquaredMean}, order=order)))
        found = {}
        for group in block.groups:
            found[group.name] = group.statistics[SquaredMean].clone()
            if change:
                for site in group.sites:
                    site.replace(site.weight * 0.5)
        return found

    still, moved, untouched = statistics("block", True), statistics("groups", True), statistics("groups", False)
    assert torch.equal(moved["qkv"], still["qkv"])
    for name in list(still)[1:]:
        torch.testing.assert_close(untouched[name], still[name])
        assert not torch.allclose(moved[name], still[name], rtol=0.01), name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_played_back_has_the_bits_of_a_plain_forward(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    tokens = tokens_of(checkpoint)
    played, plain = Memory(), Memory()
    options = {"collect": {Hessian}, "order": "groups", "micro_batch": 2}
    options |= {"spill_folder": tmp_path, "spill_above_bytes": 0}
    compress_with_hessian(walk(checkpoint, tokens, sink=played, **options))
    monkeypatch.setattr("compress.core._playback.Playback.playing", lambda *_: nullcontext())
    compress_with_hessian(walk(checkpoint, tokens, sink=plain, **options))
    assert played.bits() == plain.bits()
    assert [record for _, record in played.blocks] == [record for _, record in plain.blocks]
    assert list(tmp_path.iterdir()) == []


def test_what_is_played_back_is_held_twice_and_only_while_a_block_is_worked_on(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention's output lies where its input was; behind the last block the hidden states go, too, at once."""
    checkpoint = Checkpoint.open(tiny_model("llama"))
    buffers: list[weakref.ref[Tensor]] = []
    room = Activations._room

    def watched(stream: Activations, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffers.append(weakref.ref(made := room(stream, shape, dtype)))
        return made

    def alive() -> int:
        return sum(ref() is not None for ref in buffers)

    monkeypatch.setattr(Activations, "_room", watched)
    gc.disable()  # nothing is left for it
    try:
        for block in walk(checkpoint, tokens_of(checkpoint), collect={Hessian}, order="groups", sink=Memory()):
            assert alive() == 2  # inputs and targets
            for group in block.groups:
                assert group.statistics[Hessian] is not None
                for site in group.sites:
                    site.replace(site.weight * 0.5)
            assert alive() == 4
        assert len(buffers) == 2 + 2 * LAYERS and alive() == 0
    finally:
        gc.enable()


def test_in_group_order_every_layer_is_computed_once(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the micro-batches on which the output error is judged: these need the original block's output, too."""
    checkpoint = Checkpoint.open(tiny_model("llama"))
    rows = 0
    forward = StoredLinear.forward

    def counted(layer: StoredLinear, x: Tensor) -> Tensor:
        nonlocal rows
        rows += x.shape[:-1].numel()
        return forward(layer, x)

    monkeypatch.setattr(StoredLinear, "forward", counted)
    samples, length, layers = 34, 24, 7
    tokens = tokens_of(checkpoint, samples, length)
    compress_with_hessian(walk(checkpoint, tokens, collect={Hessian}, order="groups", sink=Memory(), micro_batch=2))
    every, judged = samples * length, 2 * 2 * length  # micro-batches 0 and 16 of 17
    assert rows == LAYERS * layers * (every + judged) - (every - judged)  # nobody reads what the last layer gives


def test_statistics_gathered_in_several_waves_are_the_same(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large mixtures do not fit in one wave; later waves still see the block's original weights in block order."""
    checkpoint = Checkpoint.open(tiny_model("mixtral"))
    tokens = tokens_of(checkpoint)

    def run() -> dict[str, Tensor]:
        block = next(iter(walk(checkpoint, tokens, collect={Hessian})))
        found = {}
        for group in block.groups:
            found[group.name] = group.statistics[Hessian].clone()
            for site in group.sites:
                site.replace(site.weight * 0.5)
        return found

    whole = run()
    monkeypatch.setattr("compress.core._gather.WAVE_BYTES", 3 * 4 * 64 * 64)
    waves = run()
    assert whole.keys() == waves.keys()
    assert all(torch.equal(whole[name], waves[name]) for name in whole)


# padding, spilling, resume, determinism


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("order", ["block", "groups"])
def test_padding_counts_nowhere(tiny_model: TinyModel, family: str, order: str) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    lengths = [24, 7, 15]
    padded = tokens_of(checkpoint, samples=3, lengths=lengths)
    other = padded.ids.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = 5

    def run(ids: Tensor) -> tuple[list[Tensor], list[int], list[float | None]]:
        sink = Memory()
        statistics, counts = [], []
        tokens = Tokens.of(ids, padded.lengths)
        for block in walk(checkpoint, tokens, collect={Hessian}, order=order, sink=sink, micro_batch=2):
            for group in block.groups:
                statistics.append(group.statistics[Hessian].clone())
                counts.append(group.tokens)
                for site in group.sites:
                    site.replace(rounded(site.weight))
        return statistics, counts, [record.output_error for _, record in sink.blocks]

    first, counts, errors = run(padded.ids)
    second, counts_again, errors_again = run(other)
    assert counts == counts_again
    assert counts[0] == sum(lengths)
    assert errors == pytest.approx(errors_again, rel=1e-5)
    for a_KK, b_KK in zip(first, second, strict=True):
        torch.testing.assert_close(a_KK, b_KK, atol=1e-6, rtol=1e-5)


def test_spilling_changes_no_bit_and_leaves_no_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_of(checkpoint)
    in_memory, spilled = Memory(), Memory()
    compress_with_hessian(walk(checkpoint, tokens, collect={Hessian}, sink=in_memory))
    blocks = walk(checkpoint, tokens, collect={Hessian}, sink=spilled, spill_folder=tmp_path, spill_above_bytes=1)
    compress_with_hessian(blocks)
    assert in_memory.bits() == spilled.bits()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "order"), [("llama", "block"), ("gemma3_text", "groups"), ("qwen3_moe", "block")])
@pytest.mark.parametrize("stop_before", [1, 2])
def test_resumed_walk_is_bit_identical(tiny_model: TinyModel, family: str, order: str, stop_before: int) -> None:
    tokens = tokens_of(Checkpoint.open(tiny_model(family)))
    whole, resumed = Memory(), Memory()
    for sink, stop in ((whole, None), (resumed, stop_before), (resumed, None)):
        checkpoint = Checkpoint.open(tiny_model(family))
        blocks = walk(checkpoint, tokens, collect={Hessian}, order=order, sink=sink, micro_batch=2)
        seen = compress_with_hessian(blocks, stop)
    assert seen == list(range(stop_before, LAYERS))
    assert whole.finished() == LAYERS
    assert whole.bits() == resumed.bits()
    assert [record for _, record in whole.blocks] == [record for _, record in resumed.blocks]


def test_replayed_dense_weights_are_bit_identical(tiny_model: TinyModel) -> None:
    """What a pruning stage stores: dense tensors under their own names."""
    whole, resumed = Memory(), Memory()
    checkpoint = Checkpoint.open(tiny_model("llama", dtype="bfloat16"))
    tokens = tokens_of(checkpoint)
    for sink, stop in ((whole, LAYERS), (resumed, 2), (resumed, LAYERS)):
        for block in walk(checkpoint, tokens, collect={SquaredMean}, sink=sink):
            if block.index == stop:
                break
            for group in block.groups:
                for site in group.sites:
                    score = site.weight.abs() * group.statistics[SquaredMean].sqrt()
                    site.replace(torch.where(score > score.median(), site.weight, 0.0))
    assert whole.bits() == resumed.bits()


def test_callers_random_state_is_untouched_and_results_do_not_depend_on_it(tiny_model: TinyModel) -> None:
    found = []
    folder = tiny_model("gemma2")
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        checkpoint = Checkpoint.open(folder)
        sink = Memory()
        compress_with_hessian(walk(checkpoint, tokens_of(checkpoint), collect={Hessian}, sink=sink))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(sink.bits())
    assert found[0] == found[1]


def test_records_name_what_was_done_and_how_many_tokens_were_seen(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    tokens = tokens_of(checkpoint)
    sink = Memory()
    compress_with_hessian(walk(checkpoint, tokens, collect={Hessian}, sink=sink))
    record = sink.record(1)
    assert (record.index, record.name, len(record.sites)) == (1, "model.layers.1", 7)
    assert {site.method for site in record.sites} == {"stand-in"}
    assert {site.tokens for site in record.sites} == {tokens.ids.numel()}
    assert replace(record.sites[0], tokens=0).name == "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bf16_model_in_fp32_is_close_to_bf16_forward(tiny_model: TinyModel, family: str) -> None:
    """The automatic choice computes in the dtype that the machine is fast at; weights stay bf16 and mapped."""
    checkpoint = Checkpoint.open(tiny_model(family, dtype="bfloat16"))
    tokens = tokens_of(checkpoint)
    with torch.no_grad():
        expected = checkpoint.build_model(torch.float32)(tokens.ids).logits
    exact = torch.cat(list(stream_logits(checkpoint, tokens, dtype="float32")))
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    automatic = torch.cat(list(stream_logits(checkpoint, tokens))).float()
    assert float((automatic - expected).norm() / expected.norm()) < (0.05 if family == "llama" else 0.2)  # routers flip
    block = checkpoint.build_block(0, torch.float32)
    assert block.get_parameter("self_attn.q_proj.weight").dtype is torch.bfloat16


def test_rows_are_part_of_the_weight(tiny_model: TinyModel) -> None:
    block = next(iter(walk(Checkpoint.open(tiny_model("llama", dtype="bfloat16")), None)))
    site = next(block.sites)
    assert torch.equal(site.rows(slice(3, 9)), site.weight[3:9])
    site.rows(slice(3, 9)).zero_()
    assert site.weight[3:9].any()
    site.replace(rounded(site.weight))
    assert torch.equal(site.rows(slice(3, 9)), site.weight[3:9])


def test_no_room_for_spilling_is_a_resource_error(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    checkpoint = Checkpoint.open(tiny_model("llama"))
    blocks = walk(checkpoint, tokens_of(checkpoint), spill_folder=tmp_path, spill_above_bytes=1)
    with pytest.raises(ResourceError, match="no room for 0.0 GB of activations: No space left on device"):
        next(iter(blocks))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_walk_does_nothing(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    sink = Memory()
    for block in walk(checkpoint, None, sink=sink):
        assert block.groups
    assert list(walk(checkpoint, tokens_of(checkpoint), collect={Hessian}, sink=sink)) == []
    assert sink.finished() == LAYERS
