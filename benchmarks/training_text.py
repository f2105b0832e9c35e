"""The text that benchmarks train on: stories a and c, packed into rows, in a random order."""

from pathlib import Path

import numpy as np
from make_tokens import encode, stories
from quality import Workplace
from safetensors.numpy import save_file

LENGTH = 250
LOOKED_AT = 128  # the first rows, by which stages before training choose and round weights
TEXTS = ("tinystories-a.txt", "tinystories-c.txt")
PIECE = 1000  # characters of a text without separators that are encoded at once


def training_text(place: Workplace, model: str) -> Path:
    """A token file for a model, made once."""
    path = place.root / model / "training.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": packed_rows(place, model)}, path)
    return path


def packed_rows(place: Workplace, model: str) -> np.ndarray:
    """All there is of the texts."""
    pieces: list[str] = []
    for name in TEXTS:
        path = place.data / "text" / name
        whole = path.read_text(encoding="utf-8")
        pieces += stories(path) or [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
    ids = [token for encoded in encode(place.model(model), pieces) for token in encoded]
    rows = np.array(ids[: len(ids) // LENGTH * LENGTH], dtype=np.int64).reshape(-1, LENGTH)
    return np.random.default_rng(0).permutation(rows)
