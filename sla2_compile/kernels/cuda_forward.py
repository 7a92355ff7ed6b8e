"""SLA2 attention on CUDA: block means, router, then one kernel for sparse branch, tail and mixing.

Twin: `blocked.py`. Extra memory: block means, scores and choices of the router; for a linear tail also its states.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from sla2_compile.kernels import blocked, gluon_attention
from sla2_compile.kernels.hardware import shared_memory
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved
from sla2_compile.kernels.triton_linear_state import linear_states
from sla2_compile.kernels.triton_means import block_means
from sla2_compile.kernels.triton_mixture import Outputs, TailMeans, attention, attention_config
from sla2_compile.kernels.triton_router import route
from sla2_compile.kernels.triton_token_order import visiting_order


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    save_sparse_out: bool,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, sparse_out, sparse_lse, tail_lse, kept; see `ops.py` for the shapes."""
    if settings.scale <= 0:
        # The online softmax takes its maximum before it scales. Nobody's attention has such a scale.
        return blocked.forward(q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain, save_sparse_out, settings)
    out = empty_output(q)
    sparse_out = empty_output(q) if save_sparse_out else q.new_empty(0)
    sparse_lse, tail_lse, kept = empty_saved(q, k, settings)
    if q.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), sparse_out.zero_(), sparse_lse.zero_(), tail_lse.zero_(), kept.zero_()
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        # Only tensors no model makes have another stride along D than 1.
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        order = visiting_order(settings, k.shape[2], q.device)
        real = None if attn_mask is None else attn_mask.expand(q.shape[0], 1, 1, k.shape[2])[:, 0, 0]
        real = real if real is None or real.stride(1) == 1 else real.contiguous()

        q_means = block_means(q, settings.block_q, real=None, order=order)
        k_means = block_means(k, settings.block_k, real=real, order=order)
        has_tail = kept.shape[3] - 1 < k_means.n.shape[1]
        pooled = has_tail and settings.tail == "pooled"
        v_bar = block_means(v, settings.block_k, real=real, order=order).rounded if pooled else k_means.rounded
        bits = route(q_means.mean, k_means.mean, k_means.n, proj_q, proj_k, kept, q.shape[2], k.shape[2], settings)
        k_mean = _mean_of_all(k_means.mean, k_means.n) if settings.smooths_keys else None
        means = TailMeans(k_means.rounded, v_bar, k_means.n, k_mean)
        linear = None
        if has_tail and settings.tail == "linear":
            assert k_mean is not None
            linear = linear_states(k, v, bits, k_means.n, k_mean, real, order, settings, shared_memory(q.device))
        outputs = Outputs(out, sparse_out if save_sparse_out else None, sparse_lse, tail_lse)
        if not gluon_attention.attend(
            outputs, q, k, v, kept, bits, means, linear, alpha_logit, alpha_gain, real, order, settings
        ):
            block_d = max(16, triton.next_power_of_2(q.shape[3]))
            config = attention_config(block_d, q.element_size(), q.device)
            attention(
                outputs, q, k, v, kept, bits, means, linear, alpha_logit, alpha_gain, real, order, settings, config
            )
        if not save_sparse_out:
            sparse_lse.zero_(), tail_lse.zero_()
    return out, sparse_out, sparse_lse, tail_lse, kept


def _mean_of_all(mean: Tensor, n: Tensor) -> Tensor:
    """(B, G, D) mean over all real keys, from block means (B, G, T, D) and counts (B, T)."""
    weight = n[:, None, :, None]
    return (mean * weight).sum(2) / weight.sum(2).clamp(min=1)
