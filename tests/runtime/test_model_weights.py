"""Weights of all kinds in the runtime's model: uneven, quantized by us and by others, with parts cut out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compress.core._skeleton import StoredLinear
from compress.core.checkpoint import Checkpoint
from compress.core.scheme import Scheme
from runtime.loader import load
from tests.conftest import TinyModel
from tests.quantized_folders import write_quantized
from tests.runtime._folders import quantized_copy, rewritten
from tests.runtime._naive import NaiveRunner, exact, prompts_of
from tests.runtime._reference import reference_logits, worst

ORACLES = Path(__file__).parents[1] / "oracles"
LENGTHS = (20, 9)
SCHEDULE = ({0: 8}, {0: 1, 1: 5})
BOUND = 1e-4


def gap(folder: Path, vocabulary: int, reference: Path | None = None) -> float:
    """Largest difference to the logits that transformers has for the same folder, or for another one."""
    prompts = prompts_of(LENGTHS, vocabulary)
    return worst(exact(folder).feed(prompts, SCHEDULE), reference_logits(reference or folder, prompts))


def test_unevenly_pruned_layers_run_at_their_own_widths(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A group of heads and some channels cut out of one layer: as if o and down had zeros there."""
    heads = torch.arange(64) >= 32  # without the first two query heads and
    kv_heads = torch.arange(32) >= 16  # their key-value head
    channels = torch.arange(128) % 3 != 0
    inputs = {"self_attn.o_proj": heads, "mlp.down_proj": channels}
    outputs = {
        "self_attn.q_proj": heads,
        "self_attn.k_proj": kv_heads,
        "self_attn.v_proj": kv_heads,
        "mlp.gate_proj": channels,
        "mlp.up_proj": channels,
    }

    def zero(state: dict[str, Tensor]) -> None:
        for name, kept in inputs.items():
            state[f"model.layers.1.{name}.weight"][:, ~kept] = 0

    def cut(state: dict[str, Tensor]) -> None:
        for name, kept in (inputs | outputs).items():
            weight = state[f"model.layers.1.{name}.weight"]
            state[f"model.layers.1.{name}.weight"] = weight[:, kept].contiguous() if name in inputs else weight[kept]

    zeroed = rewritten(tiny_model("llama"), tmp_path / "zeroed", zero)
    folder = rewritten(tiny_model("llama"), tmp_path / "cut", cut)
    runner = exact(folder)
    sizes = [(layer.heads, layer.kv_heads, layer.ffn) for layer in runner.model.config.layers]
    assert sizes == [(4, 2, 128), (2, 1, 85), (4, 2, 128)]
    assert runner.cache.k[1].shape[2:] == (1, 16)
    assert gap(folder, 320, zeroed) < BOUND
    prompts = prompts_of(LENGTHS, 320)
    alone = NaiveRunner(runner.model, seed=1).feed(prompts[:1], [])[0]
    assert torch.equal(runner.feed(prompts, SCHEDULE)[0], alone)  # odd widths, too


def test_experts_that_were_cut_out_are_not_missed(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The last expert of one layer is gone; transformers gets a router without its row."""
    source, router = tiny_model("mixtral"), "model.layers.1.block_sparse_moe.gate.weight"

    def cut(state: dict[str, Tensor]) -> None:
        state[router] = state[router][:3].clone()
        for name in ("w1", "w2", "w3"):
            del state[f"model.layers.1.block_sparse_moe.experts.3.{name}.weight"]

    runner = exact(rewritten(source, tmp_path / "cut", cut))
    assert [layer.experts.count for layer in runner.model.config.layers if layer.experts] == [4, 3, 4]
    assert not runner.model.capturable
    reference = Checkpoint.open(source)
    model = reference.build_model(torch.float32)
    model.model.layers[1].mlp.gate.weight = torch.nn.Parameter(reference.tensor(router)[:3])
    prompts = prompts_of(LENGTHS, 320)
    with torch.inference_mode():
        wanted = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    assert worst(runner.feed(prompts, SCHEDULE), wanted) < BOUND


SCHEMES = {
    "w4a16-g32": Scheme(4, 32),
    "w4a16-asymmetric": Scheme(4, 32, symmetric=False),
    "w3a16-channel": Scheme(3),
    "w8a16": Scheme(8, 64),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_models_equal_their_dequantized_weights(tmp_path: Path, name: str) -> None:
    folder = write_quantized(tmp_path / "model", SCHEMES[name], tied=True).path
    runner = exact(folder)
    assert gap(folder, 96) < BOUND
    dense = sum(weight.numel() * 4 for weight in Checkpoint.open(folder).build_model(torch.float32).parameters())
    kept = sum(buffer.numel() * buffer.element_size() for buffer in runner.model.buffers())
    assert kept < 0.6 * dense  # packed weights stay packed


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
def test_families_with_other_layouts_run_quantized(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    def scheme_of(module: str) -> Scheme | None:
        return None if module.endswith((".gate", "lm_head")) else Scheme(4, 16, symmetric="down" in module)

    folder = quantized_copy(tiny_model(family, odd=True), tmp_path / "model", scheme_of)
    assert gap(folder, 311) < BOUND


def test_a_quantized_head(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", odd=True)
    folder = quantized_copy(source, tmp_path / "model", lambda module: Scheme(4, 16) if module == "lm_head" else None)
    prompts = prompts_of((9,), 311)
    runner = exact(folder)
    assert runner.model.head.bytes < 311 * 112
    assert worst(runner.feed(prompts, []), reference_logits(folder, prompts)) < BOUND


@pytest.mark.parametrize("name", ["llmcompressor-w4a16", "llmcompressor-w4a16-asymmetric", "gptqmodel-w4"])
def test_artifacts_of_other_tools(name: str) -> None:
    folder = ORACLES / name
    assert gap(folder, 64) < BOUND


def test_inputs_in_8_bits_are_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ORACLES / "llmcompressor-w8a8"
    prompts = prompts_of((20,), 64)
    ours = exact(folder).feed(prompts, [])
    assert worst(ours, reference_logits(folder, prompts)) < 1e-3  # sums in another order may flip a code
    monkeypatch.setattr(StoredLinear, "round_inputs", lambda *_: None)
    assert 1e-3 < worst(ours, reference_logits(folder, prompts)) < 0.05  # without rounding: a little else


def test_bitsandbytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = AutoModelForCausalLM.from_pretrained(
        tiny_model("llama"), quantization_config=settings, dtype=torch.float32
    )
    source.save_pretrained(folder)
    assert load(folder, numerics="exact").slow_reasons == {}
    assert gap(folder, 320) < BOUND


def test_activation_order_is_kept_dense_and_said(tmp_path: Path) -> None:
    """A layer of a GPTQ file whose groups are shuffled."""

    def shuffle(state: dict[str, Tensor]) -> None:
        name = "model.layers.0.self_attn.o_proj.g_idx"
        state[name] = state[name].flip(0).contiguous()

    folder = rewritten(ORACLES / "gptqmodel-w4", tmp_path / "model", shuffle)
    reasons = load(folder, numerics="exact").slow_reasons
    assert list(reasons) == ["blocks.0.attention.output"]
    assert "kept dense: groups follow an activation order" in reasons["blocks.0.attention.output"]
    assert gap(folder, 64) < BOUND


def test_layers_of_different_schemes_are_not_merged(tmp_path: Path) -> None:
    def scheme_of(module: str) -> Scheme | None:
        kind = module.rpartition(".")[2]
        return {"q_proj": Scheme(4, 32), "k_proj": Scheme(8, 32), "gate_proj": None}.get(kind, Scheme(4, 16))

    folder = write_quantized(tmp_path / "model", scheme_of, shards=True).path
    block = load(folder, numerics="exact").blocks[0]
    assert (len(block.attention.qkv.linears), len(block.ffn.gate_up.linears)) == (3, 2)
    assert gap(folder, 96) < BOUND


def test_layers_of_one_scheme_are_merged(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "model", Scheme(4, 32)).path
    block = load(folder, numerics="exact").blocks[0]
    assert len(block.attention.qkv.linears) == len(block.ffn.gate_up.linears) == 1


def test_loading_and_running_needs_no_hugging_face_library(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path / "model", Scheme(4, 32)).path
    code = f"""
import sys
from pathlib import Path
from tests.runtime._naive import exact
exact(Path({str(folder)!r})).step({{0: [1, 2, 3]}})
print(sorted({{"transformers", "pydantic", "datasets", "tokenizers", "safetensors"}} & set(sys.modules)))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
