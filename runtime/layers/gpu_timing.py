"""How long a layer takes on a GPU, as the runtime calls it: a few rows from a captured graph, many without one.

Shape suffixes: M rows, K input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

GRAPH_ROWS = 128  # decodes of so many sequences are captured at most (runtime.graphs)
_WARM_UP = 3
_CACHE_BYTES = 256 << 20  # more than any L2: weights come from memory, as in a whole model


@torch.inference_mode()
def layer_milliseconds(layer: nn.Module, x_MK: Tensor) -> float:
    """Of a forward. RuntimeError if it cannot be captured."""
    return milliseconds(_captured(layer, x_MK) if len(x_MK) <= GRAPH_ROWS else lambda: layer(x_MK), x_MK.device)


def milliseconds(run: Callable[[], object], device: torch.device | str = "cuda", *, repeats: int = 9) -> float:
    """Median time of `run` on the GPU, each with a cold cache."""
    flush = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    for _ in range(_WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _captured(layer: nn.Module, x_MK: Tensor) -> Callable[[], object]:
    stream = torch.cuda.Stream(x_MK.device)
    stream.wait_stream(torch.cuda.current_stream(x_MK.device))
    with torch.cuda.stream(stream):  # libraries are loaded and memory is found outside the capture
        for _ in range(2):
            layer(x_MK)
    torch.cuda.current_stream(x_MK.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x_MK)
    return graph.replay
