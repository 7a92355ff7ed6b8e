"""Low-bit codes of keys, one scale for a block, after a center was subtracted from all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import heads_fastest, in_elements, is_real, load_tile, token_of
from sla2_compile.quant.formats import FP8_MAX, INT8_MAX

CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class KeyCodes:
    codes: Tensor  # (B, G, T or more, block_k, D) of the smoothed keys, 0 where a key is not real
    scale: Tensor  # (B, G, T or more) float32


@triton.jit
def to_codes(x, scale, FP8: tl.constexpr):
    """`x` divided by its scale and rounded to nearest even: float32 to int8 or FP8 e4m3.

    The quotient is the correctly rounded one, by a step of Newton's method (Markstein 1990): values of 16 bits are
    often just between two codes. Scales too small to have a reciprocal leave it a rounding error away. No scale lets
    it exceed the largest code by more than that, which rounds to the largest.
    """
    inverse = tl.minimum(tl.div_rn(1.0, scale), 1e38)
    quotient = x * inverse
    x = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    if FP8:
        return x.to(tl.float8e4nv)
    else:
        # Adding 1.5 * 2^23 leaves an integer, rounded to nearest even, in the lowest bits.
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _scale_of(largest, LIMIT: tl.constexpr):
    return tl.where(largest > 0, tl.div_rn(largest, LIMIT), 1.0)


@triton.jit
def _smoothed_keys(ptr, real_ptr, order_ptr, center, position, N_KV, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) float32 keys at visited positions (R,) of one head without their center; 0 where one is not real."""
    token = token_of(order_ptr, position, N_KV)
    real = is_real(real_ptr, token, position, N_KV)
    k = load_tile(ptr, token, real, stride, D, BLOCK_D).to(tl.float32) - center[None, :]
    return tl.where(real[:, None], k, 0.0)


@triton.jit
def write_key_codes(
    k_ptr, real_ptr, order_ptr, center, codes_ptr, scale_ptr, first_token, N_KV, k_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one block of a head's keys, ROWS at a time. LIMIT: the largest code."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    if ROWS == BLOCK_K:
        # Read once: what the scale was found in is still in registers.
        k = _smoothed_keys(k_ptr, real_ptr, order_ptr, center, first_token + place, N_KV, k_sn, D, BLOCK_D)
        scale = _scale_of(tl.max(tl.max(tl.abs(k), 1), 0), LIMIT)
        tl.store(codes_ptr + (place * D)[:, None] + d[None, :], to_codes(k, scale, FP8), (d < D)[None, :])
    else:
        largest = tl.zeros([], tl.float32)
        for first in tl.range(0, BLOCK_K, ROWS, num_stages=1):
            position = first_token + first + place
            k = _smoothed_keys(k_ptr, real_ptr, order_ptr, center, position, N_KV, k_sn, D, BLOCK_D)
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(k), 1), 0))
        scale = _scale_of(largest, LIMIT)
        for first in tl.range(0, BLOCK_K, ROWS, num_stages=1):
            position = first_token + first + place
            k = _smoothed_keys(k_ptr, real_ptr, order_ptr, center, position, N_KV, k_sn, D, BLOCK_D)
            ptrs = codes_ptr + ((first + place) * D)[:, None] + d[None, :]
            tl.store(ptrs, to_codes(k, scale, FP8), (d < D)[None, :])
    tl.store(scale_ptr, scale)


@triton.jit
def _key_codes_kernel(
    k_ptr, real_ptr, order_ptr, center_ptr, codes_ptr, scale_ptr, k_sb, k_sh, k_sn, real_sb, G, N_KV, T, num_stored,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
    LIMIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G T,): blocks of keys; heads vary fastest, as they do in memory."""
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    b, g, block = heads_fastest(tl.program_id(0).to(tl.int64), G, T)
    head = b * G + g
    row = head * num_stored + block
    if real_ptr is not None:
        real_ptr += b * real_sb
    d = tl.arange(0, BLOCK_D)
    center = tl.load(center_ptr + head * D + d, mask=d < D, other=0.0)
    write_key_codes(
        k_ptr + b * k_sb + g * k_sh, real_ptr, order_ptr, center, codes_ptr + row * BLOCK_K * D, scale_ptr + row,
        block * BLOCK_K, N_KV, k_sn, D, BLOCK_D, BLOCK_K, ROWS, FP8, LIMIT,
    )  # fmt: skip


def key_rows(block_d: int, settings: Settings) -> int:
    """Rows of a block that a program has in registers at once."""
    return min(settings.block_k, max(16, 8192 // block_d))


def empty_key_codes(k: Tensor, num_stored: int, settings: Settings) -> KeyCodes:
    """Uninitialised codes of `num_stored` blocks of k's heads, in the settings' qk_format, which is one."""
    assert settings.qk_format is not None
    (batch, heads, _, dim), dtype = k.shape, CODE_TYPES[settings.qk_format]
    codes = k.new_empty(batch, heads, num_stored, settings.block_k, dim, dtype=dtype)
    return KeyCodes(codes, k.new_empty(batch, heads, num_stored, dtype=torch.float32))


def key_codes(
    k: Tensor, center: Tensor, num_stored: int, real: Tensor | None, order: Tensor | None, settings: Settings
) -> KeyCodes:
    """Codes of k's blocks, with room for `num_stored`, in the settings' qk_format, which is one.

    Args:
        k: (B, G, N_kv, D), last stride 1.
        center: (B, G, D) float32 what smoothing subtracts.
        num_stored: blocks to have room for, at least k's.
        real: (B, N_kv) bool, True where a key is real; None: all are.
        order: (N,) int32 the model's token at each visited position; None keeps the model's order.
        settings: the op's.
    """
    (batch, heads, kv_len, dim), (unit, strides) = k.shape, token_strides(k)
    T, block_d, is_fp8 = num_blocks(kv_len, settings.block_k), padded_dim(dim), settings.qk_format == "fp8"
    found = empty_key_codes(k, num_stored, settings)
    launch(
        _key_codes_kernel, (batch * heads * T,),
        k, real, order, center, found.codes, found.scale, *strides, 0 if real is None else real.stride(0), heads,
        kv_len, T, num_stored,
        D=dim, BLOCK_D=block_d, BLOCK_K=settings.block_k, ROWS=key_rows(block_d, settings), FP8=is_fp8,
        LIMIT=FP8_MAX if is_fp8 else INT8_MAX, UNIT=unit, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return found
