"""Makes the small artifacts beside this file: a 2-layer Llama of hidden size 64, quantized by two other tools.

    python -m tests.oracles.make_peer_artifacts source SOURCE     (this project's environment; writes the dense model)
    PEER/bin/python make_peer_artifacts.py llmcompressor SOURCE OUT    (llm-compressor 0.14: W4A16, asymmetric, W8A8)
    PEER/bin/python make_peer_artifacts.py gptqmodel SOURCE OUT        (GPTQModel 7.6: 4 bits, groups of 32)

expected/ gets a few layers of each artifact as the tool's own code dequantizes them.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import load_file, save_file

LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj")
KEPT = {"config.json", "model.safetensors", "quantize_config.json"}


def make_source(folder: Path) -> None:
    from tests.quantized_folders import tiny_llama
    from tests.tiny import byte_tokenizer

    tiny_llama(tied=True, ffn=64).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))


def expected_path(out: Path, name: str) -> Path:
    (out / "expected").mkdir(exist_ok=True)
    return out / "expected" / f"{name}.safetensors"


def trim(folder: Path) -> None:
    """Leave weights and configs only: the rest is the source's."""
    for path in folder.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_llmcompressor(source: Path, out: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    group = {"targets": ["Linear"]}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    recipes = {
        "llmcompressor-w4a16": GPTQModifier(
            config_groups={"group_0": group | {"weights": weights}}, ignore=["lm_head"]
        ),
        "llmcompressor-w4a16-asymmetric": QuantizationModifier(
            config_groups={"group_0": group | {"weights": weights | {"symmetric": False}}}, ignore=["lm_head"]
        ),
        "llmcompressor-w8a8": QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"]),
    }
    ids = tokens()
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    for name, modifier in recipes.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(source),
            dataset=Dataset.from_dict(rows) if isinstance(modifier, GPTQModifier) else None,
            recipe=[modifier],
            max_seq_length=32,
            num_calibration_samples=8,
        )
        model.save_pretrained(out / name, save_compressed=True)
        trim(out / name)
        save_file(expected_by_compressed_tensors(out / name), expected_path(out, name))


def expected_by_compressed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoConfig

    config = QuantizationConfig.model_validate(AutoConfig.from_pretrained(folder).quantization_config)
    stored = load_file(folder / "model.safetensors")
    expected = {}
    for layer in LAYERS:
        parts = {
            name.removeprefix(f"{layer}."): value for name, value in stored.items() if name.startswith(f"{layer}.")
        }
        compressor = BaseCompressor.get_value_from_registry(config.format)
        expected[layer] = compressor.decompress(parts, config.config_groups["group_0"])["weight"].contiguous()
    return expected


def make_gptqmodel(source: Path, out: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    folder = out / "gptqmodel-w4"
    model = GPTQModel.load(str(source), GPTQConfig(bits=4, group_size=32, sym=True, offload_to_disk=False))
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens()]
    model.quantize(rows, batch_size=4)
    model.save(str(folder))
    loaded = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu")
    expected = {}
    for layer in LAYERS:
        module = loaded.model.get_submodule(layer)
        expected[layer] = module.dequantize_weight().T.contiguous()
    trim(folder)
    save_file(expected, expected_path(out, folder.name))


if __name__ == "__main__":
    tool, source = sys.argv[1], Path(sys.argv[2])
    if tool == "source":
        make_source(source)
    elif tool == "llmcompressor":
        make_llmcompressor(source, Path(sys.argv[3]))
    elif tool == "gptqmodel":
        make_gptqmodel(source, Path(sys.argv[3]))
    else:
        sys.exit(f"unknown tool {tool!r}")
