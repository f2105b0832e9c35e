"""Writing keys and values into the pool, in Triton. Shape suffixes as in `runtime.ops.kv_store`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.ops.pages import Pages, as_pages
from runtime.ops.triton.attention import CODINGS


def store(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, k: torch.Tensor | Pages, v: torch.Tensor | Pages, slot_T: torch.Tensor
) -> None:
    """`store_kv`."""
    k, v = as_pages(k), as_pages(v)
    if k.is_coded or v.is_coded:
        for x_TGD, pages in ((k_TGD, k), (v_TGD, v)):
            _store_one(x_TGD, pages, slot_T)
        return
    _store_both(k_TGD, v_TGD, k.codes, v.codes, slot_T)


def _store_both(k_TGD: torch.Tensor, v_TGD: torch.Tensor, k_PBGD: Tensor, v_PBGD: Tensor, slot_T: Tensor) -> None:
    k, v = k_TGD.flatten(1), v_TGD.flatten(1)  # a view, unless heads lie apart
    tokens, width = k.shape
    block = min(triton.next_power_of_2(width), 1024)
    _store[(tokens, triton.cdiv(width, block))](
        k, v, k_PBGD, v_PBGD, slot_T, k.stride(0), v.stride(0), WIDTH=width, BLOCK=block, num_warps=4
    )


def _store_one(x_TGD: torch.Tensor, pages: Pages, slot_T: torch.Tensor) -> None:
    tokens, groups, width = x_TGD.shape
    if not pages.is_coded:
        _store_both(x_TGD, x_TGD, pages.codes, pages.codes, slot_T)
        return
    x_TGD = x_TGD if x_TGD.stride(2) == 1 else x_TGD.contiguous()
    _store_codes[(tokens, groups)](
        x_TGD,
        pages.codes,
        pages.codes if pages.numbers is None else pages.numbers,
        pages.codes if pages.scale_G is None else pages.scale_G,
        slot_T,
        x_TGD.stride(0),
        x_TGD.stride(1),
        GROUPS=groups,
        WIDTH=width,
        CODING=CODINGS[pages.codec],
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_H=triton.next_power_of_2((width + 1) // 2),
        num_warps=1,
    )


@triton.jit
def _store(
    k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, slot_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (t, part): one token's part of BLOCK channels. The pool's slots lie WIDTH apart."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < WIDTH
    place = tl.load(slot_ptr + token).to(tl.int64) * WIDTH + channel
    k = tl.load(k_ptr + token * k_stride + channel, mask=real)
    v = tl.load(v_ptr + token * v_stride + channel, mask=real)
    tl.store(k_pool_ptr + place, k.to(k_pool_ptr.dtype.element_ty), mask=real)
    tl.store(v_pool_ptr + place, v.to(v_pool_ptr.dtype.element_ty), mask=real)


@triton.jit
def _rounded(x):
    """To whole numbers, ties to even; for sizes below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _half(x):
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _store_codes(
    x_ptr,
    codes_ptr,
    numbers_ptr,
    scale_ptr,
    slot_ptr,
    stride_t,
    stride_g,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODING: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (t, g): codes of one token and head, as kv_compress/_coding.py makes them."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    row = tl.load(slot_ptr + token).to(tl.int64) * GROUPS + g
    d = tl.arange(0, BLOCK_D)
    at = x_ptr + token * stride_t + g * stride_g
    x = tl.load(at + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    if CODING == 1:
        scale = _half(tl.max(tl.abs(x), 0) / 127)
        code = _rounded(x * tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale)))
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        tl.store(codes_ptr + row * WIDTH + d, code.to(tl.int8), mask=d < WIDTH)
        tl.store(numbers_ptr + row, scale.to(tl.float16))
    if CODING == 2:
        highest = tl.max(tl.where(d < WIDTH, x, float("-inf")), 0)
        lowest = tl.min(tl.where(d < WIDTH, x, float("inf")), 0)
        scale = _half((highest - lowest) / 15)
        lowest = _half(lowest)
        by = tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))
        h = tl.arange(0, BLOCK_H)
        real = h < WIDTH // 2
        low = tl.load(at + h, mask=real, other=0.0).to(tl.float32)
        high = tl.load(at + WIDTH // 2 + h, mask=real, other=0.0).to(tl.float32)
        low = tl.minimum(tl.maximum(_rounded((low - lowest) * by), 0.0), 15.0)
        high = tl.minimum(tl.maximum(_rounded((high - lowest) * by), 0.0), 15.0)
        code = low.to(tl.uint8) | (high.to(tl.uint8) << 4)
        tl.store(codes_ptr + row * (WIDTH // 2) + h, code, mask=real)
        tl.store(numbers_ptr + 2 * row, scale.to(tl.float16))
        tl.store(numbers_ptr + 2 * row + 1, lowest.to(tl.float16))
    if CODING == 3:
        x = x / tl.load(scale_ptr + g)
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        code = tl.where(size < 0.015625, _rounded(size * 512).to(tl.int32), normal)
        code = tl.where(x == x, code, 0x7F) | tl.where(x < 0, 0x80, 0)
        tl.store(codes_ptr + row * WIDTH + d, code.to(tl.uint8), mask=d < WIDTH)
