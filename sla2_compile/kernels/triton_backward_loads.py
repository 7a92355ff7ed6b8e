"""How the backward's kernels find tokens and read tiles: in visiting order, some not real, some past the end.

An `if` that is decided at compile time has its `else` here, since Triton still compiles what follows a `return`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Part of the head dimension that a step of a float32 product takes.
FLOAT32_CHUNK = tl.constexpr(16)


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Strides along B, H and N that came in units of elements (`launch_arguments.token_strides`).

    The multiplication is what tells the compiler how wide a load may be.
    """
    if UNIT == 1:
        return strides[0], strides[1], strides[2]
    else:
        wide = tl.int64
        return tl.cast(strides[0], wide) * UNIT, tl.cast(strides[1], wide) * UNIT, tl.cast(strides[2], wide) * UNIT


@triton.jit
def heads_fastest(index, num_heads, num_blocks):
    """(batch element, head, block) number `index`, int64, int64 and int32: heads vary fastest, as they do in memory."""
    return index // (num_blocks * num_heads), index % num_heads, (index // num_heads % num_blocks).to(tl.int32)


@triton.jit
def query_block(index, num_heads, M, first_exact, last_exact):
    """(head, query block) number `index`, int64 and int32; what keeps every key block comes first: it takes longest.

    Such blocks are those before `first_exact` and from `last_exact` on, of M.
    """
    num_exact = first_exact + M - last_exact
    if index < num_heads * num_exact:
        head = index // num_exact
        m = index % num_exact
        m = tl.where(m < first_exact, m, last_exact + m - first_exact)
    else:
        index -= num_heads * num_exact
        head = index // (M - num_exact)
        m = first_exact + index % (M - num_exact)
    return head.to(tl.int64), m


@triton.jit
def token_of(order_ptr, position, length):
    """The model's token at each visited `position`, int64; any token in place of one past the end."""
    if order_ptr is None:
        return position.to(tl.int64)
    else:
        return tl.load(order_ptr + position, mask=position < length, other=0).to(tl.int64)


@triton.jit
def is_real(real_ptr, token, position, length):
    """True where a key exists and is not padding; real_ptr is the batch element's (N_kv,) or None."""
    if real_ptr is None:
        return position < length
    else:
        return (tl.load(real_ptr + token, mask=position < length, other=0) != 0) & (position < length)


@triton.jit
def load_tile(ptr, token, mask, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) rows of one head; 0 where `mask` (R,), None for True, is False and past the head dimension."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + token[:, None] * stride + d[None, :]
    if mask is None and D == BLOCK_D:
        return tl.load(ptrs)
    elif mask is None:
        return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_rows(ptr, order_ptr, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) tokens of one head visited from `first` on, 0 for those from `length` on."""
    position = first + tl.arange(0, ROWS)
    return load_tile(ptr, token_of(order_ptr, position, length), position < length, stride, D, BLOCK_D)


@triton.jit
def store_tile(ptr, token, mask, stride, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows of one head where `mask` (R,) is True."""
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + token[:, None] * stride + d[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def scores_in_float32(
    q_ptr, q_token, exists, q_sn, k_ptr, k_token, inside, k_sn, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """q k^T of float32 tiles, a part of the head dimension at a time: whole ones do not fit into registers."""
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)
        q_mask, k_mask = exists[:, None] & (d < D)[None, :], inside[None, :] & (d < D)[:, None]
        q = tl.load(q_ptr + q_token[:, None] * q_sn + d[None, :], mask=q_mask, other=0.0)
        k = tl.load(k_ptr + k_token[None, :] * k_sn + d[:, None], mask=k_mask, other=0.0)
        scores = tl.dot(q, k, scores, input_precision="ieee")
    return scores
