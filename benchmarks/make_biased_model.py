"""Copy a Llama folder, with a huge bias planted in the keys of some layers.

    python benchmarks/make_biased_model.py LLAMA DIR [--norm 900] [--layers 0,-1]

Qwen2 models have such biases (norms of hundreds), and codes of few bits for keys break them without a word. Here the
bias lies in the pair of channels that rotates slowest, and the queries' rows of that pair are set to zero: in full
precision it changes nothing, whatever its size. Only a code whose scale follows a key's largest number suffers.
"""

import argparse
import json
import shutil
from pathlib import Path


def make_model(source: Path, folder: Path, *, norm: float = 900.0, layers: tuple[int, ...] = (0, -1)) -> None:
    """Copy `source`; in each of `layers` the biases of all keys together are `norm` long (0: none is planted)."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    slowest = [width // 2 - 1, width - 1]
    tensors = load_file(folder / "model.safetensors")
    chosen = {layer % config["num_hidden_layers"] for layer in layers}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn."
        for part in ("q", "k", "v", "o"):
            weight = tensors[f"{name}{part}_proj.weight"]
            tensors[f"{name}{part}_proj.bias"] = torch.zeros(weight.shape[0], dtype=weight.dtype)
        if layer in chosen:
            tensors[f"{name}q_proj.weight"].view(heads, width, -1)[:, slowest] = 0
            bias = tensors[f"{name}k_proj.bias"].view(kv_heads, width)
            bias[:, slowest[0]] = norm / kv_heads**0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--norm", type=float, default=900.0)
    parser.add_argument("--layers", default="0,-1")
    asked = parser.parse_args()
    make_model(asked.source, asked.folder, norm=asked.norm, layers=tuple(map(int, asked.layers.split(","))))


if __name__ == "__main__":
    main()
