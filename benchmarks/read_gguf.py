"""Does llama.cpp read a GGUF file of ours as we do? Tokens of texts, and greedy tokens until the first near-tie.

    python benchmarks/read_gguf.py MODEL --peers PEERS --out benchmarks/results/read-gguf.json

MODEL is a quantized artifact or a dense folder. It is exported to GGUF as it is, and once more for each of --types
(dense models only); llama-cpp-python, in an environment of its own (peers.sh), tokenizes the prompts and goes on from
them greedily. Ours are the tokens of the fp32 model that has the weights of the file: where the first two logits lie
closer than --tie, either choice is right, and the comparison of that prompt ends.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPTS = ("Once upon a time, there was a", "Tom and Lily", "The little dog said: \"I don't", "  One day\n\nhe had 12 ")
LENGTH = 48


def read(file: Path, asked: Path) -> None:
    """In the peer's environment: tokens of each text, and how it goes on from our tokens."""
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=2, verbose=False, seed=0)
    found = []
    for prompt in json.loads(asked.read_text()):
        model.reset()
        steps = model.generate(prompt["ids"], temp=0.0, top_k=1, repeat_penalty=1.0)
        tokens = model.tokenize(prompt["text"].encode(), add_bos=True, special=False)
        found.append({"ids": tokens, "greedy": [next(steps) for _ in range(LENGTH)]})
    print(json.dumps({"version": llama_cpp.__version__, "found": found}))


def ours(folder: Path, file: Path, tie: float) -> list[dict[str, object]]:
    """Each prompt's tokens and greedy tokens, with the step of the first near-tie, of the model with the file's
    weights."""
    import torch

    from compress.core.checkpoint import Checkpoint, load_tokenizer

    source = Checkpoint.open(folder)
    model, tokenizer = source.build_model(torch.float32), load_tokenizer(folder)
    put_weights(model, file, source)
    found = []
    for text in PROMPTS:
        ids = tokenizer(text)["input_ids"]
        greedy, first_tie = [], LENGTH
        with torch.inference_mode():
            for step in range(LENGTH):
                best = model(torch.tensor([ids + greedy])).logits[0, -1].topk(2)
                if float(best.values[0] - best.values[1]) < tie:
                    first_tie = min(first_tie, step)
                greedy.append(int(best.indices[0]))
        found.append({"text": text, "ids": ids, "greedy": greedy, "first_tie": first_tie})
    return found


def put_weights(model, file: Path, source) -> None:
    """Give `model` the values that our reader finds in the file, rows back in the order of transformers."""
    import torch

    from compress.core.formats import gguf
    from compress.core.formats._gguf_container import read as read_container
    from compress.core.formats._gguf_model import rotary_rows
    from compress.core.formats._gguf_reader import values

    stored = read_container(file)[1]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for named, name in gguf.layout(source, requantize=True).origin.items():
            value = torch.from_numpy(values(file, stored[named]).copy())
            rows = rotary_rows(name, source.config)
            parameters[name].copy_(value if rows is None else torch.empty_like(value).index_copy_(0, rows, value))


def compare(folder: Path, options: list[str], python: Path, tie: float) -> dict[str, object]:
    """Export, let llama.cpp go on, and count the tokens that are alike in front of each prompt's first near-tie."""
    with tempfile.TemporaryDirectory() as name:
        out, asked = Path(name) / "gguf", Path(name) / "prompts.json"
        command = [sys.executable, "-m", "compress", "export", folder, "--format", "gguf", "-o", out, "-q", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        mine = ours(folder, out / "model.gguf", tie)
        asked.write_text(json.dumps(mine))
        command = [python, __file__, "--read", out / "model.gguf", asked]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = []
    for one, other in zip(mine, theirs["found"], strict=True):
        pairs = zip(one["greedy"], other["greedy"], strict=True)
        alike = next((step for step, (a, b) in enumerate(pairs) if a != b), LENGTH)
        rows.append(
            {
                "same_tokens_of_text": one["ids"] == other["ids"],
                "alike": alike,
                "first_near_tie": one["first_tie"],
                "agrees": alike >= one["first_tie"],
            }
        )
    return {"llama_cpp_python": theirs["version"], "prompts": rows}


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--peers", type=Path, required=True, help="folder that peers.sh filled")
    parser.add_argument("--types", nargs="*", default=[], help="for dense models, e.g. q8_0 q4_k")
    parser.add_argument("--tie", type=float, default=0.1, help="logits that are this close count as a near-tie")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    python = asked.peers / "llamacpp" / "bin" / "python"
    result = {"tokens": LENGTH, "tie": asked.tie, "platform": platform.platform(), "models": {}}
    for folder in asked.model:
        dense = "quantization_config" not in json.loads((folder / "config.json").read_text())
        for type in ["", *(asked.types if dense else [])]:
            label = f"{folder.name} {type or 'as it is'}"
            result["models"][label] = compare(folder, ["--type", type] if type else [], python, asked.tie)
            print(label, json.dumps(result["models"][label]))
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
