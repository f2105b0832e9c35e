"""Transforms do what their papers say where there is something to do: in a model whose channels differ in size.

The model computes what the tiny one computes: norms are multiplied by scales over two orders of magnitude, and the
columns behind them divided.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.methods import find_pass
from compress.core.walk import stream_logits
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, run
from tests.tiny import LAYERS

OUTLIERS, STRETCH = 4, 60.0


@pytest.fixture
def stretched(tiny_model: TinyModel, tmp_path: Path) -> Path:
    folder = tmp_path / "stretched"
    shutil.copytree(tiny_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for index in range(LAYERS):
        block = f"model.layers.{index}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            channels = torch.arange(OUTLIERS) * 7 + index
            tensors[f"{block}.{norm}.weight"][channels] *= STRETCH
            for reader in readers:
                tensors[f"{block}.{reader}.weight"][:, channels] /= STRETCH
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_of(folder: Path) -> Tokens:
    vocabulary = Checkpoint.open(folder).config["vocab_size"]
    generator = torch.Generator().manual_seed(4)
    return Tokens.of(torch.randint(0, vocabulary, (8, 32), generator=generator))


def error(folder: Path, method: str, scheme: str, *prepare: dict[str, object], group_size: int = -1) -> float:
    """Relative error of the logits; of w8a8 with the inputs of all layers rounded as an engine rounds them."""
    checkpoint, tokens = Checkpoint.open(folder), tokens_of(folder)
    fields = {"scheme": scheme, "group_size": group_size, "prepare": prepare}
    settings = find_pass("quantize", method)(**fields)
    view = settings.view(checkpoint)
    tensors = {name: view.tensor(name) for name in view.tensors}
    for block in run(folder, settings, Shelf(), tokens).blocks:
        for name, value in block.items():
            dense = isinstance(value, torch.Tensor)
            tensors[name if dense else f"{name}.weight"] = value if dense else value.dequantize()
    model = view.skeleton.load(tensors, torch.float32, "")
    if scheme == "w8a8":
        for site in (site for index in range(LAYERS) for site in view.sites(index)):
            model.get_submodule(site).register_forward_pre_hook(_round_inputs)
    with torch.no_grad():
        found = model(tokens.ids).logits
    expected = torch.cat(list(stream_logits(checkpoint, tokens)))
    return float((found - expected).norm() / expected.norm())


def _round_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    step = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (inputs[0] / step).round() * step


def test_awqs_scales_spare_the_channels_with_large_inputs(stretched: Path) -> None:
    assert error(stretched, "awq", "w4a16", group_size=16) < 0.6 * error(stretched, "rtn", "w4a16", group_size=16)


def test_smoothing_takes_the_outliers_from_the_activations(stretched: Path) -> None:
    plain = error(stretched, "rtn", "w8a8")
    assert error(stretched, "rtn", "w8a8", {"smoothquant": {}}) < 0.6 * plain
    assert error(stretched, "rtn", "w8a8", {"smoothquant": {"alpha": 0.5}}) < 0.6 * plain


def test_rotation_lets_no_channel_stand_out(stretched: Path) -> None:
    assert error(stretched, "rtn", "w4a16", {"rotate": {}}) < 0.8 * error(stretched, "rtn", "w4a16")
    assert error(stretched, "rtn", "w8a8", {"rotate": {}}) < 0.6 * error(stretched, "rtn", "w8a8")
