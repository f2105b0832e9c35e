"""What coded keys and values cost: KL divergence to the same model with them in full, and bytes of a token.

    python benchmarks/kv_quality.py --data DIR [--models tinystories-656k stories-7m] [--samples 8] [--out FILE]

Logits come from the bundled runtime in exact numerics (fp32, so that nothing else differs), on windows of 256 tokens of
TinyStories; each position sees coded keys and values of all positions before it and of its own. fp8 scales come from
other text. `mixed` is int4 with the layers whose int4 costs most in int8, one at a time in that order, until the bound
is met; the order is found on one window that is not scored.
"""

import argparse
import json
from pathlib import Path

import tools
import torch

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.passes import Job
from compress.core.workers import NoSink
from compress.evaluate.scorers import RuntimeScorer
from kv_compress._ranges import head_sizes, scaled
from kv_compress.policy import Coding, KVPolicy, LayerPolicy
from kv_compress.stage import KVCache

LENGTH = 256
BOUND = 1e-2  # nats, of mixed
INT4, INT8 = Coding("int4", rotate=True), Coding("int8", rotate=True)


def windows(checkpoint: Checkpoint, text: Path, count: int, skip: int) -> Tokens:
    """`count` windows of stories, encoded as the models were trained, behind `skip` others."""
    from compress.core.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    stories = text.read_text(encoding="utf-8")[: (count + skip) * LENGTH * 8].split("<|endoftext|>")
    joined = "".join("<|start_story|>" + story.strip() for story in stories)
    ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)[skip : skip + count]
    return Tokens(rows, None, sha256="", source=text.name)


def logits(checkpoint: Checkpoint, tokens: Tokens, policy: KVPolicy | str) -> torch.Tensor:
    """fp32 log-probabilities [B * T, V]."""
    found = RuntimeScorer(checkpoint, "cpu", "exact", kv_cache=policy).logits(tokens)
    return torch.cat([part.flatten(0, 1).log_softmax(-1) for part in found])


def divergence(full: torch.Tensor, coded: torch.Tensor) -> dict[str, float]:
    """Of the coded model from the full one, in nats a token."""
    each = (full.exp() * (full - coded)).sum(-1)
    flips = (full.argmax(-1) != coded.argmax(-1)).float().mean()
    return {"kl": float(each.mean()), "kl_p99": float(each.quantile(0.99)), "flips": float(flips)}


def mixed(checkpoint: Checkpoint, text: Path, count: int, before: int) -> list[KVPolicy]:
    """int4 with the `n` most sensitive layers in int8, for n = 0, 1, …"""
    sample = windows(checkpoint, text, 1, before)
    full = logits(checkpoint, sample, "full")
    costs = []
    for index in range(count):
        layers = [LayerPolicy()] * count
        layers[index] = LayerPolicy(INT4, INT4)
        costs.append(divergence(full, logits(checkpoint, sample, KVPolicy(tuple(layers))))["kl"])
    order = sorted(range(count), key=lambda index: -costs[index])
    return [
        KVPolicy(tuple(LayerPolicy(*[INT8 if i in order[:n] else INT4] * 2) for i in range(count)))
        for n in range(count + 1)
    ]


def measure(folder: Path, text: Path, samples: int) -> dict[str, object]:
    checkpoint = Checkpoint.open(folder)
    tokens, count = windows(checkpoint, text, samples, 4), checkpoint.num_blocks
    full = logits(checkpoint, tokens, "full")
    open_scales = KVCache(precision="fp8").policy(checkpoint)
    fp8 = scaled(open_scales, Job(checkpoint, windows(checkpoint, text, 3, 0), NoSink()), per_head=False)
    policies = {name: KVPolicy.uniform(name, count) for name in ("int8", "int4")} | {"fp8": fp8}
    policies["int4, rotated"] = KVPolicy.uniform("int4", count, rotate=True)
    sizes = head_sizes(checkpoint)
    found = {"full": {"kl": 0.0, "token_bytes": token_bytes(KVPolicy.uniform("full", count), sizes)}}
    for name, policy in policies.items():
        found[name] = divergence(full, logits(checkpoint, tokens, policy)) | {"token_bytes": token_bytes(policy, sizes)}
        print(folder.name, name, found[name], flush=True)
    for raised, policy in enumerate(mixed(checkpoint, text, count, 3)):
        result = divergence(full, logits(checkpoint, tokens, policy)) | {"token_bytes": token_bytes(policy, sizes)}
        found["mixed"] = result | {"int8_layers": raised}
        if result["kl"] <= BOUND:
            break
    print(folder.name, "mixed", found["mixed"], flush=True)
    return found


def token_bytes(policy: KVPolicy, sizes: list[tuple[int, int]]) -> int:
    """Full numbers in bf16, as a GPU keeps them."""
    return sum(layer.token_bytes(*size, 2) for layer, size in zip(policy.layers, sizes, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["tinystories-656k", "stories-7m"])
    parser.add_argument("--samples", type=int, default=8, help="windows that are scored")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kv-quality.json")
    asked = parser.parse_args()
    text = asked.data / "text" / "tinystories-b.txt"
    models = {name: measure(asked.data / "models" / name, text, asked.samples) for name in asked.models}
    protocol = {"text": text.name, "windows": asked.samples, "window_tokens": LENGTH, "numerics": "exact fp32"}
    result = {"machine": tools.describe_machine(), "protocol": protocol, "models": models}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
