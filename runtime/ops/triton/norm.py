"""Root-mean-square norm in Triton, one program per row. Shape suffixes as in `runtime.ops.norm`."""

import torch
import triton
import triton.language as tl


def normalise(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
    """`rms_norm`."""
    width = x_TD.shape[-1]
    x = x_TD.reshape(-1, width)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 8)
    _normalise[(x.shape[0],)](
        x, weight_D, out, x.stride(0), eps, WIDTH=width, BLOCK=block, PLUS_ONE=plus_one, num_warps=warps
    )
    return out.view(x_TD.shape)


@triton.jit
def _normalise(
    x_ptr, weight_ptr, out_ptr, stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    real = channel < WIDTH
    stored = tl.load(x_ptr + row * stride + channel, mask=real, other=0.0)
    x = stored.to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    normal = x / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    if PLUS_ONE:
        result = normal * (1.0 + weight)
    else:
        result = normal.to(stored.dtype).to(tl.float32) * weight.to(stored.dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + channel, result.to(stored.dtype), mask=real)
