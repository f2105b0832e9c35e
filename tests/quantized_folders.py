"""Tiny quantized Llama folders, built from tensors: what a run would write, without running one."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from compress.core.formats import compressed_tensors
from compress.core.grid import fit_grid
from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class QuantizedFolder:
    """A folder, what its source held, and what was quantized."""

    path: Path
    source: dict[str, torch.Tensor]
    modules: dict[str, QuantTensor] = field(default_factory=dict)

    def dequantized(self) -> dict[str, torch.Tensor]:
        """The source with each quantized weight replaced by what the artifact means."""
        state = dict(self.source)
        for module, tensor in self.modules.items():
            state[f"{module}.weight"] = tensor.dequantize(torch.float32)
        return state


def tiny_llama(*, tied: bool = False, layers: int = 2, seed: int = 0, ffn: int = 128) -> LlamaForCausalLM:
    """Hidden 64, 4 heads of 16 with 2 KV heads, vocabulary 96; fp32."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def quantize_weight(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> QuantTensor:
    tensor = fit_grid(weight.float(), scheme, scale_dtype=scale_dtype).round(weight)
    return replace(tensor, input_scale=torch.full((1,), 0.02, dtype=scale_dtype)) if scheme.static_inputs else tensor


def write_quantized(
    path: Path,
    schemes: Scheme | Callable[[str], Scheme | None],
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    ffn: int = 128,
    layers: int = 2,
) -> QuantizedFolder:
    """Write a tiny Llama under `schemes` (one for all sites, or one per module; None keeps the module dense)."""
    model = tiny_llama(tied=tied, ffn=ffn, layers=layers).to(dtype)
    source = {
        name: value.clone() for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    folder = QuantizedFolder(path, source)
    chosen: dict[str, Scheme] = {}
    kept = [] if tied else ["lm_head"]
    stored: dict[str, torch.Tensor] = {}
    for name, value in source.items():
        module = name.removesuffix(".weight")
        scheme = None
        if module.rpartition(".")[2] in SITES:
            scheme = schemes if isinstance(schemes, Scheme) else schemes(module)
            if scheme is None:
                kept.append(module)
        if scheme is None:
            stored[name] = value.contiguous()
        else:
            chosen[module] = scheme
            folder.modules[module] = quantize_weight(value, scheme, dtype)
            stored |= compressed_tensors.encode(module, folder.modules[module])
    path.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = compressed_tensors.quantization_config(chosen, kept + (["lm_head"] if tied else []))
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_weights(path, stored, shards=shards)
    return folder


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], *, shards: bool = False) -> None:
    """One file, or one shard per block and one for the rest, with an index."""
    if not shards:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(key, {})[name] = value
    weight_map = {}
    for number, key in enumerate(sorted(parts), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(parts[key], path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(parts[key], file)
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
