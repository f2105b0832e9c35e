"""What the plan of uncalibrated rounding counts is what rounding takes, a piece of a layer at a time."""

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from compress.core.checkpoint import Checkpoint
from compress.core.memory import CODES_BYTES, IMPORT_SECONDS, ROUNDING_BYTES, estimate
from compress.core.scheme import Scheme
from quantize._rounding import round_site

STATUS = Path("/proc/self/status")


def held_bytes() -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))


class Layer:
    """As much of a site as rounding asks for."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.name, self.shape = weight, "layer", tuple(weight.shape)

    def rows(self, rows: slice) -> torch.Tensor:
        return self.weight[rows].clone()

    def replace(self, tensor: object) -> None:
        self.tensor = tensor

    def note(self, **_: object) -> None:
        pass


def growth_of_rounding(scheme: Scheme) -> int:
    """Most bytes that rounding one layer of 8192 x 2048 adds to what this process holds."""
    weight = torch.randn(8192, 2048, generator=torch.Generator().manual_seed(0))
    done, seen = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], held_bytes())
            time.sleep(0.001)

    round_site(Layer(weight[:64]), scheme, torch.bfloat16, "mse")  # what is loaded once
    before = held_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    round_site(Layer(weight), scheme, torch.bfloat16, "mse")
    done.set()
    watcher.join()
    return seen[0] - before


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(8, 128)], ids=["w4", "w8"])
def test_rounding_one_layer_stays_within_the_plan(scheme: Scheme) -> None:
    """In a process of its own: what other tests freed and malloc kept would count, or be used again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        growth = alone.submit(growth_of_rounding, scheme).result()
    weights = 8192 * 2048
    assert weights / 2 < growth < 1.1 * (ROUNDING_BYTES + CODES_BYTES * weights)


def test_a_plan_without_tokens_counts_the_imports(tiny_model) -> None:
    cost = estimate(Checkpoint.open(tiny_model("llama")), None)
    assert cost.minutes * 60 > IMPORT_SECONDS
    assert cost.spill_bytes == 0
