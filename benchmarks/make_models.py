"""Write a random-weight Llama folder of a named shape, for measurements of time and memory.

    python benchmarks/make_models.py 135m DIR [--seed 0]
    python benchmarks/make_models.py 1b DIR

One shard is in memory at a time. Every tensor has a generator of its own, seeded by its name: the bytes depend on the
shape and the seed alone. The tokenizer is a byte-level BPE without merges, so that tools which insist on one find one.
"""

import argparse
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers_per_shard: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "135m": Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, vocabulary=49152, layers_per_shard=30),
    "135m-4": Shape(layers=4, hidden=576, ffn=1536, heads=9, kv_heads=3, vocabulary=49152, layers_per_shard=4),
    "0.5b": Shape(layers=24, hidden=896, ffn=4864, heads=14, kv_heads=2, vocabulary=32000, layers_per_shard=12),
    "1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, vocabulary=32000, layers_per_shard=2),
    "1b-2": Shape(layers=2, hidden=2048, ffn=8192, heads=32, kv_heads=8, vocabulary=32000, layers_per_shard=2),
    "tiny": Shape(layers=2, hidden=64, ffn=128, heads=4, kv_heads=2, vocabulary=512, layers_per_shard=1),
}


def config(shape: Shape, context_tokens: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": context_tokens,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def layer_tensors(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    kv = shape.kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }
    names = {f"{name}.weight": size for name, size in linears.items()}
    names |= {"input_layernorm.weight": (shape.hidden,), "post_attention_layernorm.weight": (shape.hidden,)}
    return {f"model.layers.{layer}.{name}": size for name, size in names.items()}


def shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors of every shard; a model of one shard has the embedding in it."""
    rest = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
    groups = []
    for first in range(0, shape.layers, shape.layers_per_shard):
        group: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + shape.layers_per_shard, shape.layers)):
            group |= layer_tensors(shape, layer)
        groups.append(group)
    return [rest | groups[0]] if len(groups) == 1 else [rest, *groups]


def random_tensor(name: str, size: tuple[int, ...], seed: int) -> "torch.Tensor":
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_model(shape: Shape, folder: Path, seed: int, context_tokens: int = 2048) -> int:
    """Write the folder and return the number of parameters."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plan = shards(shape)
    weight_map, total_bytes = {}, 0
    for index, group in enumerate(plan, start=1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{index:05d}-of-{len(plan):05d}.safetensors"
        tensors = {tensor: random_tensor(tensor, size, seed) for tensor, size in group.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    if len(plan) > 1:
        index_file = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(shape, context_tokens), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}) + "\n")
    write_tokenizer(folder)
    return total_bytes // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parameters = make_model(SHAPES[arguments.shape], arguments.folder, arguments.seed)
    print(f"{arguments.folder}: {parameters / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
