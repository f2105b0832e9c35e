"""What keys coded per channel cost, beside the codes of single tokens: KL to keys and values in full, and bytes.

    python benchmarks/kv_channels.py --data DIR [--models tinystories-656k stories-7m] [--samples 8] [--out FILE]

Windows of 512 tokens of TinyStories in exact numerics (fp32); scored are the positions from 256 on, most of whose
context has left the window that is kept in full. Bytes of a token are those allocated for a sequence of 512 tokens, in
bf16: for coded pages, whole pages of 16 tokens, the full ones included. Each model is measured as it is, and with a
bias of norm 900 planted in one channel of the keys of its first and last layer (make_biased_model.py), which changes
nothing in full.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import kv_quality
import tools
from make_biased_model import make_model

from compress.core.checkpoint import Checkpoint
from kv_compress._ranges import head_sizes
from kv_compress.policy import KVPolicy

LENGTH, FIRST = 512, 256
BLOCK, BF16 = 16, 2


def policies(count: int) -> dict[str, KVPolicy]:
    """The ways to keep keys and values, by name."""
    found = {name: KVPolicy.uniform(name, count) for name in ("int8", "int4")}
    found["int4, rotated"] = KVPolicy.uniform("int4", count, rotate=True)
    for recent in (64, 16):
        found[f"int4, keys per channel, {recent} recent"] = KVPolicy.uniform(
            "int4", count, keys="channel", sinks=4, recent=recent
        )
    found["int4, keys per token, 64 recent"] = KVPolicy.uniform("int4", count, sinks=4, recent=64)
    return found


def allocated(policy: KVPolicy, sizes: list[tuple[int, int]]) -> float:
    """Bytes a token of a sequence of LENGTH tokens."""
    if not policy.is_paged:
        return policy.token_bytes(sizes, BF16, BLOCK)
    pages = -(-policy.coding_points(sizes, BF16, BLOCK).slots(LENGTH) // BLOCK)
    return pages * BLOCK * KVPolicy.uniform("full", len(sizes)).token_bytes(sizes, BF16, BLOCK) / LENGTH


def measure(folder: Path, name: str, text: Path, samples: int) -> dict[str, object]:
    """Of one model."""
    checkpoint = Checkpoint.open(folder)
    kv_quality.LENGTH = LENGTH
    tokens, sizes = kv_quality.windows(checkpoint, text, samples, 2), head_sizes(checkpoint)

    def logits(policy: KVPolicy | str):
        rows = kv_quality.logits(checkpoint, tokens, policy)
        return rows.view(samples, LENGTH, -1)[:, FIRST:].flatten(0, 1)

    full = logits("full")
    found = {"full": {"kl": 0.0, "token_bytes": allocated(KVPolicy.uniform("full", len(sizes)), sizes)}}
    for way, policy in policies(len(sizes)).items():
        found[way] = kv_quality.divergence(full, logits(policy)) | {"token_bytes": allocated(policy, sizes)}
        print(name, way, found[way], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["tinystories-656k", "stories-7m"])
    parser.add_argument("--samples", type=int, default=8, help="windows that are scored")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kv-channels.json")
    asked = parser.parse_args()
    text, models = asked.data / "text" / "tinystories-b.txt", {}
    for name in asked.models:
        source = asked.data / "models" / name
        models[name] = measure(source, name, text, asked.samples)
        with TemporaryDirectory() as place:
            make_model(source, Path(place) / name)
            models[f"{name}, biased"] = measure(Path(place) / name, f"{name}, biased", text, asked.samples)
    protocol = {
        "text": text.name, "windows": asked.samples, "window_tokens": LENGTH, "scored_from": FIRST,
        "numerics": "exact fp32", "bytes": "allocated for 512 tokens in bf16, pages of 16",
    }  # fmt: skip
    result = {"machine": tools.describe_machine(), "protocol": protocol, "models": models}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
