"""Small steps in one call of C: every dense family and scheme against the layers, rows, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core.scheme import Scheme
from runtime.llm import LLM
from runtime.loader import load
from runtime.models.decoder import Decoder
from runtime.native.library import library
from runtime.ops.backend import torch_only
from runtime.ops.batch import AttentionBatch
from runtime.small_steps import SmallSteps
from tests.conftest import TinyModel
from tests.quantized_folders import write_quantized
from tests.runtime._folders import edited, quantized_copy, rewritten
from tests.runtime._naive import NaiveRunner, exact, prompts_of
from tests.runtime._reference import worst
from tests.tiny import FAMILIES, config_of

DENSE_FAMILIES = [family for family in FAMILIES if family not in ("mixtral", "qwen3_moe")]
LENGTHS = (11, 3, 19, 1, 6)  # the third is longer than a window and than two pages
STEPS = 12
needs_kernels = pytest.mark.skipif(library().loaded is None, reason="needs gcc and torch with libgomp")
pytestmark = needs_kernels


class WholeSteps(NaiveRunner):
    """What SmallSteps covers through it, everything else through the layers."""

    def __init__(self, model: Decoder, **settings: int) -> None:
        super().__init__(model, **settings)
        self.layers = self.model
        self.whole = SmallSteps.of(model, self.cache)
        self.taken = 0
        self.model = self._forward

    def _forward(self, ids_T: Tensor, batch: AttentionBatch, cache: object, rows: None) -> Tensor:
        if self.whole is None or not self.whole.covers(batch):
            return self.layers(ids_T, batch, cache, rows)
        self.taken += 1
        return self.whole.run(ids_T, batch, torch.arange(len(ids_T)))


def decoded(runner: NaiveRunner, vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Logits of prompts, then of single tokens of all of them together, of fewer and fewer sequences."""
    prompts = prompts_of([length + STEPS for length in lengths], vocabulary)
    schedule: list[dict[int, int]] = [dict(enumerate(lengths))]
    schedule += [dict.fromkeys(range(max(1, len(lengths) - step // 2)), 1) for step in range(STEPS)]
    return runner.feed(prompts, schedule)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_parts_of_prompts_beside_decodes(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    runner = WholeSteps(load(folder, numerics="fast", dtype=torch.float32))
    prompts = prompts_of((30, 25, 9), 320)
    schedule = [{0: 7}, {0: 1, 1: 12}, {1: 6, 0: 1, 2: 4}, {0: 9, 1: 1, 2: 1}, {2: 3, 0: 12, 1: 6}, {1: 1}]
    assert worst(runner.feed(prompts, schedule), exact(folder).feed(prompts, schedule)) < 1e-4
    assert runner.taken == len(schedule)


def test_only_wanted_rows_get_logits(tiny_model: TinyModel) -> None:
    runner = WholeSteps(load(tiny_model("llama"), numerics="fast", dtype=torch.float32))
    assert runner.whole is not None
    batch = AttentionBatch.build([0, 0, 0], [4, 1, 3], [0, 0, 0], [[0], [1], [2]], block_size=4)
    ids_T = torch.arange(8)
    every_TV = runner.whole.run(ids_T, batch, torch.arange(8))
    for wanted in ([], [3], [3, 4, 7], [0, 7]):
        rows = torch.tensor(wanted, dtype=torch.int64)
        assert torch.equal(runner.whole.run(ids_T, batch, rows), every_TV[rows])


@pytest.mark.parametrize("family", DENSE_FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_layers(tiny_model: TinyModel, family: str, dtype: str) -> None:
    folder = tiny_model(family, dtype=dtype)
    runner = WholeSteps(load(folder, numerics="fast", dtype=torch.float32))
    found = decoded(runner, 320)
    assert runner.taken >= STEPS
    assert worst(found, decoded(exact(folder), 320)) < 1e-4


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 32, symmetric=False), Scheme(8), Scheme(3, 64)])
def test_packed_weights_are_read_as_they_are(tmp_path: Path, scheme: Scheme) -> None:
    folder = write_quantized(tmp_path / "model", scheme).path
    runner = WholeSteps(load(folder, numerics="fast", dtype=torch.float32))
    vocabulary = runner.layers.config.vocab
    found = decoded(runner, vocabulary)
    assert runner.taken >= STEPS
    assert worst(found, decoded(exact(folder), vocabulary)) < 2e-3


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations(tiny_model: TinyModel, tmp_path: Path, activation: str) -> None:
    folder = edited(tiny_model("llama"), tmp_path / "model", {"hidden_act": activation})
    runner = WholeSteps(load(folder, numerics="fast", dtype=torch.float32))
    assert worst(decoded(runner, 320), decoded(exact(folder), 320)) < 1e-4
    assert runner.taken >= STEPS


def test_rotary_kinds(tiny_model: TinyModel, tmp_path: Path) -> None:
    values = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    for number, rope in enumerate(
        (values, {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 10000.0})
    ):
        folder = edited(tiny_model("phi3" if number else "llama"), tmp_path / str(number), {"rope_parameters": rope})
        runner = WholeSteps(load(folder, numerics="fast", dtype=torch.float32))
        assert worst(decoded(runner, 320), decoded(exact(folder), 320)) < 1e-4
        assert runner.taken >= STEPS


def test_a_row_does_not_depend_on_the_others(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gemma2", dtype="bfloat16"), numerics="fast", dtype=torch.float32)
    together = decoded(WholeSteps(model), 320, lengths=(1,) * 7)
    for index, prompt in enumerate(prompts_of([1 + STEPS] * 7, 320)):
        alone = WholeSteps(model, seed=index + 1).feed([prompt], [{0: 1}] * STEPS)[0]
        steps = 1 + next((step for step in range(STEPS) if index >= max(1, 7 - step // 2)), STEPS)
        assert torch.equal(together[index][1:steps], alone[1:steps])


def test_threads_change_nothing(tiny_model: TinyModel) -> None:
    model, before = (
        load(tiny_model("llama", dtype="bfloat16"), numerics="fast", dtype=torch.float32),
        torch.get_num_threads(),
    )
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(decoded(WholeSteps(model), 320))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_it_does_not_do_goes_through_the_layers(tiny_model: TinyModel, tmp_path: Path) -> None:
    def of(folder: Path, **settings: object) -> SmallSteps | None:
        return WholeSteps(load(folder, **{"numerics": "fast", "dtype": torch.float32} | settings)).whole

    assert of(tiny_model("llama")) is not None
    assert of(tiny_model("llama"), numerics="exact") is None
    assert of(tiny_model("llama"), dtype=torch.bfloat16) is None
    assert of(tiny_model("mixtral")) is None
    assert of(tiny_model("llama", True)) is None, "attention gives 168 channels, which is no multiple of 16"
    mixed = quantized_copy(
        tiny_model("llama"), tmp_path / "mixed", lambda module: Scheme(8 if module.endswith("q_proj") else 4, 32)
    )
    assert of(mixed) is None, "queries cannot be joined with keys and values"
    rounded = write_quantized(tmp_path / "rounded", Scheme(8, activation_bits=8)).path
    assert of(rounded, dtype=None) is None, "inputs are rounded first"


def test_many_rows_and_torch_alone_are_not_covered(tiny_model: TinyModel) -> None:
    runner = WholeSteps(load(tiny_model("llama"), numerics="fast", dtype=torch.float32), pages=256)
    assert runner.whole is not None
    tokens = prompts_of([1] * runner.whole.many_rows, 320)
    runner.step(dict(enumerate(tokens)))
    assert runner.taken == 0
    runner.step(dict(enumerate(tokens[:-1])))
    assert runner.taken == 1
    with torch_only():
        runner.step(dict(enumerate(tokens[:-1])))
    assert runner.taken == 1


def test_values_that_are_not_finite_stay_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    folder = rewritten(tiny_model("llama"), tmp_path / "model", spoil)
    runner = WholeSteps(load(folder, numerics="fast", dtype=torch.float32))
    assert runner.feed([[5]], [])[0].isnan().all()
    assert runner.taken == 1


def test_the_engine_takes_whole_steps(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    prompts = prompts_of((9, 4), config_of("llama", False)["vocab_size"])
    with LLM(folder, dtype=torch.float32) as llm:
        whole = llm.engine.runner.whole
        assert isinstance(whole, SmallSteps)
        taken = []
        run = whole.run
        whole.run = lambda *asked: taken.append(len(asked[0])) or run(*asked)  # type: ignore[method-assign]
        found = [completion.token_ids for completion in llm.generate(prompts, max_tokens=8)]
    assert set(taken) == {13, 2}, "both prompts, then a token of each"
    with torch_only(), LLM(folder, dtype=torch.float32) as llm:
        assert found == [completion.token_ids for completion in llm.generate(prompts, max_tokens=8)]
