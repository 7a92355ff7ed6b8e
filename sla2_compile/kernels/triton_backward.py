"""Gradients of SLA2 attention on CUDA; the formulas are those of its twin, `blocked_backward.py`.

In order: means of the key blocks, statistics of the rows, the inverse of `kept`; a linear tail's part of dq, dk and dv
(its sums over blocks not kept are two batched matmuls with the 0/1 tail mask); the pooled tail's part of the means'
gradients; then q's kernel and k and v's, which add the kept keys and write the results. No sum depends on the order in
which programs run. Extra memory: the statistics, the index, sums of parts of long lists (at most half of k and v in
size), and for a linear tail two states (D, D) per query or key block at a time.

On Hopper, in 16 bit and without mask or token order, q's kernel, k and v's and the pooled tail's are in Gluon
(`gluon_backward_*.py`); a launcher there says whether it has done it.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from sla2_compile.kernels import blocked_backward, gluon_backward_keys, gluon_backward_queries, gluon_backward_tail
from sla2_compile.kernels.hardware import shared_memory
from sla2_compile.kernels.settings import Settings, empty_output, row_gain
from sla2_compile.kernels.triton_backward_keys import key_gradients, keys_config
from sla2_compile.kernels.triton_backward_linear_keys import (
    LinearConfig,
    key_block_states,
    linear_config,
    linear_key_gradients,
    states_config,
)
from sla2_compile.kernels.triton_backward_linear_queries import linear_query_gradients
from sla2_compile.kernels.triton_backward_queries import queries_config, query_gradient
from sla2_compile.kernels.triton_backward_rows import Rows, finds_mixing_anew, mixing_gradients, row_statistics
from sla2_compile.kernels.triton_backward_tail import tail_config, tail_gradient
from sla2_compile.kernels.triton_inverse_index import InverseIndex, inverse_index
from sla2_compile.kernels.triton_linear_state import tail_mask, tail_states
from sla2_compile.kernels.triton_statistics import Statistics, block_statistics
from sla2_compile.kernels.triton_token_order import visiting_order


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    out: Tensor,
    sparse_out: Tensor,
    sparse_lse: Tensor,
    tail_lse: Tensor,
    kept: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v; per batch element d logit (B, H, M) and d gain (B, H).

    Args:
        grad_out, q, out, sparse_out: (B, H, N, D) float32, float16 or bfloat16.
        k, v: (B, G, N_kv, D).
        attn_mask: (B or 1, 1, 1, N_kv) bool, or None.
        alpha_logit: (H, M) or None.
        alpha_gain: (H,), None for 1 or for block mixing.
        sparse_lse, tail_lse: (B, H, N) float32.
        kept: (B, H, M, 1 + slots) int32; see `settings.empty_saved`.
        settings: the op's.
    """
    if settings.scale <= 0:
        # Nobody's attention has such a scale, and the sums below are divided by it.
        arguments = (grad_out, q, k, v, attn_mask, alpha_logit, alpha_gain, out, sparse_out, sparse_lse, tail_lse, kept)
        return blocked_backward.backward(*arguments, settings)
    dq, dk, dv = empty_output(q), empty_output(k), empty_output(v)
    batch, heads, q_len, dim = q.shape
    if q.numel() == 0 or k.shape[2] == 0:
        d_logit = q.new_zeros(kept.shape[:3], dtype=torch.float32)
        return dq.zero_(), dk.zero_(), dv.zero_(), d_logit, d_logit.sum(2)
    alpha_gain = row_gain(q, alpha_gain, settings)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        # Only tensors no model makes, such as a scalar's expanded gradient, have another stride along D than 1.
        grad_out, q, k, v, out, sparse_out = (
            x if x.stride(3) == 1 else x.contiguous() for x in (grad_out, q, k, v, out, sparse_out)
        )
        order = visiting_order(settings, k.shape[2], q.device)
        real = None if attn_mask is None else attn_mask.expand(batch, 1, 1, k.shape[2])[:, 0, 0]
        real = real if real is None or real.stride(1) == 1 else real.contiguous()

        pooled = settings.tail == "pooled"
        means = block_statistics(None, k, v, real, order, settings, needs_v_bar=pooled, smooth_k_bar=True)
        T, group = means.n.shape[1], heads // k.shape[1]
        num_nonempty = None if real is None else (means.n > 0).sum(1, dtype=torch.int32)
        rows, d_logit, d_gain = row_statistics(
            grad_out, q, out, sparse_out, sparse_lse, tail_lse, kept, alpha_logit, alpha_gain, means.center,
            num_nonempty, order, T, group, settings,
        )  # fmt: skip
        index = inverse_index(kept, k.shape[1], q_len, k.shape[2], settings)
        hardware = (dim, q.element_size(), shared_memory(q.device))
        has_tail = kept.shape[3] - 1 < T
        correction = dk_bar = dv_bar = None
        if has_tail and not pooled:
            config = linear_config(*hardware)
            correction = _linear_tail(
                dq, dk, dv, d_logit, d_gain, grad_out, q, k, v, real, order, means, rows, index, settings, config
            )
        if has_tail and (pooled or settings.mixing == "row"):
            of_tail = (grad_out, q, index.bits, means, rows)
            found = gluon_backward_tail.tail_gradient(*of_tail, real, order, k.shape[2], settings)
            config_of_tail = tail_config(*hardware, gathers=order is not None)
            dk_bar, dv_bar = found or tail_gradient(*of_tail, order, settings, config_of_tail)
        of_queries = (dq, grad_out, q, k, v, kept, index.bits, means, rows, real, order, settings)
        if not gluon_backward_queries.query_gradient(*of_queries):
            tail_product = torch.empty_like(rows.tail_lse) if has_tail and finds_mixing_anew(q, settings) else None
            query_gradient(*of_queries, queries_config(*hardware), tail_product)
            if tail_product is not None:
                mixing_gradients(d_logit, d_gain, rows, tail_product, settings)
        of_keys = (
            dk, dv, grad_out, q, k, v, index, rows, means.n, dk_bar, dv_bar, correction, real, order, settings,
        )  # fmt: skip
        if not gluon_backward_keys.key_gradients(*of_keys):
            key_gradients(*of_keys, keys_config(dim, q.element_size(), q.device))
    return dq, dk, dv, d_logit, d_gain.sum(2)


def _linear_tail(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_logit: Tensor,
    d_gain: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    means: Statistics,
    rows: Rows,
    index: InverseIndex,
    settings: Settings,
    config: LinearConfig,
) -> Tensor:
    """Write the linear tail's part of the gradients; return what K smoothing subtracts from dk, (B, G, D)."""
    assert means.center is not None
    (batch, _, kv_len, dim), blocks = k.shape, index.bits.shape[1]
    # Powers of two that bring H, a sum over all tokens, and its gradient to the size of v and dO: fp16 needs it.
    factor = 2.0 ** -max(0, round(math.log2(kv_len / dim) / 2))
    state_config = states_config(dim, k.element_size(), shared_memory(k.device))
    states = key_block_states(k, v, means.center, real, order, factor, settings, state_config)
    bits = index.bits.view(batch, -1, blocks, index.bits.shape[2])
    mask = tail_mask(bits, means.n, factor, k.shape[1], q.dtype)  # (B G, H / G M, padded T)
    states = tail_states(mask, states).view(-1, blocks, dim + 1, dim)
    d_state, d_normalizer = linear_query_gradients(
        dq, grad_out, q, states, rows, d_logit, d_gain, order, settings, config, state_config
    )
    del states
    # H came with factor twice, dh goes with it once more.
    mask = mask[:, :, : means.n.shape[1]]
    dh = (mask.mT @ d_state.view(*mask.shape[:2], -1)).unflatten(2, (dim, dim))
    dz = mask.float().mT @ d_normalizer.view(*mask.shape[:2], -1)
    dk_sum = linear_key_gradients(dk, dv, k, v, means.center, real, order, dh, dz, factor, settings, config)
    return dk_sum / means.n.sum(1).clamp(min=1)[:, None, None]
