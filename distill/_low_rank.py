"""Low-rank pairs (LoRA, Hu et al., 2022, arXiv:2106.09685): a weight W becomes W + (alpha / rank) B A.

Where zeros of W are to stay, the update is taken at the other places alone, in the forward, too: W + mask · B A, as in
SPP (Lu et al., 2024, arXiv:2405.16057), so that what is trained is what the merged weight will be.

Shape suffixes: O output channels, K input channels, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.core.checkpoint import Checkpoint
from compress.core.patterns import covered
from distill._patches import patch, places

if TYPE_CHECKING:
    from distill.recover import Recover


class Pair(nn.Module):
    """A and B of one matrix, and the mask that their product is taken through. B starts at zero."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, width = shape
        self.a_RK = nn.Parameter(torch.randn(rank, width, generator=generator).div_(width**0.5))
        self.b_OR = nn.Parameter(torch.zeros(rows, rank))
        self.scale = scale
        self.mask_OK: Tensor | None = None

    @torch.no_grad()
    def begin(self, a_RK: Tensor, b_OR: Tensor) -> None:
        """Start from these."""
        self.a_RK.copy_(a_RK)
        self.b_OR.copy_(b_OR)

    def forward(self, weight_OK: Tensor) -> Tensor:
        update_OK = self.b_OR @ self.a_RK * self.scale
        return weight_OK + (update_OK if self.mask_OK is None else update_OK * self.mask_OK)


class Pairs:
    """The pairs of a model, by the disk names of their layers; of a quantized one, of its quantized layers. `fused`:
    those of experts, too."""

    def __init__(self, settings: Recover, checkpoint: Checkpoint, *, fused: bool = True) -> None:
        self._settings = settings
        self._checkpoint = checkpoint
        self._fused = fused
        self.by_name: dict[str, Pair] = {}
        self._read: dict[str, Any] = {}

    def attach(self, model: Any) -> Mapping[str, nn.Parameter]:
        """Put a pair beside each layer that is asked for, and name what is to be trained."""
        generator = torch.Generator().manual_seed(self._settings.seed)
        coded = self._checkpoint.schemes
        for place in list(places(self._checkpoint, model)):
            if place.fused and not self._fused:
                continue
            own: dict[str, nn.Module] = {}
            for name, matrix_OK in place.matrices.items():
                if covered(name, self._settings.layers) and (not coded or name in coded):
                    own[name] = self.by_name[name] = self._pair(matrix_OK, generator)
            if own:
                self._read[place.path] = place, own, patch(place, own)
        return dict(self._parameters())

    def _pair(self, matrix_OK: Tensor, generator: torch.Generator) -> Pair:
        rows, width = matrix_OK.shape
        pair = Pair((rows, width), self._settings.rank, self._settings.scale, generator).to(matrix_OK.device)
        if self._checkpoint.kind == "masked":
            pair.mask_OK = matrix_OK != 0
        return pair

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, pair in self.by_name.items():
            yield from ((f"{name}.lora_A", pair.a_RK), (f"{name}.lora_B", pair.b_OR))

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The weights with their pairs, fp32 on the CPU, by disk name."""
        found = {}
        for place, own, _ in self._read.values():
            for name, matrix_OK in place.matrices.items():
                if name in own:
                    found[f"{name}.weight"] = own[name](matrix_OK).cpu()
        return found
