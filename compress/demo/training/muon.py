"""Muon: momentum whose update is made orthogonal, for the matrices inside the blocks.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
Legend: O rows of a weight (outputs), I its columns (inputs).
"""

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalize(update_OI: torch.Tensor) -> torch.Tensor:
    """A matrix with the singular vectors of `update_OI` and singular values near one (Newton-Schulz iteration)."""
    a, b, c = _COEFFICIENTS
    wide = update_OI if update_OI.shape[0] <= update_OI.shape[1] else update_OI.mT
    x = wide / (wide.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if wide is update_OI else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; every parameter must be a matrix."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float):
        if any(param.ndim != 2 for param in params):
            raise ValueError("Muon takes matrices only; give vectors to another optimizer")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, param: torch.nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[param]
        if "average" not in state:
            state["average"] = torch.zeros_like(param)
        average = state["average"].lerp_(param.grad, 1 - momentum)
        update = orthogonalize(param.grad.lerp(average, momentum))
        rows, columns = param.shape
        param.mul_(1 - lr * weight_decay)
        param.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)
