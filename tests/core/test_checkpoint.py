"""Opening model folders: what they say of themselves, and one sentence for each way of being broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.core.architectures import ARCHITECTURES, lookup
from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint, load_tokenizer
from compress.core.errors import InputError
from compress.core.scheme import Scheme
from compress.core.walk import stream_logits
from tests.conftest import TinyModel
from tests.quantized_folders import write_quantized
from tests.tiny import FAMILIES

Break = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to break."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Split the weights in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return weight_map


def edit_index(folder: Path, **fields: Any) -> None:
    weight_map = shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | fields}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "not a model folder: it has no config.json"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text('{"model_type": llama}'),
        r"config.json:1:16: invalid JSON",
    ),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\x00\xfe"), "config.json: invalid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: invalid: not a JSON object"),
    "no model_type": (lambda f: edit_config(f, model_type=None), "config.json names no model_type"),
    "unknown family": (lambda f: edit_config(f, model_type="gpt9"), "unknown model family 'gpt9'.*docs/extending.md"),
    "multimodal wrapper": (
        lambda f: edit_config(f, model_type="gemma3", text_config={"model_type": "gemma3_text"}),
        "'gemma3' wraps a text model .'gemma3_text'. together with other towers.*export the language model",
    ),
    "no layers": (lambda f: edit_config(f, num_hidden_layers=0), "num_hidden_layers is 0, not a positive number"),
    "layers as text": (lambda f: edit_config(f, num_hidden_layers="3"), "num_hidden_layers is '3'"),
    "own code": (
        lambda f: edit_config(f, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"}),
        r"code of its own \(modeling_x.XForCausalLM\), which is never run \(.*take auto_map out",
    ),
    "quantized by others": (
        lambda f: edit_config(f, quantization_config={"quant_method": "aqlm"}),
        "is quantized with 'aqlm', which this version does not read",
    ),
    "pickle only": (pickled_only, r"the weights are pickled \(pytorch_model.bin\).*only safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights: model.safetensors is missing"),
    "shards without index": (
        lambda f: (f / "model.safetensors").rename(f / "model-1-of-2.safetensors"),
        "model-1-of-2.safetensors is there, but neither model.safetensors nor model.safetensors.index.json",
    ),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors: the file is truncated"),
    "missing shard": (
        lambda f: shard(f) and (f / "model-2.safetensors").unlink(),
        "index.json: the shard model-2.safetensors is missing",
    ),
    "index names an absent file": (
        lambda f: edit_index(f, extra="model-3.safetensors"),
        "index.json: the shard model-3.safetensors is missing",
    ),
    "index names an absent tensor": (
        lambda f: edit_index(f, extra="model-2.safetensors"),
        "tensor 'extra' is not in model-2.safetensors, where the index promises it",
    ),
    "index leaves the folder": (
        lambda f: edit_index(f, extra="../secret.safetensors"),
        r"the shard name '../secret.safetensors' leaves the folder",
    ),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "weight_map is missing or no map",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_at_opening(folder: Path, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(InputError, match=message) as refusal:
        Checkpoint.open(folder)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 3


Q = "model.layers.1.self_attn.q_proj.weight"


def poison(value: float) -> Break:
    return lambda folder: edit_weights(folder, lambda tensors: tensors[Q].view(-1)[17:18].fill_(value))


BROKEN_BLOCKS: dict[str, tuple[Break, str]] = {
    "NaN": (poison(float("nan")), f"model.safetensors: tensor '{Q}' holds NaN or infinite values"),
    "infinity": (poison(float("inf")), f"tensor '{Q}' holds NaN or infinite values"),
    "missing tensor": (lambda f: edit_weights(f, lambda t: t.pop(Q)), f"tensor '{Q}' is missing"),
    "missing norm": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.input_layernorm.weight")),
        "tensor 'model.layers.1.input_layernorm.weight' is missing",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({Q: torch.ones(64, 63)})),
        rf"tensor '{Q}' has shape \[64, 63\], but config.json asks for \[64, 64\]",
    ),
    "config of another model": (
        lambda f: edit_config(f, num_attention_heads=8),
        r"has shape \[64, 64\], but config.json asks for \[128, 64\]",
    ),
    "config that transformers refuses": (
        lambda f: edit_config(f, hidden_act="quelu"),
        "config.json: no model can be built from it|config.json: transformers refuses it",
    ),
    "config with a text where a number belongs": (
        lambda f: edit_config(f, rms_norm_eps="tiny"),
        "config.json: no model can be built from it|config.json: transformers refuses it",
    ),
}


@pytest.mark.parametrize("case", BROKEN_BLOCKS)
def test_a_broken_block_is_refused_when_it_is_read(folder: Path, case: str) -> None:
    breaks, message = BROKEN_BLOCKS[case]
    breaks(folder)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InputError, match=message) as refusal:
        checkpoint.build_block(1, torch.float32)
    assert "\n" not in str(refusal.value)


def test_huge_but_finite_weights_are_not_called_infinite(folder: Path) -> None:
    """Their sum overflows: each is looked at then."""
    edit_weights(folder, lambda tensors: tensors[Q].fill_(3e38))
    Checkpoint.open(folder).build_block(1, torch.float32)


def test_a_missing_tensor_is_refused_by_build_model(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(Q))
    with pytest.raises(InputError, match=f"tensor '{Q}' is missing"):
        Checkpoint.open(folder).build_model()


@pytest.mark.parametrize("model", ["./absent", "/absent/folder", "a/b/c", "~/model"])
def test_a_path_that_is_not_there_is_no_hub_id(model: str) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        Checkpoint.open(model)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(InputError, match="it is a file"):
        Checkpoint.open(path)


def test_own_code_is_ignored_where_transformers_has_the_same_class(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    (folder / "modeling_llama.py").write_text("raise SystemExit('code of the model ran')")
    checkpoint = Checkpoint.open(folder)
    checkpoint.build_block(0, torch.float32)
    checkpoint.build_model()
    load_tokenizer(folder)


# tokenizers


def test_tokenizer_is_loaded_and_checked(folder: Path) -> None:
    assert len(load_tokenizer(folder)) == 258
    edit_config(folder, vocab_size=200)
    with pytest.raises(InputError, match="the tokenizer has 258 tokens, but the model's embedding only 200 rows"):
        load_tokenizer(folder)


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="the folder has no tokenizer: tokenizer.json is missing"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"version": "1.0", "model": {"type": "Magic"}}'])
def test_broken_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="the tokenizer cannot be loaded") as refusal:
        load_tokenizer(folder)
    assert "\n" not in str(refusal.value)


# what a checkpoint says of itself


def test_sharded_and_single_file_are_the_same_model(folder: Path, tiny_model: TinyModel) -> None:
    shard(folder)
    sharded, single = Checkpoint.open(folder), Checkpoint.open(tiny_model("llama"))
    assert sharded.tensors.keys() == single.tensors.keys()
    assert all(torch.equal(sharded.tensor(name), single.tensor(name)) for name in single.tensors)
    assert {name for i in range(3) for name in sharded.block_tensors(i)} | set(sharded.rest_tensors()) == set(
        sharded.tensors
    )


def test_files_and_their_digests(folder: Path) -> None:
    for name in ("README.md", "chat_template.jinja", "LICENSE", "model.py", "pytorch_model.bin", "compress.json"):
        (folder / name).write_text("x")
    checkpoint = Checkpoint.open(folder)
    carried = {str(path) for path in checkpoint.aux_files}
    assert {"chat_template.jinja", "LICENSE", "tokenizer.json", "generation_config.json"} <= carried
    assert not carried & {"README.md", "model.py", "pytorch_model.bin", "compress.json", "config.json"}
    digests = checkpoint.sha256()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= digests.keys()
    edit_config(folder, rms_norm_eps=1e-3)
    changed = Checkpoint.open(folder).sha256()
    assert {name for name in digests if digests[name] != changed[name]} == {"config.json"}


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_may_lie_under_either_name(folder: Path, kept: str) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[kept] = tensors.pop("model.embed_tokens.weight")

    edit_weights(folder, rename)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tied
    assert checkpoint.embedding_tensor == checkpoint.head_tensor == kept
    head = checkpoint.build_head(torch.float32)
    assert torch.equal(head.get_parameter("lm_head.weight"), checkpoint.tensor(kept))


def test_dtype_is_that_of_the_config_or_of_most_weights(tiny_model: TinyModel, folder: Path) -> None:
    assert Checkpoint.open(tiny_model("llama", dtype="bfloat16")).dtype is torch.bfloat16
    edit_config(folder, dtype=None)
    assert Checkpoint.open(folder).dtype is torch.float32


def test_every_architecture_names_a_class_of_transformers() -> None:
    import transformers

    for model_type, architecture in ARCHITECTURES.items():
        assert hasattr(transformers, architecture.model_class), model_type
        names = {group.name for group in architecture.groups} | ({"gate_up", "down"} if architecture.experts else set())
        assert {name for norm in architecture.norms for name in norm.feeds} <= names
        assert lookup({"model_type": model_type}) is architecture


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_weights_are_dequantized_on_read(tmp_path: Path, symmetric: bool) -> None:
    """The streamed forward, the whole model and the tensors themselves agree on what an artifact means."""
    quantized = write_quantized(tmp_path / "q", Scheme(4, 32, symmetric=symmetric))
    checkpoint = Checkpoint.open(quantized.path)
    assert checkpoint.kind == "quantized"
    expected = quantized.dequantized()
    site = checkpoint.sites(0)[0]
    packed = checkpoint.quant_tensor(site)
    assert packed is not None
    assert torch.equal(packed.codes(), quantized.modules[site].codes())
    assert torch.equal(checkpoint.weight(site, torch.float32), expected[f"{site}.weight"])
    model = checkpoint.build_model(torch.float32)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
    streamed = torch.cat(list(stream_logits(checkpoint, Tokens.of(ids))))
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)
    assert checkpoint.quant_tensor("lm_head") is None


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_built_model_shows_its_parameters_by_their_names_on_disk(
    tiny_model: TinyModel, family: str, odd: bool
) -> None:
    checkpoint = Checkpoint.open(tiny_model(family, odd, "bfloat16"))
    model = checkpoint.build_model(torch.float32)
    views = checkpoint.disk_views(model.named_parameters())
    assert set(views) == set(checkpoint.tensors)
    for name, value in views.items():
        assert torch.equal(value, checkpoint.tensor(name).float()), name
        value.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_is_the_built_one_block_by_block(tiny_model: TinyModel, family: str, odd: bool) -> None:
    checkpoint = Checkpoint.open(tiny_model(family, odd, "bfloat16"))
    built, seen = checkpoint.build_model(torch.float32), []
    blocks = built.get_submodule(checkpoint.architecture.blocks)

    def settle(block: torch.nn.Module) -> None:
        for (name, value), (same, expected) in zip(
            block.named_parameters(), blocks[len(seen)].named_parameters(), strict=True
        ):
            assert name == same and torch.equal(value, expected), name
        seen.append(block)

    model = checkpoint.stream_model(torch.float32, settle)
    assert len(seen) == checkpoint.num_blocks
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in built.named_parameters()]
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, built(ids).logits)
