"""The linear tail's gradients on the side of the queries: dq, and those of the states H, Z of each query block.

With w = phi(q) . Z and (1 - a) dO . O_l = phi(q) . dn H^T (`linear_product`) the gradients are

    numerator  dn = (1 - a) dO / w,    normaliser  dw = -linear_product / w
    dphi(q) = dn H^T + dw Z,           dH = phi(q)^T dn,    dZ = phi(q)^T dw

and of a's logit the sum of a ((1 - a) dO . O_s - linear_product) over the rows of a block; of its gain the same times
the difference of the branches' log-sum-exps.

`H` and `Z` come divided by about the number of tokens per channel, so that 16-bit gradients keep the size of dO.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_feature_map import feature_map, feature_map_gradient, to_finite
from sla2_compile.kernels.triton_backward_linear_keys import LinearConfig, linear_constants
from sla2_compile.kernels.triton_backward_loads import heads_fastest, in_elements, load_tile, store_tile, token_of
from sla2_compile.kernels.triton_backward_rows import Rows


@triton.jit
def _phi_and_normalizer(q, z_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr):
    """phi(q), Z, and 1 / w where w > 0, else 0."""
    d = tl.arange(0, BLOCK_D)
    phi = feature_map(q.to(tl.float32), D, BLOCK_D, MAP)
    z = tl.load(z_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    w = tl.sum(phi * z[None, :], 1)
    return phi, z, tl.where(w > 0, 1 / tl.where(w > 0, w, 1.0), 0.0)


@triton.jit
def _query_kernel(
    q_ptr, grad_ptr, order_ptr, states_ptr, weight_ptr, product_ptr, dq_ptr,
    q_sb, q_sh, q_sn, grad_sb, grad_sh, grad_sn, H, N, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B M H BLOCK_Q / ROWS,): dq, and linear_product."""
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    grad_sb, grad_sh, grad_sn = in_elements((grad_sb, grad_sh, grad_sn), UNIT)
    PARTS: tl.constexpr = BLOCK_Q // ROWS
    b, h, m = heads_fastest((tl.program_id(0) // PARTS).to(tl.int64), H, M)
    head = b * H + h
    row = head * M + m
    position = m * BLOCK_Q + tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    exists = position < N
    token = token_of(order_ptr, position, N)
    q = load_tile(q_ptr + b * q_sb + h * q_sh, token, exists, q_sn, D, BLOCK_D)
    states_ptr += row * (D + 1) * D
    phi, z, inverse = _phi_and_normalizer(q, states_ptr + D * D, D, BLOCK_D, MAP)
    weight = tl.load(weight_ptr + head * M * BLOCK_Q + position) * inverse
    grad_ptr += b * grad_sb + h * grad_sh
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, VALUES)
    d_phi = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.range(0, D, VALUES, num_stages=1):
        inside = (first + e < D)[None, :]
        grad_ptrs = grad_ptr + token[:, None] * grad_sn + (first + e)[None, :]
        grad = tl.load(grad_ptrs, mask=exists[:, None] & inside, other=0.0)
        h_ptrs = states_ptr + d[:, None] * D + (first + e)[None, :]
        state = tl.load(h_ptrs, mask=(d < D)[:, None] & inside, other=0.0)
        d_numerator = to_finite(weight[:, None] * grad.to(tl.float32), state.dtype)
        d_phi = tl.dot(d_numerator, tl.trans(state), d_phi, input_precision=PRECISION)
    product = tl.sum(phi * d_phi, 1)
    tl.store(product_ptr + head * M * BLOCK_Q + position, product)
    d_phi -= (product * inverse)[:, None] * z[None, :]
    dq = feature_map_gradient(q.to(tl.float32), phi, d_phi, MAP)
    store_tile(dq_ptr + (b * N * H + h) * D, token, exists, H * D, dq, D, BLOCK_D)


@triton.jit
def _state_kernel(
    q_ptr, grad_ptr, order_ptr, states_ptr, weight_ptr, product_ptr, of_sparse_ptr, log_a_ptr, difference_ptr,
    dh_ptr, dz_ptr, d_logit_ptr, d_gain_ptr, q_sb, q_sh, q_sn, grad_sb, grad_sh, grad_sn, H, N, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B M H, D / VALUES): dH (D, VALUES) and, once, dZ and the gradients of the logit and the gain.

    d_gain_ptr None: there is no gain.
    """
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    grad_sb, grad_sh, grad_sn = in_elements((grad_sb, grad_sh, grad_sn), UNIT)
    b, h, m = heads_fastest(tl.program_id(0).to(tl.int64), H, M)
    head = b * H + h
    row = head * M + m
    d, e = tl.arange(0, BLOCK_D), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    dh = tl.zeros([BLOCK_D, VALUES], tl.float32)
    dz = tl.zeros([BLOCK_D], tl.float32)
    d_logit, d_gain = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for first in tl.range(0, BLOCK_Q, ROWS, num_stages=1):
        position = m * BLOCK_Q + first + tl.arange(0, ROWS)
        exists = position < N
        token = token_of(order_ptr, position, N)
        q = load_tile(q_ptr + b * q_sb + h * q_sh, token, exists, q_sn, D, BLOCK_D)
        phi, _, inverse = _phi_and_normalizer(q, states_ptr + row * (D + 1) * D + D * D, D, BLOCK_D, MAP)
        rest = tl.load(weight_ptr + head * M * BLOCK_Q + position)
        product = tl.load(product_ptr + head * M * BLOCK_Q + position)
        a = tl.exp2(tl.load(log_a_ptr + head * M * BLOCK_Q + position))
        d_alpha = a * (rest * tl.load(of_sparse_ptr + head * M * BLOCK_Q + position) - product)
        d_logit += tl.sum(d_alpha, 0)
        if d_gain_ptr is not None:
            d_gain += tl.sum(d_alpha * tl.load(difference_ptr + head * M * BLOCK_Q + position), 0)
        weight, product = rest * inverse, product * inverse
        grad_ptrs = grad_ptr + b * grad_sb + h * grad_sh + token[:, None] * grad_sn + e[None, :]
        grad = tl.load(grad_ptrs, mask=exists[:, None] & (e < D)[None, :], other=0.0)
        d_numerator = to_finite(weight[:, None] * grad.to(tl.float32), q.dtype)
        dh = tl.dot(tl.trans(phi.to(q.dtype)), d_numerator, dh, input_precision=PRECISION)
        dz -= tl.sum(phi * product[:, None], 0)
    dh_ptrs = dh_ptr + row * D * D + d[:, None] * D + e[None, :]
    tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=(d < D)[:, None] & (e < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(dz_ptr + row * D + d, dz, mask=d < D)
        tl.store(d_logit_ptr + row, d_logit)
        if d_gain_ptr is not None:
            tl.store(d_gain_ptr + row, d_gain)


def linear_query_gradients(
    dq: Tensor,
    grad_out: Tensor,
    q: Tensor,
    states: Tensor,
    rows: Rows,
    d_logit: Tensor,
    d_gain: Tensor,
    order: Tensor | None,
    settings: Settings,
    config: LinearConfig,
    state_config: LinearConfig,
) -> tuple[Tensor, Tensor]:
    """Write dq's linear part, and the gradients of the logit and the gain.

    Args:
        dq: (B, H, N, D) contiguous, written.
        grad_out, q: (B, H, N, D), the last stride 1.
        states: (B H, M, D + 1, D) H of each query block and below it Z, in q's dtype.
        rows: the rows' statistics; `linear_product` is written.
        d_logit, d_gain: (B, H, M) float32, written anew, the gain's with row mixing.
        order: (N,) int32 visiting order, or None.
        settings: the op's.
        config, state_config: tile sizes for dq, and for the states' gradients.

    Returns:
        dH (B H, M, D, D) in q's dtype and dZ (B H, M, D) float32.
    """
    (batch, heads, q_len, dim), blocks = q.shape, states.shape[1]
    d_state = states.new_empty(batch * heads, blocks, dim, dim)
    d_normalizer = states.new_empty(batch * heads, blocks, dim, dtype=torch.float32)
    unit, strides = token_strides(q, grad_out)
    inputs = (*strides, heads, q_len, blocks)

    def constants(config: LinearConfig) -> dict[str, Any]:
        sizes = {"BLOCK_Q": settings.block_q, "ROWS": min(config.rows, settings.block_q)}
        return {**sizes, **linear_constants(q, config, settings), "UNIT": unit}

    for_queries, for_states = constants(config), constants(state_config)
    launch(
        _query_kernel, (batch * heads * blocks * (settings.block_q // for_queries["ROWS"]),),
        q, grad_out, order, states, rows.linear_weight, rows.linear_product, dq, *inputs, **for_queries,
    )  # fmt: skip
    launch(
        _state_kernel, (batch * heads * blocks, num_blocks(dim, for_states["VALUES"])),
        q, grad_out, order, states, rows.linear_weight, rows.linear_product, rows.sparse_product, rows.sparse_cap,
        rows.lse_difference, d_state, d_normalizer, d_logit,
        d_gain if settings.mixing == "row" else None, *inputs, **for_states,
    )  # fmt: skip
    return d_state, d_normalizer
