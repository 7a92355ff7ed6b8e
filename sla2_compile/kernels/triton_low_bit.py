"""Low-bit codes of k and v, written once in visiting order for the attention kernel to read many times.

Keys: one scale per block after smoothing. Values: FP8 with one scale per channel over all keys, each block transposed,
since 8-bit tensor cores want both operands of P V contiguous along the keys. Scales are those of `quant/formats.py`.
The means that a pooled tail attends to follow as if they were more blocks of keys and values: kept keys and means then
are one stretch of tiles to a kernel. Means of values are FP8 only where keys are too (`quant/formats.py`), with the
values' scales, so that both add up in one sum.

Queries have no codes in memory: only the attention kernel reads them, once, and it rounds them itself by the scales
that `triton_statistics.py` found.

For shape (1, 12, 32760, 128) 0.2 GB are read and 0.1 GB written: 0.07 ms at 4.3 TB/s. Keys cannot be rounded in the
first pass over them, because the mean that smoothing subtracts is over all of them.
"""

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
from sla2_compile.kernels.triton_statistics import Statistics
from sla2_compile.quant.formats import FP8_MAX, INT8_MAX

CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class KeyCodes:
    codes: Tensor  # (B, G, T, block_k, D) of the smoothed keys, 0 where a key is not real
    scale: Tensor  # (B, G, T) float32


@dataclass(frozen=True)
class Codes:
    """A field is None where its format is not low-bit."""

    q_scale: Tensor | None  # (B, H, M) float32
    k: Tensor | None  # (B, G, T + S, block_k, D) codes of the smoothed keys, 0 where a key is not real
    k_scale: Tensor | None  # (B, G, T + S) float32
    v: Tensor | None  # (B, G, T + S, D, block_k) FP8 codes, keys in the order of `stored_key`
    v_scale: Tensor | None  # (B, G, D) float32
    num_stored: int  # T + S: the S blocks past the keys' T hold the means that a pooled tail attends to
    has_means_values: bool  # of v too: they are not written otherwise


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
def stored_key(place):
    """The key of a group of 16 that is stored at `place`.

    Tensor cores leave a row's scores with each thread as keys 2c, 2c + 1, 2c + 8, 2c + 9 and want its probabilities,
    in 8 bits, as keys 4c to 4c + 3. A sum over keys does not mind their order, so the values come in the scores'.
    """
    return place // 16 * 16 + place % 16 // 4 * 2 + place % 2 + place % 4 // 2 * 8


@triton.jit
def in_stored_order(probs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Columns of `probs` (ROWS, KEYS) in the order of `stored_key`; moves nothing between threads."""
    probs = tl.reshape(probs, [ROWS, KEYS // 16, 2, 4, 2])
    return tl.reshape(tl.permute(probs, (0, 1, 3, 2, 4)), [ROWS, KEYS])


@triton.jit
def _smoothed_keys(ptr, real_ptr, order_ptr, center, position, N_KV, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) float32 keys at visited positions (R,) of one head without their center; 0 where one is not real."""
    token = token_of(order_ptr, position, N_KV)
    real = is_real(real_ptr, token, position, N_KV)
    k = load_tile(ptr, token, real, stride, D, BLOCK_D).to(tl.float32) - center[None, :]
    return tl.where(real[:, None], k, 0.0)


@triton.jit
def _scale_of(largest, LIMIT: tl.constexpr):
    return tl.where(largest > 0, tl.div_rn(largest, LIMIT), 1.0)


@triton.jit
def _write_key_codes(
    k_ptr, real_ptr, order_ptr, center, codes_ptr, scale_ptr, first_token, N_KV, k_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, FP8_KEYS: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one block of a head's keys."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    if ROWS == BLOCK_K:
        # Read once: what the scale was found in is still in registers.
        k = _smoothed_keys(k_ptr, real_ptr, order_ptr, center, first_token + place, N_KV, k_sn, D, BLOCK_D)
        scale = _scale_of(tl.max(tl.max(tl.abs(k), 1), 0), LIMIT)
        tl.store(codes_ptr + (place * D)[:, None] + d[None, :], to_codes(k, scale, FP8_KEYS), (d < D)[None, :])
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
            tl.store(ptrs, to_codes(k, scale, FP8_KEYS), (d < D)[None, :])
    tl.store(scale_ptr, scale)


@triton.jit
def _write_value_codes(
    v_ptr, real_ptr, order_ptr, scale, codes_ptr, first_token, N_KV, v_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes of one block of a head's values, transposed."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    for first in tl.range(0, BLOCK_K, ROWS, num_stages=1):
        position = first_token + first + stored_key(place)
        token = token_of(order_ptr, position, N_KV)
        real = is_real(real_ptr, token, position, N_KV)
        v = load_tile(v_ptr, token, real, v_sn, D, BLOCK_D).to(tl.float32)
        ptrs = codes_ptr + (d * BLOCK_K)[:, None] + (first + place)[None, :]
        tl.store(ptrs, tl.trans(to_codes(v, scale[None, :], True)), mask=(d < D)[:, None])


@triton.jit
def _codes_kernel(
    k_ptr, v_ptr, real_ptr, order_ptr, k_mean_ptr, v_bar_ptr, n_ptr, center_ptr, v_scale_ptr, k_codes_ptr, k_scale_ptr,
    v_codes_ptr, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, real_sb, G, N_KV, T, num_stored, num_k, num_means,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, VALUE_ROWS: tl.constexpr,
    FP8_KEYS: tl.constexpr, LIMIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (num_k + num_means + num_v,): blocks of k, of means, of v; heads vary fastest, as they do in memory.

    k_codes_ptr or v_codes_ptr may be None, and what belongs to it; v_bar_ptr is where means of values get no codes.
    ROWS, VALUE_ROWS: keys and values of a step. LIMIT: the largest code of a key.
    """
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    pid = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    if pid < num_k:
        if k_codes_ptr is not None:
            b, g, block = heads_fastest(pid, G, T)
            row = (b * G + g) * num_stored + block
            if real_ptr is not None:
                real_ptr += b * real_sb
            center = tl.load(center_ptr + (b * G + g) * D + d, mask=d < D, other=0.0)
            _write_key_codes(
                k_ptr + b * k_sb + g * k_sh, real_ptr, order_ptr, center, k_codes_ptr + row * BLOCK_K * D,
                k_scale_ptr + row, block * BLOCK_K, N_KV, k_sn, D, BLOCK_D, BLOCK_K, ROWS, FP8_KEYS, LIMIT,
            )  # fmt: skip
    elif pid < num_k + num_means:
        if k_codes_ptr is not None:
            b, g, block = heads_fastest(pid - num_k, G, num_stored - T)
            head = b * G + g
            row = head * num_stored + T + block
            center = tl.load(center_ptr + head * D + d, mask=d < D, other=0.0)
            # The mean of an empty block is not 0 after smoothing, and must not reach the scale: it is no real key.
            _write_key_codes(
                k_mean_ptr + head * T * D, n_ptr + b * T, None, center, k_codes_ptr + row * BLOCK_K * D,
                k_scale_ptr + row, block * BLOCK_K, T, D, D, BLOCK_D, BLOCK_K, ROWS, FP8_KEYS, LIMIT,
            )  # fmt: skip
            if v_bar_ptr is not None:
                v_scale = tl.load(v_scale_ptr + head * D + d, mask=d < D, other=1.0)
                _write_value_codes(
                    v_bar_ptr + head * T * D, None, None, v_scale, v_codes_ptr + row * D * BLOCK_K, block * BLOCK_K, T,
                    D, D, BLOCK_D, BLOCK_K, VALUE_ROWS,
                )  # fmt: skip
    else:
        if v_codes_ptr is not None:
            b, g, block = heads_fastest(pid - num_k - num_means, G, T)
            row = (b * G + g) * num_stored + block
            if real_ptr is not None:
                real_ptr += b * real_sb
            v_scale = tl.load(v_scale_ptr + (b * G + g) * D + d, mask=d < D, other=1.0)
            _write_value_codes(
                v_ptr + b * v_sb + g * v_sh, real_ptr, order_ptr, v_scale, v_codes_ptr + row * D * BLOCK_K,
                block * BLOCK_K, N_KV, v_sn, D, BLOCK_D, BLOCK_K, VALUE_ROWS,
            )  # fmt: skip


def low_bit_codes(
    k: Tensor,
    v: Tensor,
    statistics: Statistics,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    *,
    with_means: bool,
    of_keys: KeyCodes | None = None,
) -> Codes:
    """Codes of k and v (B, G, N_kv, D), last stride 1, in the settings' formats; without one nothing is launched.

    with_means: of their blocks' means too, of values only where they are rounded. They are rounded once, from float32.
    of_keys: codes that there are already, without means.
    """
    (batch, heads, _, dim), T = k.shape, statistics.n.shape[1]
    with_means = with_means and settings.qk_format is not None
    num_stored = T + (num_blocks(T, settings.block_k) if with_means else 0)
    k_codes = k_scale = v_codes = None
    if settings.qk_format is not None and of_keys is None:
        k_codes = k.new_empty(batch, heads, num_stored, settings.block_k, dim, dtype=CODE_TYPES[settings.qk_format])
        k_scale = k.new_empty(batch, heads, num_stored, dtype=torch.float32)
    if settings.pv_format is not None:
        v_codes = v.new_empty(batch, heads, num_stored, dim, settings.block_k, dtype=CODE_TYPES[settings.pv_format])
    means_values = with_means and settings.rounds_means_values
    num_k, num_v = (batch * heads * T if codes is not None else 0 for codes in (k_codes, v_codes))
    num_means = batch * heads * (num_stored - T) if num_k else 0
    # A launch each: more programs of one share a multiprocessor than of all, which take the registers of the largest.
    parts = ((num_k, 0, 0), (0, num_means, 0), (0, 0, num_v))
    for of_k, of_means, of_v in (part for part in parts if any(part)):
        (unit, strides), fp8_keys, block_d = token_strides(k, v), settings.qk_format == "fp8", padded_dim(dim)
        of_v_bar = means_values and of_means > 0
        launch(
            _codes_kernel, (of_k + of_means + of_v,),
            k, v, real, order, statistics.k_mean, statistics.v_bar if of_v_bar else None, statistics.n,
            statistics.center, statistics.v_scale, None if of_v else k_codes, None if of_v else k_scale,
            v_codes if of_v or of_v_bar else None, *strides, 0 if real is None else real.stride(0), heads, k.shape[2],
            T, num_stored, of_k, of_means,
            D=dim, BLOCK_D=block_d, BLOCK_K=settings.block_k, ROWS=min(settings.block_k, max(16, 8192 // block_d)),
            VALUE_ROWS=min(settings.block_k, max(16, 4096 // block_d)), FP8_KEYS=fp8_keys,
            LIMIT=FP8_MAX if fp8_keys else INT8_MAX, UNIT=unit, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    if of_keys is not None:
        k_codes, k_scale = of_keys.codes, of_keys.scale
    return Codes(
        statistics.q_scale, k_codes, k_scale, v_codes, statistics.v_scale, num_stored, means_values
    )  # fmt: skip
