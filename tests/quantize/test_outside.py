"""Embedding and head as quantized layers: what is written, what becomes of ties, and who reads it."""

from pathlib import Path

import pytest
import torch
import yaml

import compress
from compress.core.checkpoint import Checkpoint
from compress.core.compatibility import preflight
from compress.core.errors import InputError
from compress.core.scheme import Scheme
from compress.core.untied import UntiedCheckpoint
from compress.core.verify import verify
from compress.inputs import RunOptions
from runtime.llm import LLM
from tests.conftest import TinyModel

IDS = torch.arange(3, 23)[None]
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def made(folder: Path, tmp_path: Path, settings: dict, export: str = "compressed-tensors") -> Path:
    recipe = {"model": str(folder), "stages": [{"quantize": {"method": "rtn", "group_size": 8, **settings}}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"export": {"format": export}}))
    return compress.run(compress.load_recipe(file), RunOptions(output=tmp_path / "out", evaluate=False)).artifact


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "asked", [{"head": "w8a16"}, {"embedding": "w4a16"}, {"head": "w4a16", "embedding": "w8a16"}], ids=str
)
def test_what_is_asked_for_is_quantized(tiny_model: TinyModel, tmp_path: Path, tied: bool, asked: dict) -> None:
    source = Checkpoint.open(tiny_model("llama", odd=not tied))
    artifact = Checkpoint.open(made(source.folder, tmp_path, asked))
    names = {"head": HEAD, "embedding": EMBEDDING}
    assert {module for module in artifact.schemes if ".layers." not in module} == {names[key] for key in asked}
    assert artifact.config["tie_word_embeddings"] is False and not artifact.tied
    before = source.tensor(source.embedding_tensor if tied else f"{HEAD}.weight").float()
    for key, name in asked.items():
        scheme = artifact.schemes[names[key]]
        assert (scheme.name, scheme.group_size) == (name, 8)
        weight = artifact.weight(names[key], torch.float32)
        if key == "head":
            assert (weight - before).norm() / before.norm() < {"w8a16": 0.01, "w4a16": 0.12}[name]
    left = {HEAD, EMBEDDING} - {names[key] for key in asked}
    assert all(torch.equal(artifact.weight(name).float(), _weight(source, name)) for name in left)
    assert verify(artifact.folder, source=source.folder, level="coverage").ok


def _weight(source: Checkpoint, module: str) -> torch.Tensor:
    return source.tensor(source.embedding_tensor if source.tied else f"{module}.weight").float()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plan_knows_the_bytes(tiny_model: TinyModel, tmp_path: Path, tied: bool) -> None:
    folder = tiny_model("llama", odd=not tied)
    file = tmp_path / "recipe.yaml"
    stage = {"quantize": {"method": "rtn", "group_size": 8, "head": "w8a16", "embedding": "w4a16"}}
    file.write_text(yaml.safe_dump({"model": str(folder), "stages": [stage]}))
    plan = compress.plan(compress.load_recipe(file), RunOptions(output=tmp_path / "out", evaluate=False))
    assert any("two tensors" in notice for notice in plan.notices) is tied
    artifact = Checkpoint.open(
        compress.run(compress.load_recipe(file), RunOptions(output=tmp_path / "out", evaluate=False)).artifact
    )
    assert sum(info.bytes for info in artifact.tensors.values()) == plan.bytes_out


def test_the_runtime_computes_what_transformers_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    artifact = made(folder, tmp_path, {"head": "w4a16", "embedding": "w8a16"})
    model = Checkpoint.open(artifact).build_model(torch.float32)
    expected = model(IDS).logits.log_softmax(-1)[0, torch.arange(IDS.shape[1] - 1), IDS[0, 1:]]
    llm = LLM(artifact, numerics="exact")
    [found] = llm.generate([IDS[0].tolist()], max_tokens=1, temperature=0.0, prompt_logprobs=0)
    ours = torch.tensor([place.logprob for place in found.prompt_logprobs[1:]])
    assert torch.allclose(ours, expected, atol=1e-4)


def test_transformers_loads_a_quantized_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    artifact = made(tiny_model("llama"), tmp_path, {"head": "w8a16"})
    theirs = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)(IDS).logits
    ours = Checkpoint.open(artifact).build_model(torch.float32)(IDS).logits
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_a_rotation_unties_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    settings = {"scheme": "w8a16", "head": "w8a16", "prepare": [{"rotate": {}}]}
    artifact = Checkpoint.open(made(folder, tmp_path, settings))
    before = Checkpoint.open(folder).build_model(torch.float32)(IDS).logits
    after = artifact.build_model(torch.float32)(IDS).logits
    assert (after - before).norm() / before.norm() < 0.05


def test_formats_that_want_them_dense_say_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    with pytest.raises(InputError, match="lm_head cannot be written as awq: its readers expect one"):
        made(folder, tmp_path, {"head": "w4a16", "group_size": 32}, export="awq")
    with pytest.raises(InputError, match="embed_tokens cannot be written as gptq"):
        made(folder, tmp_path, {"embedding": "w4a16", "group_size": 32}, export="gptq")


def test_engines_are_told_apart() -> None:
    layer, wide = Scheme(4, 128), (1024, 1024)
    shapes = {"model.layers.0.mlp.down_proj": wide, HEAD: wide, EMBEDDING: wide}
    said = {
        module: {verdict.engine: verdict.ok for verdict in preflight(dict.fromkeys(asked, layer), shapes)}
        for module, asked in {
            HEAD: ("model.layers.0.mlp.down_proj", HEAD),
            EMBEDDING: ("model.layers.0.mlp.down_proj", EMBEDDING),
        }.items()
    }
    assert said[HEAD]["vllm"] == "yes" and said[HEAD]["transformers"] == "with-conditions"
    assert said[EMBEDDING]["transformers"] == said[EMBEDDING]["sglang"] == "no"
    assert said[HEAD]["compress"] == said[EMBEDDING]["compress"] == "yes"


def test_untied_is_two_names_for_one_tensor(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("llama"))
    view = UntiedCheckpoint(source)
    assert not view.tied and view.head_tensor != view.embedding_tensor
    assert torch.equal(view.tensor(view.head_tensor), view.tensor(view.embedding_tensor))
