"""States of the linear tail for each query block: H_i and Z_i over the key blocks that it does not keep.

One batched matmul of the 0/1 tail mask with all h_j: exact where the tail is empty, and it costs less than reading h_j
again for each kept block (0.05 TFLOP for shape (1, 12, 32760, 128)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_linear_keys import LinearConfig, key_block_states, linear_config
from sla2_compile.kernels.triton_inverse_index import tail_mask
from sla2_compile.kernels.triton_mixture import LinearStates


def linear_states(
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    n: Tensor,
    k_mean: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    shared_memory: int,
) -> LinearStates:
    """H and Z of every query block, times a common factor that brings sums over all tokens to the size of v.

    Args:
        k, v: (B, G, N_kv, D), last stride 1.
        bits: (B, H, M, W) int32 kept key blocks.
        n: (B, T) float32 real tokens of each key block.
        k_mean: (B, G, D) float32 what smoothing subtracts.
        real: (B, N_kv) bool or None.
        order: (N_kv,) int32 or None.
        settings: the op's.
        shared_memory: bytes of it that a program may use.
    """
    (batch, key_heads, kv_len, dim), (_, heads, blocks, _), T = k.shape, bits.shape, n.shape[1]
    factor = 2.0 ** -max(0, round(math.log2(kv_len / dim)))
    config = linear_config(dim, k.element_size(), shared_memory)
    if dim == 128 and k.element_size() == 2 and shared_memory >= 200 * 1024:
        # All of v at once measures fastest: phi is made once.
        config = LinearConfig(64, 128, 8)
    h, z = key_block_states(k, v, k_mean, real, order, factor, settings, config)
    mask = tail_mask(bits.flatten(0, 1), n, 1.0, k.dtype).view(batch * key_heads, -1, T)  # (B G, H / G M, T)
    state = torch.bmm(mask, h.flatten(2)).view(batch * heads, blocks, dim, dim)
    # In the full float32 of elementwise sums: matmul may run as TF32.
    normalizer = torch.bmm(mask.double(), z.double()).float().view(batch * heads, blocks, dim)
    return LinearStates(state, normalizer)
