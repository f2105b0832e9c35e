"""A narrower residual stream: dead channels cost nothing, the choice is Minitron's, norms are as large as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.events import Event, Finished, Progress
from compress.core.files import sha256_file
from compress.core.passes import Job
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from prune._surgery import norm_weights
from prune.hidden import Hidden
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for
from tests.prune.planted import logits, planted, recipe_of
from tests.tiny import FAMILIES

odd_or_not = pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])


def pruned(checkpoint: Checkpoint, **asked: Any) -> Checkpoint:
    shelf = Shelf()
    Hidden(**asked).run(Job(checkpoint, tokens_for(checkpoint), shelf))
    assert shelf.source is not None
    return shelf.source


def logits_of(checkpoint: Checkpoint) -> Tensor:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return checkpoint.build_model(torch.float32)(ids).logits


def stream_tensors(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """The tensors whose columns read the stream, and those whose rows write to it."""
    reading, writing = [checkpoint.embedding_tensor, checkpoint.head_tensor], []
    for block in range(checkpoint.num_blocks):
        for group, sites in checkpoint.groups(block):
            reads = group.endswith(("qkv", "gate_up"))
            names = [f"{site}.{leaf}" for site in sites for leaf in ("weight",) + (() if reads else ("bias",))]
            (reading if reads else writing).extend(name for name in names if name in checkpoint.tensors)
    return sorted(set(reading)), writing


def fade(source: Path, folder: Path, factor: float, *, readers: bool) -> tuple[Checkpoint, list[int]]:
    """A copy in which every other channel of the stream is `factor` times as large, and the others."""
    checkpoint = Checkpoint.open(source)
    reading, writing = stream_tensors(checkpoint)

    def plant(tensors: dict[str, Tensor]) -> None:
        for name in writing:
            tensors[name][1::2] *= factor
        for name in reading if readers else {checkpoint.embedding_tensor}:
            tensors[name][:, 1::2] *= factor

    total = checkpoint.config["hidden_size"]
    return Checkpoint.open(planted(source, folder, plant)), list(range(0, total, 2))


@odd_or_not
@pytest.mark.parametrize("family", FAMILIES)
def test_dead_channels_go_and_change_nothing(family: str, odd: bool, tiny_model: TinyModel, tmp_path: Path) -> None:
    checkpoint, alive = fade(tiny_model(family, odd), tmp_path / "model", 0.0, readers=False)
    smaller = pruned(checkpoint, keep=len(alive))
    before = logits_of(checkpoint)
    assert float((logits_of(smaller) - before).abs().max()) < 1e-5 * float(before.abs().max())
    for name in stream_tensors(smaller)[0]:
        if not checkpoint.architecture.scaled_embedding or name != checkpoint.embedding_tensor:
            assert torch.equal(smaller.tensor(name), checkpoint.tensor(name)[:, alive]), name


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_small_weights_go_by_magnitude(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    checkpoint, large = fade(tiny_model(family), tmp_path / "model", 0.1, readers=True)
    smaller = pruned(checkpoint, keep=len(large), importance="magnitude", rescale=False)
    name = checkpoint.embedding_tensor
    assert torch.equal(smaller.tensor(name), checkpoint.tensor(name)[:, large])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norms_are_as_large_as_before(family: str, tiny_model: TinyModel) -> None:
    """By transformers' own hidden states: what a norm divides by, with all channels and with those that stay."""
    checkpoint = Checkpoint.open(tiny_model(family))
    smaller = pruned(checkpoint, ratio=0.5)
    embedding = checkpoint.tensor(checkpoint.embedding_tensor)
    left = smaller.tensor(checkpoint.embedding_tensor)
    kept = [int((embedding == left[:, [place]]).all(0).nonzero()) for place in range(left.shape[1])]
    model = checkpoint.build_model(torch.float32)
    seen: dict[str, Tensor] = {}
    for name in norm_weights(checkpoint):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        model(tokens_for(checkpoint).ids)
    plus = 1.0 if checkpoint.architecture.norm_plus_one else 0.0
    for name, x_TD in seen.items():
        grown = (x_TD[:, kept].square().mean(1) / x_TD.square().mean(1)).mean().sqrt()
        factor = grown * 0.5**0.5 if norm_weights(checkpoint)[name] == "output" and plus else grown
        wanted = (checkpoint.tensor(name)[kept] + plus) * factor - plus
        torch.testing.assert_close(smaller.tensor(name), wanted, rtol=1e-4, atol=1e-5)


def test_without_rescaling_norms_stay(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    smaller = pruned(checkpoint, ratio=0.5, rescale=False)
    assert smaller.config["rms_norm_eps"] == checkpoint.config["rms_norm_eps"]
    for name in norm_weights(checkpoint):
        assert set(smaller.tensor(name).tolist()) <= set(checkpoint.tensor(name).tolist())


def test_the_config_says_so(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen2"))
    config = Hidden(keep=48).after(checkpoint).config
    eps = checkpoint.config["rms_norm_eps"] * 64 / 48
    assert (config["hidden_size"], config["head_dim"], config["rms_norm_eps"]) == (48, 16, eps)
    gemma = Checkpoint.open(tiny_model("gemma2"))
    assert Hidden(keep=48).after(gemma).config["rms_norm_eps"] == gemma.config["rms_norm_eps"]


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_an_artifact_is_whole_and_the_same_after_a_stop(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = planted(tiny_model(family, dtype="bfloat16"), tmp_path / "model", lambda tensors: None)
    recipe = recipe_of(folder, {"prune": {"method": "hidden", "keep": 48}})
    result = run(recipe, RunOptions(tmp_path / "out"))
    report = verify(result.artifact, source=folder)
    assert report.ok, report.checks
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    artifact = Checkpoint.open(result.artifact)
    assert artifact.tied and {info.dtype for info in artifact.tensors.values()} == {"BF16"}
    assert logits(result.artifact).isfinite().all()
    walks = 0

    def stop(event: Event) -> None:
        nonlocal walks
        walks += isinstance(event, Finished) and event.stage == "walk"
        if walks == 1 and isinstance(event, Progress) and event.stage == "walk" and event.done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(recipe, RunOptions(tmp_path / "stopped"), stop)
    again = run(recipe, RunOptions(tmp_path / "stopped")).artifact
    names = [path.name for path in again.iterdir() if path.is_file()]
    assert {name: sha256_file(again / name) for name in names} == {
        name: sha256_file(result.artifact / name) for name in names
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_all_channels_may_stay(family: str, tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    same = pruned(checkpoint, keep=64)
    assert same.config == {**checkpoint.config, "head_dim": 16}
    assert all(torch.equal(same.tensor(name), checkpoint.tensor(name)) for name in checkpoint.tensors)


@pytest.mark.parametrize(
    ("family", "odd", "settings", "problem"),
    [
        ("qwen2", False, {"keep": 60}, "keep 60 .* does not work: they go in steps of 8 .56 would"),
        ("llama", True, {"keep": 80}, "keep 80 .* does not work: they go in steps of 56 .56 would"),
        ("qwen2", False, {"ratio": 0.99}, "would remove all: they go in steps of 8"),
        ("qwen2", False, {"keep": 72}, "keep 72: there are only 64 channels of the residual stream"),
        ("qwen2", False, {"max_size": "1KB"}, "cannot be reached by channels of the residual stream alone"),
    ],
)
def test_what_cannot_work_is_refused(
    family: str, odd: bool, settings: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = planted(tiny_model(family, odd), tmp_path / "model", lambda tensors: None)
    with pytest.raises(UsageError, match=problem):
        plan(recipe_of(folder, {"prune": {"method": "hidden", **settings}}), RunOptions(tmp_path / "out"))
