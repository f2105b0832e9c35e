"""Removing experts: what no token needs costs nothing, the choice is REAP's, and the rest is numbered anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.events import Event, Notice, Progress
from compress.core.files import sha256_file
from compress.core.passes import Job
from compress.core.verify import verify
from compress.pipeline import RunOptions, plan, run
from prune._routing import choose_experts
from prune.experts import Experts
from tests.conftest import TinyModel
from tests.contracts.shelf import Shelf, tokens_for
from tests.prune.planted import logits, planted, recipe_of

MIXTURES = [("mixtral", False), ("mixtral", True), ("qwen3_moe", False), ("qwen3_moe", True)]


def mixtures(checkpoint: Checkpoint) -> list[int]:
    return [index for index in range(checkpoint.num_blocks) if len(checkpoint.groups(index)) > 4]


def hide_experts(source: Path, folder: Path) -> tuple[Path, dict[int, int]]:
    """A model in which no token goes to one expert of each block: all have the same first channel, which its row of the
    router minds."""
    checkpoint = Checkpoint.open(source)
    experts = checkpoint.architecture.experts
    assert experts is not None
    count = Experts().total(checkpoint)
    hidden = {block: (block + 1) % count for block in mixtures(checkpoint)}

    def plant(tensors: dict[str, Tensor]) -> None:
        tensors[checkpoint.embedding_tensor][:, 0] = 0.5
        for block in range(checkpoint.num_blocks):
            prefix = checkpoint.block_name(block)
            tensors[f"{prefix}.post_attention_layernorm.weight"][0] = 1.0
            for site in checkpoint.sites(block):
                if site.endswith(("o_proj", "down_proj", "w2")):
                    tensors[f"{site}.weight"][0] = 0.0
                else:
                    tensors[f"{site}.weight"][:, 0] = 0.0
        for block, index in hidden.items():
            router = tensors[f"{checkpoint.block_name(block)}.{experts.router}.weight"]
            router[:, 0] = 0.0
            router[index] = 0.0
            router[index, 0] = -1000.0

    return planted(source, folder, plant), hidden


@pytest.mark.parametrize(
    ("family", "odd", "importance"),
    [(family, odd, "frequency" if odd else "reap") for family, odd in MIXTURES],
)
def test_an_expert_that_no_token_reaches_goes_and_changes_nothing(
    family: str, odd: bool, importance: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, hidden = hide_experts(tiny_model(family, odd), tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    total = Experts().total(checkpoint)
    seen: list[Event] = []
    stage = {"prune": {"method": "experts", "keep": total - 1, "importance": importance}}
    result = run(recipe_of(folder, stage), RunOptions(tmp_path / "out"), seen.append)
    told = {event.where: event.message for event in seen if isinstance(event, Notice) and "no token" in event.message}
    for block, index in hidden.items():
        message = told[checkpoint.block_name(block)]
        assert message.startswith("no token reached the experts") and f"{index}" in message.split(":")[0]
    assert float((logits(result.artifact) - logits(folder)).abs().max()) < 1e-5
    report = verify(result.artifact, source=folder)
    assert report.ok, report.checks
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    pruned = Checkpoint.open(result.artifact)
    assert pruned.config["num_local_experts" if family == "mixtral" else "num_experts"] == total - 1
    for block, index in hidden.items():
        stay = [old for old in range(total) if old != index]
        sites = dict(pruned.groups(block))
        for new, old in enumerate(stay):
            before = dict(checkpoint.groups(block))[f"experts.{old}.down"][0]
            after = sites[f"experts.{new}.down"][0]
            assert torch.equal(pruned.weight(after), checkpoint.weight(before))


def reference(folder: Path, block: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """REAP's saliency of each expert and how many tokens reach it, by transformers' fused experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    caught: dict[str, Any] = {}
    mixture = model.model.layers[block].mlp
    mixture.experts.register_forward_pre_hook(lambda module, args: caught.update(zip("xis", args, strict=True)))
    with torch.no_grad():
        model(ids)
    gate_up_EID, down_EDI = mixture.experts.gate_up_proj, mixture.experts.down_proj
    x_ND, choice_NA, share_NA = caught["x"], caught["i"], caught["s"]
    saliency, counts = torch.zeros(len(down_EDI)), torch.zeros(len(down_EDI))
    for index in range(len(down_EDI)):
        gate_NI, up_NI = (x_ND @ gate_up_EID[index].T).chunk(2, dim=1)
        length_N = ((silu(gate_NI) * up_NI) @ down_EDI[index].T).norm(dim=1)
        share_N = (share_NA * (choice_NA == index)).sum(1)
        counts[index] = (choice_NA == index).sum()
        saliency[index] = (length_N * share_N).sum() / counts[index].clamp(min=1)
    return saliency.detach(), counts


@pytest.mark.parametrize(("family", "odd"), MIXTURES)
def test_the_choice_is_that_of_the_paper(family: str, odd: bool, tiny_model: TinyModel) -> None:
    folder = tiny_model(family, odd)
    checkpoint = Checkpoint.open(folder)
    tokens = tokens_for(checkpoint)
    job = Job(checkpoint, tokens, Shelf())
    for block in mixtures(checkpoint):
        saliency, counts = reference(folder, block, tokens.ids)
        for count in range(1, len(counts)):
            assert choose_experts(job, count, "reap")[block] == sorted(saliency.topk(count).indices.tolist())
            rest = sorted(counts.topk(count).indices.tolist())
            assert counts[choose_experts(job, count, "frequency")[block]].sum() == counts[rest].sum()


def test_a_run_that_was_stopped_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = planted(tiny_model("qwen3_moe", dtype="bfloat16"), tmp_path / "model", lambda tensors: None)
    recipe = recipe_of(folder, {"prune": {"method": "experts", "keep": 2}})
    whole = run(recipe, RunOptions(tmp_path / "out")).artifact

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "walk" and event.done == 2 and writing:
            raise InterruptedError

    def on_commit(event: Event) -> None:
        nonlocal writing
        writing = writing or (type(event).__name__ == "Finished" and getattr(event, "stage", "") == "walk")
        stop(event)

    writing = False  # the first walk only looks
    with pytest.raises(InterruptedError):
        run(recipe, RunOptions(tmp_path / "stopped"), on_commit)
    again = run(recipe, RunOptions(tmp_path / "stopped")).artifact
    names = [path.name for path in whole.iterdir() if path.is_file()]
    assert {name: sha256_file(whole / name) for name in names} == {name: sha256_file(again / name) for name in names}


def test_all_experts_may_stay(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = planted(tiny_model("mixtral"), tmp_path / "model", lambda tensors: None)
    artifact = run(
        recipe_of(folder, {"prune": {"method": "experts", "keep": 4}}), RunOptions(tmp_path / "out")
    ).artifact
    before, after = Checkpoint.open(folder), Checkpoint.open(artifact)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors)


@pytest.mark.parametrize(
    ("family", "settings", "problem"),
    [
        ("llama", {"keep": 1}, "llama models have no experts"),
        (
            "mixtral",
            {"keep": 1},
            "prune.keep: 1 of 4 experts would stay, but every token goes to 2 of them .*at least 2",
        ),
        ("qwen3_moe", {"ratio": 0.75}, "prune.ratio: 1 of 4 experts would stay, but every token goes to 2 of them"),
        ("mixtral", {"keep": 5}, "keep 5: there are only 4 experts"),
        ("mixtral", {"parameters": 1000}, "parameters 1,000 cannot be reached by experts alone"),
    ],
)
def test_what_cannot_work_is_refused(
    family: str, settings: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = planted(tiny_model(family), tmp_path / "model", lambda tensors: None)
    with pytest.raises(UsageError, match=problem):
        plan(recipe_of(folder, {"prune": {"method": "experts", **settings}}), RunOptions(tmp_path / "out"))


def test_a_mixture_without_any_expert_is_told_from_a_family_without(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen3_moe"))
    checkpoint._by_block = [[name for name in names if ".experts." not in name] for names in checkpoint._by_block]
    with pytest.raises(UsageError, match="this model has no experts"):
        Experts().count(checkpoint)
