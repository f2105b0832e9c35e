"""Perplexity of folders on fixed token ids: one implementation for the original and for the artifacts of all tools.

    python benchmarks/perplexity.py --tokens EVALUATION.safetensors FOLDER [FOLDER ...] [--json FILE]

Every row of the ids is scored on its own from its start (-1 marks the end of a row); the figure is exp of the mean
negative log-likelihood over all tokens but each row's first. Weights are decoded by decode.py into a dense fp32 model;
inputs that an artifact wants rounded (8 bits, one scale per token) are rounded here, the same for all tools.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from decode import dense_weights
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

ROWS_AT_ONCE = 8
LARGEST = {"int": 127.0, "float": 448.0}  # codes of inputs: int8 and e4m3


@dataclass(frozen=True)
class Score:
    """Over the scored positions; `kl` is the mean of KL(original, artifact), in nats, and `flips` the share in which
    another token is the likeliest."""

    perplexity: float
    kl: float
    flips: float


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
    round_inputs(model, json.loads((folder / "config.json").read_text()).get("quantization_config") or {})
    return model.eval()


def round_inputs(model: torch.nn.Module, settings: dict[str, object]) -> None:
    """Linear layers but the head get their inputs as the settings of compressed-tensors say."""
    wanted = [group.get("input_activations") for group in settings.get("config_groups", {}).values()]
    if not any(wanted):
        return
    [inputs] = wanted
    if (inputs["num_bits"], inputs["strategy"], inputs["dynamic"], inputs["symmetric"]) != (8, "token", True, True):
        raise ValueError(f"inputs are rounded here to 8 bits per token alone, not {inputs}")

    def round_them(layer: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (rounded(given[0], inputs["type"]),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(round_them)


def rounded(inputs: torch.Tensor, type: str) -> torch.Tensor:
    scale = (inputs.abs().amax(dim=-1, keepdim=True) / LARGEST[type]).clamp(min=1e-12)
    scaled = inputs / scale
    return scale * (scaled.round() if type == "int" else scaled.to(torch.float8_e4m3fn).float())


def batches(ids: np.ndarray) -> Iterator[torch.Tensor]:
    """Rows of about one length together; -1 fills them on the right, which under a causal mask no position sees."""
    lengths = (ids >= 0).sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        yield torch.from_numpy(ids[rows, : lengths[rows].max()])


@torch.inference_mode()
def drift(model: torch.nn.Module, original: torch.nn.Module, ids: np.ndarray) -> tuple[float, float]:
    """The mean KL divergence from the original in nats, and the share of flips."""
    total, flips, count = 0.0, 0, 0
    for batch in batches(ids):
        scored = batch[:, 1:] >= 0
        here, there = (
            torch.log_softmax(each(input_ids=batch.clamp(min=0), use_cache=False).logits[:, :-1][scored], dim=-1)
            for each in (model, original)
        )
        total += torch.nn.functional.kl_div(here, there, reduction="sum", log_target=True).item()
        flips += int((here.argmax(-1) != there.argmax(-1)).sum())
        count += int(scored.sum())
    return total / count, flips / count


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, ids: np.ndarray) -> tuple[float, int]:
    """Mean negative log-likelihood in nats and the number of tokens scored."""
    total, count = 0.0, 0
    for batch in batches(ids):
        logits = model(input_ids=batch.clamp(min=0), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1, reduction="sum"
        )
        total += losses.item()
        count += int((batch[:, 1:] >= 0).sum())
    return total / count, count


def perplexity(folder: Path, tokens: Path) -> float:
    return math.exp(mean_loss(build(folder), load_file(tokens)["input_ids"])[0])


def score(folder: Path, original: Path, tokens: Path) -> Score:
    ids = load_file(tokens)["input_ids"]
    model = build(folder)
    return Score(math.exp(mean_loss(model, ids)[0]), *drift(model, build(original), ids))


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
