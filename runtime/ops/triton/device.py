"""What the launchers must know about the GPU."""

from functools import cache

import torch


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter's tensors, which are on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
