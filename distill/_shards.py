"""Shards: a model of which each process holds a part of every tensor, and so of its gradient and its moments.

A block is gathered when it is computed, and on the way back once more, and its gradients are summed into parts as soon
as they are there (ZeRO: Rajbhandari et al., 2020, arXiv:1910.02054; FSDP: Zhao et al., 2023, arXiv:2304.11277).
Embedding, final norm and head are gathered for a whole step; those of a teacher lie whole in each process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from compress.core._trim import return_freed_memory, trim_memory
from compress.core.processes import Processes
from compress.core.safetensors_layout import Entry, dtype_name, tensor_bytes

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

Held = Mapping[str, tuple[str, Tensor]]
"""By the key of a save: the name of a parameter, and what this process has of it or of its state."""


class _Step(nn.Module):
    """The outermost module: what it computes, the loss, finds the parameters outside the blocks gathered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return loss(batch)


class Shards:
    """A model in parts: process `rank` of `count` has the rank-th of as many runs of rows of each tensor. `own` are its
    parts by name, and what an optimizer moves."""

    def __init__(self, checkpoint: Checkpoint, processes: Processes, device: str) -> None:
        self._processes = processes
        return_freed_memory()
        self.model = stream(checkpoint, torch.float32, processes, device, trained=True)
        self._step = fully_shard(_Step(self.model), mesh=_mesh(processes, device))
        for module in self._step.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # all that gloo knows
        self._whole = dict(self.model.named_parameters())
        with torch.no_grad():
            self.own: dict[str, Any] = {name: value.to_local() for name, value in self._whole.items()}  # type: ignore[operator]

    def loss(self, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """The loss of a batch; all processes must ask for as many."""
        return self._step(loss, batch)

    def take_gradients(self) -> None:
        """Give the parts the gradients that are summed by now."""
        with torch.no_grad():
            for name, value in self._whole.items():
                self.own[name].grad = None if value.grad is None else value.grad.to_local()  # type: ignore[attr-defined]
                value.grad = None

    def clip(self, most: float) -> None:
        """Cut the gradient, of all processes together, to a norm."""
        gradients = [value.grad for value in self.own.values() if value.grad is not None]
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().view(1).cpu()
        self._processes.add_up([squares])
        torch._foreach_mul_(gradients, min(1.0, most / (float(squares.sqrt()) + 1e-6)))

    def part(self, value: Tensor) -> Tensor:
        """What this process has of a whole tensor."""
        parts = value.chunk(self._processes.count)
        rank = self._processes.rank
        return parts[rank].clone() if rank < len(parts) else value.new_empty(0, *value.shape[1:])

    def entries(self, held: Held) -> Iterator[Entry]:
        """Whole tensors to be written by the main process, each gathered when its turn comes; the others answer()
        meanwhile, until it is done()."""
        for key, (name, own) in held.items():
            shape = (len(self._whole[name]), *own.shape[1:])
            yield Entry(key, dtype_name(own.dtype), shape, partial(self._gathered, key, own, shape[0]))

    def _gathered(self, key: str, own: Tensor, rows: int) -> memoryview:
        self._processes.tell({"key": key}, {})
        whole = self._processes.gather(own, rows)
        return tensor_bytes(own if whole is None else whole)

    def done(self) -> None:
        """In the main process: let the others go on."""
        self._processes.tell({"key": None}, {})

    def answer(self, held: Held) -> None:
        """In the others: give what the main process asks for."""
        while (key := self._processes.hear()[0]["key"]) is not None:
            name, own = held[key]
            self._processes.gather(own, len(self._whole[name]))


def stream(checkpoint: Checkpoint, dtype: torch.dtype, processes: Processes, device: str, *, trained: bool) -> Any:
    """A model whose blocks are in parts from the beginning: one at a time is read whole. What lies outside them is
    whole, and on the device unless it is trained."""
    mesh = _mesh(processes, device)

    def settle(block: nn.Module) -> None:
        fully_shard(block.requires_grad_(trained), mesh=mesh, reshard_after_forward=True)

    model = checkpoint.stream_model(dtype, settle)
    trim_memory()
    return model.requires_grad_(trained) if trained else model.to(device)


def _mesh(processes: Processes, device: str) -> DeviceMesh:
    if device == "cpu":
        return DeviceMesh.from_group(processes.control, "cpu")
    return DeviceMesh.from_group(torch.distributed.group.WORLD, torch.device(device).type)  # type: ignore[arg-type]
