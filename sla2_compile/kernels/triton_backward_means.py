"""Block means of the real keys and values, as the tail sees them, and how many real keys each block has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import is_real, load_tile, token_of


@dataclass(frozen=True)
class Means:
    k_bar: Tensor  # (B, G, T, D) in the inputs' dtype, of the smoothed keys where keys are smoothed
    v_bar: Tensor  # (B, G, T, D) in the inputs' dtype
    n: Tensor  # (B, T) float32 real keys of each block
    k_mean: Tensor | None  # (B, G, D) float32 what smoothing subtracts


@triton.jit
def _means_kernel(
    k_ptr, v_ptr, real_ptr, order_ptr, k_bar_ptr, v_bar_ptr, n_ptr, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, real_sb,
    G, N_KV, T, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (B G T,)."""
    row = tl.program_id(0).to(tl.int64)
    b, g, j = row // T // G, row // T % G, row % T
    k_ptr += b * k_sb + g * k_sh
    v_ptr += b * v_sb + g * v_sh
    if real_ptr is not None:
        real_ptr += b * real_sb
    k_sum = tl.zeros([BLOCK_D], tl.float32)
    v_sum = tl.zeros([BLOCK_D], tl.float32)
    n = tl.zeros([], tl.float32)
    for first in tl.static_range(0, BLOCK_K, TILE):
        position = (j * BLOCK_K + first).to(tl.int32) + tl.arange(0, TILE)
        token = token_of(order_ptr, position, N_KV)
        real = is_real(real_ptr, token, position, N_KV)
        k_sum += tl.sum(load_tile(k_ptr, token, real, k_sn, D, BLOCK_D).to(tl.float32), 0)
        v_sum += tl.sum(load_tile(v_ptr, token, real, v_sn, D, BLOCK_D).to(tl.float32), 0)
        n += tl.sum(real.to(tl.float32), 0)
    d = tl.arange(0, BLOCK_D)
    share = 1 / tl.maximum(n, 1.0)
    tl.store(k_bar_ptr + row * D + d, (k_sum * share).to(k_bar_ptr.dtype.element_ty), mask=d < D)
    tl.store(v_bar_ptr + row * D + d, (v_sum * share).to(v_bar_ptr.dtype.element_ty), mask=d < D)
    if g == 0:
        tl.store(n_ptr + b * T + j, n)


def block_means(k: Tensor, v: Tensor, real: Tensor | None, order: Tensor | None, settings: Settings) -> Means:
    """Means of k, v (B, G, N_kv, D); real (B, N_kv) bool or None, order (N_kv,) int32 or None."""
    (batch, heads, kv_len, dim), T = k.shape, triton.cdiv(k.shape[2], settings.block_k)
    k_bar = k.new_empty(batch, heads, T, dim, dtype=torch.float32 if settings.smooths_keys else k.dtype)
    v_bar, n = v.new_empty(batch, heads, T, dim), k.new_empty(batch, T, dtype=torch.float32)
    _means_kernel[batch * heads * T,](
        k, v, real, order, k_bar, v_bar, n, *k.stride()[:3], *v.stride()[:3], 0 if real is None else real.stride(0),
        heads, kv_len, T, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_K=settings.block_k,
        TILE=min(settings.block_k, 64), num_warps=4,
    )  # fmt: skip
    if not settings.smooths_keys:
        return Means(k_bar, v_bar, n, None)
    weight = n[:, None, :, None]
    k_mean = (k_bar * weight).sum(2) / weight.sum(2).clamp(min=1)
    # An empty block's mean is 0 before and after smoothing; nothing reads it.
    return Means((k_bar - k_mean[:, :, None]).to(k.dtype), v_bar, n, k_mean)
