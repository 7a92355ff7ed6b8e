"""SLA2 attention in Triton, for CUDA: block means, router, then one kernel for sparse branch, tail and mixing.

Twin: `blocked.py`. Extra memory: block means, scores and choices of the router; for a linear tail also its states.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from sla2_compile.kernels import blocked
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved
from sla2_compile.kernels.token_order import tile_order
from sla2_compile.kernels.triton_attention import AttentionConfig, Outputs, TailMeans, attention, attention_config
from sla2_compile.kernels.triton_block_means import block_means
from sla2_compile.kernels.triton_linear_tail import linear_states
from sla2_compile.kernels.triton_router import route


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
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, sparse_out, sparse_lse, tail_lse, kept; see `ops.py` for the shapes. `config` replaces the tile sizes."""
    if settings.scale <= 0:
        # The online softmax takes its maximum before it scales. Nobody's attention has such a scale.
        return blocked.forward(
            q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain, save_sparse_out, settings
        )
    out = empty_output(q)
    sparse_out = empty_output(q) if save_sparse_out else q.new_empty(0)
    sparse_lse, tail_lse, kept = empty_saved(q, k, settings)
    if q.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), sparse_out.zero_(), sparse_lse.zero_(), tail_lse.zero_(), kept.zero_()
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        # Only tensors no model makes have another stride along D than 1.
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        order = None
        if settings.token_grid is not None:
            grid = tuple(settings.token_grid)
            order = tile_order(grid, k.shape[2], settings.exact_prefix, device=q.device).int()  # type: ignore[arg-type]
        real = None if attn_mask is None else attn_mask.expand(q.shape[0], 1, 1, k.shape[2])[:, 0, 0]
        real = real if real is None or real.stride(1) == 1 else real.contiguous()

        q_means = block_means(q, settings.block_q, real=None, order=order)
        k_means = block_means(k, settings.block_k, real=real, order=order)
        v_means = block_means(v, settings.block_k, real=real, order=order)
        n = k_means.n
        k_mean = _mean_of_all(k_means.mean, n) if settings.smooths_keys else None
        bits = route(q_means.mean, k_means.mean, n, proj_q, proj_k, kept, q.shape[2], k.shape[2], settings)
        means = TailMeans(k_means.mean.to(k.dtype), v_means.mean.to(v.dtype), n, k_mean)
        linear = None
        if settings.tail == "linear" and kept.shape[3] - 1 < n.shape[1]:
            assert k_mean is not None
            linear = linear_states(k, v, bits, n, k_mean, real, order, settings)
        if config is None:
            block_d = max(16, triton.next_power_of_2(q.shape[3]))
            config = attention_config(block_d, q.element_size(), shared_memory(q.device))
        outputs = Outputs(out, sparse_out if save_sparse_out else None, sparse_lse, tail_lse)
        attention(outputs, q, k, v, kept, bits, means, linear, alpha_logit, alpha_gain, real, order, settings, config)
        if not save_sparse_out:
            sparse_lse.zero_(), tail_lse.zero_()
    return out, sparse_out, sparse_lse, tail_lse, kept


def _mean_of_all(mean: Tensor, n: Tensor) -> Tensor:
    """(B, G, D) mean over all real keys, from block means (B, G, T, D) and counts (B, T)."""
    weight = n[:, None, :, None]
    return (mean * weight).sum(2) / weight.sum(2).clamp(min=1)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use; Hopper's where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
