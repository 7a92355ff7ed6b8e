"""SLA2 attention on CUDA: block statistics, router, then one kernel for sparse branch, tail and mixing.

Twin: `blocked.py`. Extra memory: block statistics, scores and choices of the router; for a linear tail its states, for
low-bit formats the codes of k and v.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sla2_compile.kernels import blocked, gluon_attention, gluon_fp8_attention
from sla2_compile.kernels.attention_stage import AttentionInputs, Outputs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.hardware import shared_memory
from sla2_compile.kernels.launch_arguments import padded_dim
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved
from sla2_compile.kernels.triton_linear_state import fp8_tiles, linear_states
from sla2_compile.kernels.triton_low_bit import low_bit_codes, num_stored_blocks
from sla2_compile.kernels.triton_mixture import attention, attention_config
from sla2_compile.kernels.triton_one_pass import one_pass, suits
from sla2_compile.kernels.triton_router import Choice, route
from sla2_compile.kernels.triton_statistics import block_statistics
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
    sparse_lse, tail_lse, kept = empty_saved(q, k, settings)
    if q.numel() == 0 or k.shape[2] == 0:
        out, sparse_out = _empty_outputs(q, save_sparse_out)
        return out.zero_(), sparse_out.zero_(), sparse_lse.zero_(), tail_lse.zero_(), kept.zero_()
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        inputs = prepare(
            q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain, kept, settings, route,
            saves=save_sparse_out,
        )  # fmt: skip
        # Now that the key blocks' states are gone, which are as large as both.
        out, sparse_out = _empty_outputs(q, save_sparse_out)
        outputs = Outputs(out, sparse_out if save_sparse_out else None, sparse_lse, tail_lse)
        on_hopper = (gluon_fp8_attention.attend, gluon_attention.attend)
        if not any(attend(outputs, inputs, settings) for attend in on_hopper):
            config = attention_config(padded_dim(q.shape[3]), q.element_size(), q.device, low_bit=settings.is_low_bit)
            attention(outputs, inputs, settings, config)
    return out, sparse_out, sparse_lse, tail_lse, kept


def _empty_outputs(q: Tensor, save_sparse_out: bool) -> tuple[Tensor, Tensor]:
    return empty_output(q), empty_output(q) if save_sparse_out else q.new_empty(0)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    kept: Tensor,
    settings: Settings,
    route: Callable[..., Choice],
    *,
    saves: bool = False,
    copy_engine: bool = True,
) -> AttentionInputs:
    """Everything that the attention kernels read; `route`, the router's, writes `kept`.

    saves: whether what a backward needs is saved: log-sum-exps of keys that the mean of all has smoothed.
    copy_engine: whether tensor descriptors may be used.
    """
    # Only tensors no model makes have another stride along D than 1.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    # A logit per head arrives expanded to all query blocks, without memory of its own for each.
    alpha_logit, alpha_gain = (x if x is None else x.contiguous() for x in (alpha_logit, alpha_gain))
    kv_len = k.shape[2]
    order = visiting_order(settings, kv_len, q.device)
    real = None if attn_mask is None else attn_mask.expand(q.shape[0], 1, 1, kv_len)[:, 0, 0]
    real = real if real is None or real.stride(1) == 1 else real.contiguous()
    slots = kept.shape[3] - 1
    has_tail = slots < num_blocks(kv_len, settings.block_k)
    pooled, linear = (has_tail and settings.tail == tail for tail in ("pooled", "linear"))
    in_fp8 = fp8_tiles(q, k, v, slots, real, order, settings) if linear and copy_engine else None
    keys = values = None
    if settings.is_low_bit and copy_engine and not (saves or linear) and suits(k, real, order, settings):
        num_stored = num_stored_blocks(num_blocks(kv_len, settings.block_k), settings, with_means=pooled)
        keys, values = one_pass(k, v, num_stored, settings)
    statistics = block_statistics(
        q, k, v, real, order, settings,
        # Where the tail's keys are codes, they are made of `k_mean`.
        needs_v_bar=pooled, smooth_k_bar=settings.is_low_bit and not (pooled and settings.qk_format is not None),
        needs_v_scale=in_fp8 is None, of_keys=keys, of_values=values,
    )  # fmt: skip
    choice = route(
        statistics.q_mean, statistics.k_mean, statistics.n, proj_q, proj_k, kept, q.shape[2], kv_len, settings,
        masked=real is not None,
    )  # fmt: skip
    states = None
    key_codes = None if keys is None else keys.codes
    value_codes = None if values is None else values.codes
    if linear:
        assert statistics.center is not None
        tail = linear_states(
            k, v, choice.bits, statistics.n, statistics.center, real, order, settings, shared_memory(q.device),
            in_fp8=in_fp8, copy_engine=copy_engine,
        )  # fmt: skip
        states, key_codes = tail.states, tail.key_codes
        if tail.v_scale is not None:
            statistics = dataclasses.replace(statistics, v_scale=tail.v_scale)
    # Last, when the key blocks' states are gone: together they would take more than the inputs.
    codes = low_bit_codes(
        k, v, statistics, real, order, settings, with_means=pooled, of_keys=key_codes, of_values=value_codes
    )  # fmt: skip
    return AttentionInputs(
        q, k, v, kept, choice.bits, choice.num_nonempty, statistics, codes, states, alpha_logit, alpha_gain, real,
        order,
    )  # fmt: skip
