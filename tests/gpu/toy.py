"""A decoder of random weights out of the runtime's operations and nothing else, for tests and benchmarks on a GPU.

Shape suffixes: T tokens, K hidden channels, H query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from compress.core.scheme import Scheme
from compress.core.tensors import QuantTensor
from runtime.ops.attention import AttentionBatch, paged_attention
from runtime.ops.kv_store import store_kv
from runtime.ops.low_bit import low_bit_matmul
from runtime.ops.norm import rms_norm
from runtime.ops.rotary import apply_rotary

DTYPE = torch.bfloat16


class Toy:
    """Llama's layer, `layers` times. `packed`: all linear weights in 4 bits, groups of 128."""

    def __init__(
        self, *, layers: int, hidden: int, heads: int, groups: int, pages: int, block: int, ffn: int = 512,
        vocabulary: int = 512, packed: bool = False,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.heads, self.groups, self.width = heads, groups, hidden // heads
        self.embedding = self._random(vocabulary, hidden)
        self.head = self._random(vocabulary, hidden)
        self.norm = self._random(hidden)
        joint = (heads + 2 * groups) * self.width
        shapes = [(joint, hidden), (hidden, heads * self.width), (2 * ffn, hidden), (hidden, ffn)]
        make = self._packed if packed else self._random
        self.layers = [[make(*shape) for shape in shapes] for _ in range(layers)]
        pool = (2, pages, block, groups, self.width)
        self.pools = [torch.zeros(pool, dtype=DTYPE, device="cuda") for _ in range(layers)]
        angle = torch.arange(self.width // 2, device="cuda") / (self.width // 2)
        self.speed = 10000.0**-angle

    def fill(self) -> None:
        """Keys and values as if all pages had been written."""
        for pool in self.pools:
            pool.copy_(self._random(*pool.shape))

    def _random(self, *shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device="cuda", dtype=DTYPE)
        return values / shape[-1] ** 0.5 if len(shape) == 2 else values

    def _packed(self, outputs: int, inputs: int) -> QuantTensor:
        codes = torch.randint(-8, 8, (outputs, inputs), generator=self.generator, device="cuda", dtype=torch.int8)
        scale = torch.full((outputs, inputs // 128), 0.2 / inputs**0.5, dtype=DTYPE, device="cuda")
        return QuantTensor.from_codes(codes, scale, None, Scheme(4, 128))

    def forward(self, ids_T: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Logits of every token."""
        angle = batch.position_T[:, None] * self.speed
        cos, sin = (torch.cat([wave, wave], -1) for wave in (angle.cos(), angle.sin()))
        x_TK = self.embedding[ids_T]
        for (joint, output, up, down), pool in zip(self.layers, self.pools, strict=True):
            y_TK = _linear(rms_norm(x_TK, self.norm, 1e-6), joint).unflatten(1, (-1, self.width))
            q_THD, k_TGD, v_TGD = y_TK.split([self.heads, self.groups, self.groups], dim=1)
            q_THD, k_TGD = apply_rotary(q_THD, k_TGD, cos, sin)
            store_kv(k_TGD, v_TGD, pool[0], pool[1], batch.slot_T)
            y_THD = paged_attention(q_THD, pool[0], pool[1], batch, scale=self.width**-0.5)
            x_TK = x_TK + _linear(y_THD.flatten(1), output)
            gate, value = _linear(rms_norm(x_TK, self.norm, 1e-6), up).chunk(2, dim=1)
            x_TK = x_TK + _linear(silu(gate) * value, down)
        return linear(rms_norm(x_TK, self.norm, 1e-6), self.head)


def _linear(x_TK: torch.Tensor, weight: torch.Tensor | QuantTensor) -> torch.Tensor:
    return low_bit_matmul(x_TK, weight) if isinstance(weight, QuantTensor) else linear(x_TK, weight)
