"""The steps of `triton_mixture.py`'s kernel: one tile of kept keys, and the linear tail."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from sla2_compile.kernels.triton_backward_feature_map import to_finite
from sla2_compile.kernels.triton_backward_loads import is_real, load_tile, scores_in_float32, token_of
from sla2_compile.kernels.triton_value_codes import in_stored_order
from sla2_compile.quant import formats

LOG2_E = tl.constexpr(1.4426950408889634)
# As in reference.py: a row of the linear tail whose weights sum to less has none.
MIN_LINEAR_WEIGHT = tl.constexpr(1e-30)
TOP_CODE = tl.constexpr(formats.TOP_CODE)
LOG2_TOP_CODE = tl.constexpr(math.log2(formats.TOP_CODE))
SMALLEST_FACTOR = tl.constexpr(1e-35)


@triton.jit
def softmax_step(
    acc, total, peak, scores, v, factor, SAFE: tl.constexpr, FP8_VALUES: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile of an online softmax in base 2; `factor` times `scores` are its logits. SAFE: a row may have no key.

    FP8_VALUES: probabilities are rounded to codes, v is codes; acc and total then are 256 times too large. Peaks are
    whole numbers, so that codes do not depend on which tiles came before.
    """
    new_peak = tl.max(scores, 1) * factor
    if FP8_VALUES:
        new_peak = tl.ceil(new_peak)
    new_peak = tl.maximum(peak, new_peak)
    base = new_peak
    if SAFE:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = tl.exp2(peak - base)
    if FP8_VALUES:
        probs = tl.exp2(scores * factor - (base - LOG2_TOP_CODE)[:, None])
        total = total * rescale + tl.sum(probs, 1)
        codes = in_stored_order(probs, probs.shape[0], probs.shape[1]).to(tl.float8e4nv)
        if probs.shape[1] < 32:
            # Fewer keys than an 8-bit instruction takes: float16 holds every code.
            codes, v = codes.to(tl.float16), v.to(tl.float16)
        # FP8 tensor cores add up with few bits: one tile at a time, the rest in float32.
        acc = acc * rescale[:, None] + tl.dot(codes, v)
    else:
        probs = tl.exp2(scores * factor - base[:, None])
        total = total * rescale + tl.sum(probs, 1)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def scores_of_codes(
    q, factor, codes_ptr, scale_ptr, block, part, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Products (ROWS, KEYS) of q's codes with part of a block of keys or means, and what makes scores of them."""
    codes_ptr += (block * BLOCK_K + part * KEYS) * D
    k = load_tile(codes_ptr, tl.arange(0, KEYS), None, D, D, BLOCK_D)
    # Two tiny scales must not make 0 of a masked score's -inf.
    return tl.dot(q, tl.trans(k)).to(tl.float32), tl.maximum(factor * tl.load(scale_ptr + block), SMALLEST_FACTOR)


@triton.jit
def value_codes(ptr, block, part, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr):
    """Part of a stored block of values or means: (KEYS, BLOCK_D) codes."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + block * D * BLOCK_K + part * KEYS + d[:, None] * BLOCK_K + tl.arange(0, KEYS)[None, :]
    return tl.trans(tl.load(ptrs) if D == BLOCK_D else tl.load(ptrs, mask=(d < D)[:, None], other=0.0))


@triton.jit
def kept_step(
    acc, total, peak, dropped, q, factor, q_ptr, q_token, exists, q_sn, k_ptr, v_ptr, k_tiles, v_tiles, k_codes_ptr,
    k_scale_ptr, v_codes_ptr, real_ptr, order_ptr, k_row, k_column, v_row, v_column, k_sn, v_sn, kv_head, j, part,
    N_KV, num_stored, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, CHECK: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part `part` of kept key block j; with CHECK some keys may not be real; with DROP scores are less by `dropped`.

    Keys and values are read through the tensor descriptors `k_tiles`, `v_tiles`, or as codes, or at their pointers,
    whichever is not None.
    """
    first_key = j * BLOCK_K + part * KEYS
    position = first_key + tl.arange(0, KEYS)
    token = token_of(order_ptr, position, N_KV)
    real = None
    if CHECK:
        real = is_real(real_ptr, token, position, N_KV)
    block = kv_head * num_stored + j
    if k_codes_ptr is not None:
        scores, factor = scores_of_codes(q, factor, k_codes_ptr, k_scale_ptr, block, part, D, BLOCK_D, BLOCK_K, KEYS)
    elif PRECISION == "ieee":
        scores = scores_in_float32(
            q_ptr, q_token, exists, q_sn, k_ptr, token, real if CHECK else position < N_KV, k_sn,
            D, BLOCK_D, ROWS, KEYS, CHUNK,
        )  # fmt: skip
    else:
        if k_tiles is not None:
            k = k_tiles.load([k_row + first_key, k_column])
        else:
            k = load_tile(k_ptr, token, real, k_sn, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if DROP:
        scores -= dropped[:, None]
    if CHECK:
        scores = tl.where(real[None, :], scores, float("-inf"))
    if v_codes_ptr is not None:
        v = value_codes(v_codes_ptr, block, part, D, BLOCK_D, BLOCK_K, KEYS)
    elif v_tiles is not None:
        v = v_tiles.load([v_row + first_key, v_column])
    else:
        v = load_tile(v_ptr, token, real, v_sn, D, BLOCK_D)
    return softmax_step(acc, total, peak, scores, v, factor, CHECK, v_codes_ptr is not None, PRECISION)


@triton.jit
def rows_times(
    vector_ptr, q_ptr, token, exists, q_sn, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """q (ROWS, D) times a vector (D,), float32, a part of the head dimension at a time for want of registers."""
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)
        inside = exists[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + token[:, None] * q_sn + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(q * tl.load(vector_ptr + d, mask=d < D, other=0.0)[None, :], 1)
    return total


@triton.jit
def _exponential(q, peak, inside, MAP: tl.constexpr):
    """phi(q) without the division that makes a softmax of it; 0 past the head dimension."""
    if MAP == "softmax":
        x = tl.exp2((q - peak[:, None]) * LOG2_E)
    elif MAP == "elu":
        x = tl.where(q > 0, q + 1, tl.exp2(tl.minimum(q, 0.0) * LOG2_E))
    else:
        x = tl.maximum(q, 0.0)
    return tl.where(inside, x, 0.0)


@triton.jit
def add_linear_tail(
    acc, rest, q_ptr, token, exists, q_sn, states_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + rest phi(q) H / (phi(q) . Z), a part of the head dimension at a time: a state does not fit beside acc."""
    peak = tl.zeros_like(rest)
    if MAP == "softmax":
        peak += float("-inf")
        for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
            d = first + tl.arange(0, CHUNK)
            inside = exists[:, None] & (d < D)[None, :]
            q = tl.load(q_ptr + token[:, None] * q_sn + d[None, :], mask=inside, other=float("-inf"))
            peak = tl.maximum(peak, tl.max(q.to(tl.float32), 1))
        peak = tl.where(exists, peak, 0.0)
    size = tl.zeros_like(rest)
    mass = tl.zeros_like(rest)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)
        inside = exists[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + token[:, None] * q_sn + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = _exponential(q, peak, inside, MAP)
        size += tl.sum(x, 1)
        mass += tl.sum(x * tl.load(states_ptr + D * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
    if MAP != "softmax":
        size = tl.zeros_like(rest) + 1.0
    rest = tl.where(mass > size * MIN_LINEAR_WEIGHT, rest / mass, 0.0)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)
        e = tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + token[:, None] * q_sn + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = _exponential(q, peak, inside, MAP) * rest[:, None]
        state = tl.load(states_ptr + d[:, None] * D + e[None, :], mask=(d < D)[:, None] & (e < D)[None, :], other=0.0)
        acc = tl.dot(to_finite(x, state.dtype), state, acc, input_precision=PRECISION)
    return acc
