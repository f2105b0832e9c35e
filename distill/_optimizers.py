"""AdamW with both moments in fp32, or in 8 bits by bitsandbytes; and what of its state a save holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.core.errors import EnvironmentRefused
from compress.core.lazy import quiet_bitsandbytes

if TYPE_CHECKING:
    from distill._settings import Training

BETAS = (0.9, 0.95)
SMALL = 4096  # numbers: a tensor with fewer keeps its moments in fp32
HELD = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw8bit": ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"),
}
"""What an optimizer holds of each tensor beside the number of steps, by the names that it gives it."""

_UPDATE = "bitsandbytes::optimizer_update_8bit_blockwise"


def equally(name: str) -> float:
    """The share of a learning rate where every tensor has the same."""
    return 1.0


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) over tensors by name; matrices alone decay. With moments of
    8 bits: Dettmers et al., 2022, arXiv:2110.02861. `share` of a tensor: its learning rate over that of `step`.
    EnvironmentRefused if the device has no kernel for 8 bits."""

    def __init__(
        self, settings: Training, trained: Mapping[str, Tensor], share: Callable[[str], float] = equally
    ) -> None:
        self._trained = trained
        self._held = HELD[settings.optimizer]
        matrices = [name for name, value in trained.items() if value.ndim > 1]
        others = [name for name, value in trained.items() if value.ndim <= 1]
        decays = [(matrices, settings.weight_decay), (others, 0.0)]
        groups = [
            {"params": [trained[name] for name in names if share(name) == part], "weight_decay": decay, "share": part}
            for names, decay in decays
            for part in sorted({share(name) for name in names})
        ]
        self._eight_bit = settings.optimizer == "adamw8bit"
        if self._eight_bit:
            self._inner = _eight_bit(groups, settings.learning_rate, trained[matrices[0]].device.type)
        else:
            self._inner = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS)

    def step(self, learning_rate: float) -> None:
        """Move the tensors by their gradients, and forget these."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate * group["share"]
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """What is held of a tensor, by names for a save."""
        held = self._inner.state[self._trained[name]]
        return ((key, held[short]) for key, short in zip(self.keys(name), self._held, strict=True) if short in held)

    def keys(self, name: str) -> list[str]:
        """The names for a save of what can be held of a tensor."""
        return [f"{key}.{name}" for key in self._held]

    def take_up(self, name: str, step: int, saved: Mapping[str, Tensor]) -> None:
        """Go on with what a save holds of a tensor after `step` steps."""
        value = self._trained[name]
        state: dict[str, Any] = {"step": step if self._eight_bit else torch.tensor(float(step))}
        found = {key: saved[f"{key}.{name}"] for key in self._held if f"{key}.{name}" in saved}
        self._inner.state[value] = state | {key: held.to(value.device) for key, held in found.items()}


def _eight_bit(groups: list[dict[str, Any]], learning_rate: float, device: str) -> torch.optim.Optimizer:
    quiet_bitsandbytes()
    try:
        import bitsandbytes
    except ImportError:
        raise EnvironmentRefused("optimizer adamw8bit needs bitsandbytes", hint="optimizer: adamw does not") from None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_UPDATE, device.upper()):
        raise EnvironmentRefused(
            f"the bitsandbytes that is installed has no 8-bit AdamW for the device {device}",
            hint="a newer bitsandbytes has, or train with optimizer: adamw",
        )
    return bitsandbytes.optim.AdamW8bit(groups, lr=learning_rate, betas=BETAS, min_8bit_size=SMALL)
