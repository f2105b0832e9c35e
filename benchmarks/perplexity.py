"""Perplexity of folders on fixed token ids: one implementation for the original and for the artifacts of all tools.

    python benchmarks/perplexity.py --tokens EVALUATION.safetensors FOLDER [FOLDER ...] [--json FILE]

Every row of the ids is scored on its own from its start (-1 marks the end of a row); the figure is exp of the mean
negative log-likelihood over all tokens but each row's first. Weights are decoded by decode.py into a dense fp32 model.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from decode import dense_weights
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

ROWS_AT_ONCE = 8


def build(folder: Path) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    for settings in ("quantization_config", "compression_config"):
        if hasattr(config, settings):
            delattr(config, settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    arrays = dense_weights(folder)
    if config.tie_word_embeddings and "lm_head.weight" in arrays:
        arrays.setdefault("model.embed_tokens.weight", arrays["lm_head.weight"])
    weights = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    absent = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if absent or unexpected:
        raise ValueError(f"{folder}: weights missing {absent[:3]}, not expected {unexpected[:3]}")
    return model.eval()


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, ids: np.ndarray) -> tuple[float, int]:
    """Mean negative log-likelihood in nats and the number of tokens scored."""
    total, count = 0.0, 0
    lengths = (ids >= 0).sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        batch = torch.from_numpy(ids[rows, : lengths[rows].max()])
        # Rows are filled on the right: under a causal mask the filling reaches no scored position.
        logits = model(input_ids=batch.clamp(min=0), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1, reduction="sum"
        )
        total += losses.item()
        count += int((batch[:, 1:] >= 0).sum())
    return total / count, count


def perplexity(folder: Path, tokens: Path) -> float:
    return math.exp(mean_loss(build(folder), load_file(tokens)["input_ids"])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write {folder: perplexity} here")
    asked = parser.parse_args()
    figures = {}
    for folder in asked.folders:
        figures[str(folder)] = perplexity(folder, asked.tokens)
        print(f"{figures[str(folder)]:10.4f}  {folder}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
