"""A mixture of experts with one linear layer per matrix, so that each is a site with its own inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compress.core.architectures import Experts


class UnfusedExperts(nn.Module):
    """The same maths as the fused experts of transformers (3-D parameters), under the names that files use.

    While expert e runs, `rows` are the rows of the flattened input that were routed to it, and `shares` the weights
    that its outputs get: hooks on its layers use them to tell padding from tokens, and what an expert matters.
    """

    rows: Tensor | None = None
    shares: Tensor | None = None

    def __init__(self, count: int, width: int, inner: int, activation: nn.Module, names: Experts) -> None:
        super().__init__()
        self.names = (names.gate, names.up, names.down)
        self.activation = activation
        for index in range(count):
            expert = nn.Module()
            expert.add_module(names.gate, nn.Linear(width, inner, bias=False, device="meta"))
            expert.add_module(names.up, nn.Linear(width, inner, bias=False, device="meta"))
            expert.add_module(names.down, nn.Linear(inner, width, bias=False, device="meta"))
            self.add_module(str(index), expert)

    @classmethod
    def like(cls, fused: nn.Module, names: Experts) -> UnfusedExperts:
        """Empty experts of the sizes of a fused module (gate_up_proj [experts, 2·inner, width])."""
        count, double, width = fused.get_parameter("gate_up_proj").shape
        return cls(count, width, double // 2, fused.get_submodule("act_fn"), names)

    def forward(self, x_ND: Tensor, choice_NA: Tensor, share_NA: Tensor) -> Tensor:
        """`choice_NA`: the experts of each token, `share_NA`: their weights."""
        out_ND = torch.zeros_like(x_ND)
        for index, expert in self.named_children():
            if index == "activation":
                continue
            rows, place = torch.where(choice_NA == int(index))
            if len(rows):
                self.rows, self.shares = rows, share_NA[rows, place]
                y_RD = self._run(expert, x_ND[rows]) * self.shares[:, None]
                out_ND = out_ND.index_add(0, rows, y_RD.to(out_ND.dtype))
        self.rows = self.shares = None
        return out_ND

    def _run(self, expert: nn.Module, x_RD: Tensor) -> Tensor:
        gate, up, down = (expert.get_submodule(name) for name in self.names)
        return down(self.activation(gate(x_RD)) * up(x_RD))


def unfused(name: str, value: Tensor, names: Experts | None) -> Iterator[tuple[str, Tensor]]:
    """A parameter of a block as it is, by its path; if it is a fused one of experts, each one's matrices as views."""
    if names is None or not name.startswith(f"{names.module}."):
        yield name, value
        return
    for index, expert in enumerate(value):
        path = f"{names.on_disk}.{index}"
        if name.endswith(".down_proj"):
            yield f"{path}.{names.down}.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield from ((f"{path}.{names.gate}.weight", gate), (f"{path}.{names.up}.weight", up))
