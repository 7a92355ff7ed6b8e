"""States of the linear tail for each query block: H_i and Z_i over the key blocks that it does not keep.

Both are one batched matmul of the 0/1 tail mask with all h_j and z_j: exact where the tail is empty, and it costs less
than reading h_j again for each kept block (0.05 TFLOP for shape (1, 12, 32760, 128)). On Hopper states may
be FP8 (`gluon_tail_sums.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sla2_compile.kernels import gluon_states, gluon_tail_sums
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_linear_keys import key_block_states, padded_key_blocks, states_config
from sla2_compile.kernels.triton_key_codes import KeyCodes


@triton.jit
def _tail_mask_kernel(bits_ptr, n_ptr, mask_ptr, value, HM, T, W, T_PADDED, KEYS: tl.constexpr):
    """Grid (B H M,): `value` where a key block is in a query block's tail, else 0. HM: query blocks of a batch."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, T_PADDED, KEYS):
        j = first + tl.arange(0, KEYS)
        words = tl.load(bits_ptr + row * W + (j >> 5), mask=j < T, other=-1)
        n = tl.load(n_ptr + row // HM * T + j, mask=j < T, other=0.0)
        mask = tl.where(((words >> (j & 31)) & 1 == 0) & (n > 0), value, 0.0)
        tl.store(mask_ptr + row * T_PADDED + j, mask.to(mask_ptr.dtype.element_ty), mask=j < T_PADDED)


def tail_mask(bits: Tensor, n: Tensor, value: float, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Which key blocks a query block's tail holds.

    Args:
        bits: (B, H, M, W) int32 kept key blocks.
        n: (B, T) float32 real tokens of each key block.
        value: a power of two that stands for True.
        key_heads: G.
        dtype: of the mask.

    Returns:
        (B G, H / G M, `padded_key_blocks` of T): `value` where the query block does not keep the key block and that is
        not empty, else 0.
    """
    (batch, heads, blocks, words), T = bits.shape, n.shape[1]
    mask = n.new_empty(batch * key_heads, heads // key_heads * blocks, padded_key_blocks(T), dtype=dtype)
    launch(
        _tail_mask_kernel, (batch * heads * blocks,), bits, n, mask, value, heads * blocks, T, words, mask.shape[2],
        KEYS=512, num_warps=2,
    )  # fmt: skip
    return mask


def tail_states(mask: Tensor, states: Tensor) -> Tensor:
    """Sums of states (B G, padded T, D + 1, D) where the mask is not 0, times it: (B G, H / G M, D + 1, D)."""
    return torch.bmm(mask, states.flatten(2)).unflatten(2, states.shape[2:])


@dataclass(frozen=True)
class LinearTail:
    states: Tensor  # (B H, M, D + 1, D) in k's dtype: H of every query block, and Z as its last row
    key_codes: KeyCodes | None = None  # made on the way
    v_scale: Tensor | None = None  # (B, G, D) float32 what a code of v stands for, likewise


def fp8_tiles(
    q: Tensor, k: Tensor, v: Tensor, slots: int, real: Tensor | None, order: Tensor | None, settings: Settings
) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Descriptors of k and v where `linear_states` uses FP8: on Hopper, where something else does and keys are low-bit.

    slots: key blocks that a query block keeps.
    """
    # Where all else has 16 bits or INT8's seven, FP8's four would be what is seen of the error.
    if settings.qk_format is None or "fp8" not in (settings.qk_format, settings.pv_format):
        return None
    if settings.feature_map != "softmax":
        return None
    T = num_blocks(k.shape[2], settings.block_k)
    rows = q.shape[1] // k.shape[1] * num_blocks(q.shape[2], settings.block_q)
    fits = gluon_tail_sums.can_sum(slots, T, padded_key_blocks(T), rows, k.device)
    return gluon_states.tiles_of(k, v, real, order, settings) if fits else None


def linear_states(
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    n: Tensor,
    center: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    shared_memory: int,
    *,
    in_fp8: tuple[TensorDescriptor, TensorDescriptor] | None = None,
    copy_engine: bool = True,
) -> LinearTail:
    """H and Z of every query block, times a common factor that brings sums over all tokens to the size of v.

    Args:
        k, v: (B, G, N_kv, D), last stride 1.
        bits: (B, H, M, W) int32 kept key blocks.
        n: (B, T) float32 real tokens of each key block.
        center: (B, G, D) float32 what smoothing subtracts.
        real: (B, N_kv) bool or None.
        order: (N_kv,) int32 or None.
        settings: the op's.
        shared_memory: bytes of it that a program may use.
        in_fp8: what `fp8_tiles` says; codes of keys, and with low-bit values their scales, come along then.
        copy_engine: whether tensor descriptors may be used.
    """
    (key_heads, kv_len, dim), (batch, heads, blocks, _) = k.shape[1:], bits.shape
    factor = 2.0 ** -max(0, round(math.log2(kv_len / dim)))
    if in_fp8 is not None:
        padded, scales_values = padded_key_blocks(n.shape[1]), settings.pv_format is not None
        found = gluon_states.fp8_states(in_fp8, k, v, center, padded, factor, settings, scales_values=scales_values)
        return LinearTail(gluon_tail_sums.tail_states(found, bits), found.key_codes, found.v_scale)
    config = states_config(dim, k.element_size(), shared_memory)
    states = key_block_states(k, v, center, real, order, factor, settings, config, copy_engine=copy_engine)
    mask = tail_mask(bits, n, 1.0, key_heads, k.dtype)
    return LinearTail(tail_states(mask, states).view(batch * heads, blocks, dim + 1, dim))
