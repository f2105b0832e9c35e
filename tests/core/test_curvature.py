"""Sensitivities by one backward pass foretell what rounding a layer really does to the model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.curvature import Curvature, curvatures
from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from tests.conftest import TinyModel

FAMILIES = ["llama", "qwen3", "gemma2", "phi3"]  # what flips the choice of a router has no gradient


def measured(folder: Path, tokens: Tokens, **options: object) -> dict[str, Curvature]:
    found = curvatures(Checkpoint.open(folder), tokens, vocabulary=True, **options)  # type: ignore[arg-type]
    return {layer: curvature for curvature in found for layer in curvature.outputs}


def drawn(checkpoint: Checkpoint, samples: int = 8, length: int = 32) -> Tokens:
    generator = torch.Generator().manual_seed(5)
    return Tokens.of(torch.randint(0, checkpoint.config["vocab_size"], (samples, length), generator=generator))


def shaken(weight: torch.Tensor) -> torch.Tensor:
    """A small error of no structure."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    return noise * weight.std() * 0.03


def kl_by_layer(folder: Path, tokens: Tokens, layers: list[str]) -> Iterator[tuple[str, torch.Tensor, float]]:
    """The real KL divergence, in nats a token, when one layer alone is wrong by a small error."""
    model = Checkpoint.open(folder).build_model(torch.float32)
    before = model(tokens.ids).logits.double().log_softmax(-1)
    for layer in layers:
        module = model.get_submodule(layer)
        weight = module.weight
        error = shaken(weight.data.float())
        module.weight = torch.nn.Parameter(weight.data + error, requires_grad=False)
        after = model(tokens.ids).logits.double().log_softmax(-1)
        module.weight = weight
        yield layer, error, float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_foretold_divergence_is_the_real_one(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    checkpoint = Checkpoint.open(folder)
    tokens = drawn(checkpoint)
    found = measured(folder, tokens)
    inside = [layer for layer in found if ".layers." in layer and ".experts." not in layer]
    head = [checkpoint.architecture.head]
    ratios = []
    for layer, error, real in kl_by_layer(folder, tokens, head + inside[:: max(1, len(inside) // 8)]):
        ratios.append(found[layer].loss(layer, error, slice(None)) / real)
    assert 0.8 < ratios[0] < 1.25  # the head: nothing lies behind it
    assert all(0.2 < ratio < 5 for ratio in ratios), ratios
    assert 0.5 < torch.tensor(ratios).log().mean().exp() < 2, ratios


def test_on_the_bundled_model_low_bits_are_foretold() -> None:
    folder = Path(__file__).parents[2] / "compress" / "demo" / "model"
    checkpoint = Checkpoint.open(folder)
    ids = torch.randint(0, 2048, (4, 64), generator=torch.Generator().manual_seed(1))
    tokens = Tokens.of(ids)
    found = measured(folder, tokens)
    model = checkpoint.build_model(torch.float32)
    before = model(ids).logits.log_softmax(-1)
    foretold, real = [], []
    for layer in (name for name in found if name.endswith(("q_proj", "o_proj", "down_proj"))):
        module = model.get_submodule(layer)
        weight = module.weight
        rounded = fit_grid(weight.data, Scheme(3, 64), scale_dtype=torch.bfloat16).round(weight.data).dequantize()
        foretold.append(found[layer].loss(layer, weight.data - rounded, slice(None)))
        module.weight = torch.nn.Parameter(rounded, requires_grad=False)
        after = model(ids).logits.log_softmax(-1)
        module.weight = weight
        real.append(float((before.exp() * (before - after)).sum(-1).mean()))
    logs = torch.stack((torch.tensor(foretold).log(), torch.tensor(real).log()))
    assert torch.corrcoef(logs)[0, 1] > 0.8


def test_padding_counts_for_nothing(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    checkpoint = Checkpoint.open(folder)
    short = drawn(checkpoint, samples=4, length=16)
    padded = Tokens.of(torch.nn.functional.pad(short.ids, (0, 9)), torch.full((4,), 16))
    plain, other = measured(folder, short), measured(folder, padded)
    for layer, curvature in plain.items():
        if ".layers." in layer:  # drawn tokens of the head differ, and so does what flows back: by chance alone
            assert torch.allclose(curvature.inputs, other[layer].inputs, atol=1e-5)


def test_files_change_no_bit(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    tokens = drawn(Checkpoint.open(folder))
    plain, spilled = measured(folder, tokens), measured(folder, tokens, spill_folder=tmp_path, spill_above_bytes=0)
    for layer, curvature in plain.items():
        assert torch.equal(curvature.inputs, spilled[layer].inputs)
        assert torch.equal(curvature.outputs[layer], spilled[layer].outputs[layer])
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_rows_is_a_part_of_the_loss(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    found = measured(folder, drawn(Checkpoint.open(folder)))
    layer = "model.layers.0.mlp.down_proj"
    error = shaken(Checkpoint.open(folder).weight(layer).float())
    parts = [found[layer].loss(layer, error[rows], rows) for rows in (slice(0, 5), slice(5, len(error)))]
    assert sum(parts) == pytest.approx(found[layer].loss(layer, error, slice(None)), rel=1e-5)
