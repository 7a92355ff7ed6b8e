"""The router on the GPU: float32 scores of block means, and the best key blocks of each query block.

Deterministic: equal scores go to the lower index. Twin: `blocked_routing.route`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.settings import Settings


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, proj_ptr, scores_ptr, H, GROUP, M, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (B H, M / ROWS, T / KEYS): scale * q_bar proj k_bar^T."""
    head = tl.program_id(0).to(tl.int64)
    kv_head = head // H * (H // GROUP) + head % H // GROUP
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + (head * M + m)[:, None] * D + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
    k = tl.load(
        k_ptr + (kv_head * T + t)[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
    )
    if proj_ptr is not None:
        inside = (d < D)[:, None] & (d < D)[None, :]
        proj = tl.load(proj_ptr + d[:, None] * D + d[None, :], mask=inside, other=0.0)
        q = tl.dot(q, proj, input_precision="tf32x3")
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    tl.store(scores_ptr + (head * M + m)[:, None] * T + t[None, :], scores, mask=(m < M)[:, None] & (t < T)[None, :])


@triton.jit
def _choose_kernel(
    scores_ptr, n_ptr, kept_ptr, bits_ptr, H, M, T, slots, words, first_key, last_key, first_row, last_row,
    BLOCK_T: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (B H M,): count and ascending indices of the chosen key blocks, and the same as a bit mask.

    Key blocks before `first_key` and from `last_key` on are always chosen; query blocks before `first_row` and from
    `last_row` on keep all.
    """
    row = tl.program_id(0).to(tl.int64)
    m = (row % M).to(tl.int32)
    t = tl.arange(0, BLOCK_T)
    exists = t < T
    score = tl.load(scores_ptr + row * T + t, mask=exists, other=0.0) + 0.0  # turns -0.0 into 0.0
    real = tl.load(n_ptr + row // (H * M) * T + t, mask=exists, other=0.0) > 0
    # Unsigned integers in the order of the floats. Exact blocks come first, empty ones last, padding never.
    code = score.to(tl.int32, bitcast=True)
    code = tl.where(code < 0, ~code, code ^ -2147483648).to(tl.uint32, bitcast=True)
    code = tl.where(real, tl.minimum(tl.maximum(code, 2), 0xFFFFFFFE), 1)
    code = tl.where((t < first_key) | (t >= last_key), 0xFFFFFFFF, code)
    code = tl.where(exists, code, 0).to(tl.uint32)
    # The code of the slots-th best, bit by bit from the highest.
    threshold = tl.zeros([], tl.uint32)
    for i in tl.static_range(32):
        candidate = threshold | (1 << (31 - i))
        enough = tl.sum((code >= candidate).to(tl.int32), 0) >= slots
        threshold = tl.where(enough, candidate, threshold).to(tl.uint32)
    better, equal = code > threshold, (code == threshold) & exists
    places = slots - tl.sum(better.to(tl.int32), 0)
    chosen = better | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= places))
    chosen = chosen & real
    count = tl.sum(chosen.to(tl.int32), 0)

    keeps_all = (m < first_row) | (m >= last_row)
    kept_ptr += row * (1 + slots)
    tl.store(kept_ptr, tl.where(keeps_all, T, count))
    tl.store(kept_ptr + tl.cumsum(chosen.to(tl.int32), 0), t, mask=chosen)
    slot = tl.arange(0, SLOTS)
    tl.store(kept_ptr + 1 + slot, tl.zeros([SLOTS], tl.int32), mask=(slot >= count) & (slot < slots))
    bit = ((chosen | keeps_all) & exists).to(tl.int32) << (t & 31)
    word = tl.arange(0, BLOCK_T // 32)
    tl.store(bits_ptr + row * words + word, tl.sum(tl.reshape(bit, [BLOCK_T // 32, 32]), 1), mask=word < words)


def route(
    q_bar: Tensor,
    k_bar: Tensor,
    n: Tensor,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    kept: Tensor,
    q_len: int,
    kv_len: int,
    settings: Settings,
) -> Tensor:
    """Choose the key blocks of each query block.

    Args:
        q_bar: (B, H, M, D) float32 block means.
        k_bar: (B, G, T, D) float32 block means; smoothing them changes nothing.
        n: (B, T) real tokens of each key block.
        proj_q, proj_k: (D, D) or None for the identity.
        kept: (B, H, M, 1 + slots) int32, written as `settings.empty_saved` describes.
        q_len, kv_len: tokens.
        settings: the op's.

    Returns:
        (B, H, M, W) int32: bit j % 32 of word j // 32 is set where the query block keeps key block j.
    """
    (batch, heads, rows, dim), (_, key_heads, total, _) = q_bar.shape, k_bar.shape
    scores = q_bar.new_empty(batch, heads, rows, total)
    proj = None
    if proj_q is not None and proj_k is not None:
        # (q proj_q^T)(k proj_k^T)^T = q (proj_q^T proj_k) k^T; in float64 because matmul may run as TF32.
        proj = (proj_q.double().mT @ proj_k.double()).float().contiguous()
    block_d = max(16, triton.next_power_of_2(dim))
    tile = 64 if block_d <= 128 else 32
    _scores_kernel[batch * heads, triton.cdiv(rows, tile), triton.cdiv(total, tile)](
        q_bar, k_bar, proj, scores, heads, heads // key_heads, rows, total, settings.scale,
        D=dim, BLOCK_D=block_d, ROWS=tile, KEYS=tile, num_warps=4,
    )  # fmt: skip
    words = triton.cdiv(total, 32)
    bits = torch.empty(batch, heads, rows, words, dtype=torch.int32, device=q_bar.device)
    keys, queries = settings.exact_keys(kv_len), settings.exact_queries(q_len, kv_len)
    block_t, slots = max(64, triton.next_power_of_2(total)), kept.shape[3] - 1
    _choose_kernel[batch * heads * rows,](
        scores, n, kept, bits, heads, rows, total, slots, words, keys.num_first, keys.last_start,
        queries.num_first, queries.last_start, BLOCK_T=block_t, SLOTS=triton.next_power_of_2(slots),
        num_warps=min(8, max(1, block_t // 512)),
    )  # fmt: skip
    return bits
