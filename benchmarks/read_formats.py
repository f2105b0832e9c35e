"""Do other projects' readers see the numbers that we wrote? Logits of an artifact in every format, side by side.

    python benchmarks/read_formats.py ARTIFACT --peers PEERS --out benchmarks/results/read-formats.json

ARTIFACT is a quantized folder of symmetric 4-bit groups. It is exported to GPTQ and AWQ; GPTQModel, in an environment
of its own (peers.sh), loads each through transformers and gives logits on fixed token ids. Compared is what it makes of
the weights with the dequantized model, both in the same dtype; its kernels round differently, so agreement is to their
precision, not to the bit. A reader that fails is recorded with its words.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FORMATS = ("gptq", "awq")
SEED, ROWS, LENGTH = 0, 4, 64


def read(folder: Path, ids: Path, out: Path) -> None:
    """In the peer's environment: logits of `folder` on the token ids, as fp32."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
    with torch.inference_mode():
        logits = model(load_file(ids)["input_ids"]).logits.float()
    kernels = sorted({type(layer).__module__.split(".")[0] + "." + type(layer).__name__ for layer in model.modules()})
    save_file({"logits": logits.contiguous()}, out)
    out.with_suffix(".json").write_text(json.dumps({"kernels": [name for name in kernels if "gptqmodel" in name]}))


def measure(artifact: Path, peer: Path) -> dict[str, object]:
    """Export, have the peer read, compare."""
    import torch
    from safetensors.torch import load_file, save_file

    from compress.core.checkpoint import Checkpoint
    from compress.export_artifact import export_artifact

    source = Checkpoint.open(artifact)
    ids = torch.randint(3, source.config["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED))
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        save_file({"input_ids": ids}, folder / "ids.safetensors")
        ours = {dtype: source.build_model(dtype)(ids).logits.float() for dtype in (torch.float32, torch.bfloat16)}
        found["ours_bf16_against_ours_fp32"] = difference(ours[torch.bfloat16], ours[torch.float32])
        for format in FORMATS:
            export_artifact(artifact, folder / format, format)
            out = folder / f"{format}.safetensors"
            command = [peer, __file__, "--read", folder / format, folder / "ids.safetensors", out]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            if done.returncode:
                found[format] = {"failed": done.stderr.strip().splitlines()[-1:]}
                continue
            theirs = load_file(out)["logits"]
            found[format] = json.loads(out.with_suffix(".json").read_text()) | {
                "against_ours_bf16": difference(theirs, ours[torch.bfloat16]),
                "against_ours_fp32": difference(theirs, ours[torch.float32]),
            }
    return found


def difference(one, other) -> dict[str, float]:
    """How far two sets of logits are apart: largest and mean difference, KL in nats, share of equal best tokens."""
    import torch

    p, q = other.log_softmax(-1), one.log_softmax(-1)
    return {
        "largest": float((one - other).abs().max()),
        "mean": float((one - other).abs().mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "same_best_token": float((one.argmax(-1) == other.argmax(-1)).to(torch.float32).mean()),
    }


def versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version as v;"
        "print(json.dumps({n: v(n) for n in ('gptqmodel', 'optimum', 'transformers', 'torch')}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read(*map(Path, sys.argv[2:5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="folder that peers.sh filled")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    peer = asked.peers / "gptqmodel" / "bin" / "python"
    result = {
        "model": asked.artifact.name,
        "tokens": {"seed": SEED, "rows": ROWS, "length": LENGTH},
        "peer": versions(peer),
        "platform": platform.platform(),
        "formats": measure(asked.artifact, peer),
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["formats"], indent=1))


if __name__ == "__main__":
    main()
