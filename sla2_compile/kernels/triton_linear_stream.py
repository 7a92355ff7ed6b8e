"""States of key blocks on Hopper: the copy engine fetches the next block's keys and values while one is multiplied.

The fast path of `triton_backward_linear_keys.key_block_states`, which says what the states are. For shape
(1, 12, 32760, 128) 0.2 GB are read and 0.2 GB written: 0.1 ms at 4.2 TB/s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.hardware import capability, num_multiprocessors
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps, row_tiles
from sla2_compile.kernels.triton_backward_feature_map import feature_map
from sla2_compile.kernels.triton_backward_loads import heads_fastest

# What was tuned: a state of 128 x 128 in the registers of four warps, two programs a multiprocessor.
DIM = 128
BLOCK_K = 64
PROGRAMS = 2


@triton.jit
def _stream_states_kernel(
    k_tiles, v_tiles, center_ptr, states_ptr, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns,
    G, N_KV, T, T_PADDED, num_states, factor, D: tl.constexpr, BLOCK_K: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Grid: as many programs as there is room for. Heads vary fastest, as they do in memory."""
    d = tl.arange(0, D)
    for index in tl.range(tl.program_id(0), num_states, tl.num_programs(0), num_stages=2):
        b, g, j = heads_fastest(tl.zeros([], tl.int64) + index, G, T)
        k_row, v_row = b * k_rows + g * k_head_rows + j * BLOCK_K, b * v_rows + g * v_head_rows + j * BLOCK_K
        k = k_tiles.load([k_row.to(tl.int32), (g * k_columns).to(tl.int32)]).to(tl.float32)
        v = v_tiles.load([v_row.to(tl.int32), (g * v_columns).to(tl.int32)])
        center = tl.load(center_ptr + (b * G + g) * D + d)
        real = j * BLOCK_K + tl.arange(0, BLOCK_K) < N_KV
        phi = tl.where(real[:, None], feature_map(k - center[None, :], D, D, MAP), 0.0)
        state = tl.dot(tl.trans(phi.to(v.dtype)), v)
        ptrs = states_ptr + ((b * G + g) * T_PADDED + j) * (D + 1) * D
        element: tl.constexpr = states_ptr.dtype.element_ty
        tl.store(ptrs + d[:, None] * D + d[None, :], (state * factor).to(element))
        tl.store(ptrs + D * D + d, (tl.sum(phi, 0) * factor).to(element))


def stream_states(
    states: Tensor,
    k: Tensor,
    v: Tensor,
    center: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    factor: float,
    settings: Settings,
) -> bool:
    """Write `states` and return True, or False where this kernel cannot do it; see `key_block_states`."""
    (batch, heads, kv_len, dim), T = k.shape, num_blocks(k.shape[2], settings.block_k)
    if capability(k.device)[0] != 9 or (dim, settings.block_k, k.element_size()) != (DIM, BLOCK_K, 2):
        return False
    if real is not None or order is not None or kv_len < BLOCK_K:
        return False
    k_tiles, v_tiles = row_tiles(k, BLOCK_K), row_tiles(v, BLOCK_K)
    if k_tiles is None or v_tiles is None:
        return False
    k_steps, v_steps = matrix_steps(k), matrix_steps(v)
    # Past the last key come zeros at the end of the matrix, but what others store there elsewhere: 0 times their NaN.
    if kv_len % BLOCK_K and any(rows for steps in (k_steps, v_steps) for rows in steps[:2]):
        return False
    num_states = batch * heads * T
    launch(
        _stream_states_kernel, (min(num_states, PROGRAMS * num_multiprocessors(k.device)),),
        k_tiles, v_tiles, center, states, *k_steps, *v_steps, heads, kv_len, T, states.shape[1], num_states, factor,
        D=dim, BLOCK_K=BLOCK_K, MAP=settings.feature_map, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return True
