"""Write token ids that every tool is then given, as one tensor `input_ids` [samples, length] in a .safetensors file.

    python benchmarks/make_tokens.py calibration --model DIR --text FILE --seed 0 --samples 128 --length 250 OUT
    python benchmarks/make_tokens.py evaluation  --model DIR --text FILE --samples 200 --length 512 OUT
    python benchmarks/make_tokens.py random      --vocabulary 32000 --seed 0 --samples 32 --length 512 OUT

Texts are stories separated by `<|endoftext|>`; the first and the last piece are left out, since a cut from a larger
file begins and ends in the middle of a story. A story is encoded as the model's start token plus its text.

calibration: stories in a seeded order; a sample begins with a story and goes on with the next ones until it is full.
evaluation: the first stories of the text, one to a row, cut at `length`, filled with -1 (not a token).
random: uniform ids, for measurements of time and memory on random weights.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

STORY_END = "<|endoftext|>"
PREFIX = "<|start_story|>"
NOT_A_TOKEN = -1


def stories(text: Path) -> list[str]:
    pieces = [piece.strip() for piece in text.read_text(encoding="utf-8").split(STORY_END)[1:-1]]
    return [piece for piece in pieces if piece]


def encode(model: Path, texts: list[str]) -> Iterator[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prefix = PREFIX if PREFIX in tokenizer.get_vocab() else tokenizer.bos_token or ""
    for text in texts:
        yield tokenizer.encode(prefix + text, add_special_tokens=False)


def calibration_ids(model: Path, text: Path, seed: int, samples: int, length: int) -> np.ndarray:
    order = stories(text)
    np.random.default_rng(seed).shuffle(order)
    encoded = encode(model, order)
    rows = []
    for _ in range(samples):
        row: list[int] = []
        while len(row) < length:
            following = next(encoded, None)
            if following is None:
                raise SystemExit(f"{text}: too short for {samples} samples of {length} tokens")
            row += following
        rows.append(row[:length])
    return np.array(rows, dtype=np.int64)


def evaluation_ids(model: Path, text: Path, samples: int, length: int) -> np.ndarray:
    chosen = stories(text)[:samples]
    if len(chosen) < samples:
        raise SystemExit(f"{text}: {len(chosen)} stories, {samples} asked for")
    ids = np.full((samples, length), NOT_A_TOKEN, dtype=np.int64)
    for row, story in zip(ids, encode(model, chosen), strict=True):
        row[: len(story)] = story[:length]
    return ids


def random_ids(vocabulary: int, seed: int, samples: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (samples, length), dtype=np.int64)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, samples, length in (("calibration", 128, 250), ("evaluation", 200, 512), ("random", 32, 512)):
        sub = kinds.add_parser(kind)
        sub.add_argument("output", type=Path)
        sub.add_argument("--samples", type=int, default=samples)
        sub.add_argument("--length", type=int, default=length)
        if kind == "random":
            sub.add_argument("--vocabulary", type=int, required=True)
        else:
            sub.add_argument("--model", type=Path, required=True)
            sub.add_argument("--text", type=Path, required=True)
        if kind != "evaluation":
            sub.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    asked = parse()
    if asked.kind == "calibration":
        ids = calibration_ids(asked.model, asked.text, asked.seed, asked.samples, asked.length)
    elif asked.kind == "evaluation":
        ids = evaluation_ids(asked.model, asked.text, asked.samples, asked.length)
    else:
        ids = random_ids(asked.vocabulary, asked.seed, asked.samples, asked.length)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": ids}, asked.output)
    print(f"{asked.output}: {ids.shape[0]} x {ids.shape[1]}, {(ids != NOT_A_TOKEN).sum()} tokens")


if __name__ == "__main__":
    main()
