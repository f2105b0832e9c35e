"""The fingerprint: everything that decides an artifact's bytes. Equal fingerprints, equal artifacts."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import compress
from compress.core.processes import launched, launcher_shards

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Recipe

_PACKAGES = ("torch", "transformers", "numpy")


def fingerprint(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokens: Tokens | None,
    *,
    device: str,
    dtype: str,
    micro_batch: int,
    evaluates: bool,
) -> dict[str, Any]:
    """Fingerprint of a run, as plain data. Hashes the source's files (cached by the checkpoint)."""
    import torch

    from compress.core import native
    from compress.core.numerics import dtype_name, runtime_dtype
    from compress.core.walk import compute_dtype

    keeps = any(stage.kind == "kv_cache" for stage in recipe.stages)
    return (
        {
            "recipe": recipe.model_dump(mode="json"),
            "source": {
                "id": checkpoint.source.id,
                "revision": checkpoint.source.revision,
                "sha256": checkpoint.sha256(),
            },
            "tokens": tokens.sha256 if tokens else None,
            "versions": {"compress": compress.__version__, **{name: version(name) for name in _PACKAGES}},
            "machine": platform.machine(),
            "device": _device_name(device),
            "kernels": native.identity() if device == "cpu" else "torch",
            "threads": torch.get_num_threads(),
            "micro_batch": micro_batch,
            "dtype": dtype_name(compute_dtype(checkpoint, dtype, device)),
            "evaluates": evaluates,
        }
        | ({"keys_and_values": dtype_name(runtime_dtype())} if keeps else {})  # their bytes stand in the card
        | ({"processes": launched()} if launched() > 1 else {})
        | ({"fsdp": True} if launcher_shards() else {})
    )


def _device_name(device: str) -> str:
    """What decides rounding on the device: the CPU's instruction set or the GPU's model."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} {torch.backends.cpu.get_cpu_capability()}" if device == "cpu" else device
