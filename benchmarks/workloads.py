"""What the contestants of throughput.py are asked to do: the same requests for everyone."""

import zlib

import numpy as np

LONGEST = 256  # tokens of the longest request, prompt and completion together, but for prefill's
NAMES = ("many", "stream", "decode-1", "decode-8", "decode-16", "prefill")

Request = tuple[list[int], int]  # prompt, tokens to generate


def requests_of(workload: str, vocabulary: int) -> list[Request]:
    """The requests of a workload, drawn for each workload anew: no prompt begins like another."""
    draw = np.random.default_rng(zlib.crc32(workload.encode()))

    def prompt(length: int) -> list[int]:
        return draw.integers(3, vocabulary, length).tolist()

    if workload == "many":
        return skewed(64, draw, vocabulary)
    if workload == "stream":
        return [(prompt(32), 64)]
    if workload == "prefill":
        return [(prompt(256), 1)]
    return [(prompt(16), 32) for _ in range(int(workload.removeprefix("decode-")))]


def skewed(requests: int, draw: np.random.Generator, vocabulary: int, mean_tokens: int = 24) -> list[Request]:
    """Prompts of 8 to 48 tokens; outputs of exponential length, at least 1 and at most 160."""
    wanted = np.clip(draw.exponential(mean_tokens, requests).round(), 1, 160).astype(int)
    lengths = draw.integers(8, 49, requests)
    return [
        (draw.integers(3, vocabulary, length).tolist(), int(tokens))
        for length, tokens in zip(lengths, wanted, strict=True)
    ]


def tokens_of(requests: list[Request]) -> int:
    """Tokens that they generate in all."""
    return sum(tokens for _, tokens in requests)
