"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), halves rotated against each other as in GPT-NeoX.

Shape suffixes: T tokens, H query heads, G key-value heads, N either, D head width, R rotated width (R <= D).
"""

import torch

from runtime.native import rotary as native
from runtime.ops.backend import uses_native, uses_triton


def apply_rotary(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of q and k, in their dtypes; computed in the wider of theirs and cos' dtype.

    cos and sin hold each angle twice: once for either half of the first R channels. Channels past R stay as they are.
    """
    if uses_triton(q_THD):
        from runtime.ops.triton.rotary import rotate_both

        return rotate_both(q_THD, k_TGD, cos_TR, sin_TR)
    if uses_native(q_THD) and native.takes(q_THD, k_TGD, cos_TR, sin_TR):
        return native.rotate_both(q_THD, k_TGD, cos_TR, sin_TR)
    return rotate_reference(q_THD, cos_TR, sin_TR), rotate_reference(k_TGD, cos_TR, sin_TR)


def rotate_reference(x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """`apply_rotary` of one tensor, in torch."""
    width = cos_TR.shape[-1]
    rotated, rest = x_TND[..., :width], x_TND[..., width:]
    low, high = rotated.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    result = (rotated * cos_TR[:, None] + turned * sin_TR[:, None]).to(x_TND.dtype)
    return result if rest.shape[-1] == 0 else torch.cat([result, rest], dim=-1)
