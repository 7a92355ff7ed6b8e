"""Gradients of SLA2 attention in ATen (Algorithm 3 of the paper), over the same chunks as `blocked.py`.

With s_i = dO_i . O_s,i and d_i = dO_i . O_i per row, gain g (0 for block mixing) and weight a, the gradients are

    dS_ij = a P_ij (dO_i . v_j - d_i - (s_i - d_i)(1 - g))                       kept keys
    dt_ij = R_ij ((1 - a)(dO_i . v_bar_j - d_i) + a (s_i - d_i)(1 - g))          pooled tail
    da's logit = a (s_i - d_i),   da's gain = a (s_i - d_i)(lse_s - lse_t)

so O_l is never needed by itself, and nothing is divided by 1 - a. Probabilities are recomputed from the 16-bit q, k and
the saved log-sum-exp, also where the forward was low-bit. The router's choice is hard and has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.blocked import (
    KeyHead,
    LinearBlocks,
    RowChunk,
    gather_keys,
    key_head,
    linear_blocks,
    mixing_weight,
    row_blocks,
    row_chunks,
    tail_bias,
    tail_is_empty,
    visit,
)
from sla2_compile.kernels.blocked_routing import kept_block_mask
from sla2_compile.kernels.reference import at_least_float32, feature_map
from sla2_compile.kernels.settings import Settings, empty_output, row_gain
from sla2_compile.quant.formats import statistics_dtype


@dataclass
class KeyGradients:
    """Sums over query blocks, at least float32; `linear` ones only where the tail is linear."""

    k: Tensor  # (T, block_k, D)
    v: Tensor  # (T, block_k, D)
    k_bar: Tensor  # (T, D)
    v_bar: Tensor  # (T, D)
    h: Tensor | None  # (T, D, D)
    z: Tensor | None  # (T, D)


@dataclass(frozen=True)
class Row:
    """What one chunk of query blocks brings, (R, block_q, ...), at least float32; `kept` is (R, 1 + slots)."""

    q: Tensor
    grad_out: Tensor
    d: Tensor  # (R, block_q, 1) dO . O
    s: Tensor  # (R, block_q, 1) dO . O_s
    sparse_lse: Tensor  # (R, block_q)
    tail_lse: Tensor
    kept: Tensor
    logit: Tensor | None  # (R, 1)
    gain: Tensor | None  # ()


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
    """dq, dk, dv in the shapes and dtypes of q, k, v; per batch element d logit (B, H, M) and d gain (B, H)."""
    dq, dk, dv = (empty_output(x).zero_() for x in (q, k, v))
    statistics = statistics_dtype(q.dtype)
    d_logit = q.new_zeros(kept.shape[:3], dtype=statistics)
    d_gain = q.new_zeros(q.shape[:2], dtype=statistics)
    if q.numel() == 0 or k.shape[2] == 0:
        return dq, dk, dv, d_logit, d_gain
    alpha_gain = row_gain(q, alpha_gain, settings)
    inputs = visit(q, k, v, attn_mask, settings)
    q_len, dim = q.shape[2:]
    group = q.shape[1] // k.shape[1]
    order = torch.arange(q_len, device=q.device) if inputs.order is None else inputs.order
    for b in range(q.shape[0]):
        for h_kv in range(k.shape[1]):
            head = key_head(inputs, b, h_kv, settings)
            linear = linear_blocks(head, settings) if settings.tail == "linear" else None
            grads = _zero_gradients(head, linear, dim)
            for h in range(h_kv * group, (h_kv + 1) * group):
                for chunk in row_chunks(q_len, k.shape[2], settings):
                    rows = slice(chunk.start, chunk.stop)
                    tokens = order[chunk.start * settings.block_q : chunk.stop * settings.block_q]

                    def load(x: Tensor, tokens: Tensor = tokens, chunk: RowChunk = chunk) -> Tensor:
                        x = at_least_float32(x[tokens]).view(len(tokens), -1)
                        whole = RowChunk(0, chunk.stop - chunk.start, chunk.keeps_all)
                        return row_blocks(x, whole, settings.block_q)

                    grad = load(grad_out[b, h])
                    row = Row(
                        q=load(q[b, h]),
                        grad_out=grad,
                        d=(grad * load(out[b, h])).sum(-1, keepdim=True),
                        s=(grad * load(sparse_out[b, h])).sum(-1, keepdim=True),
                        sparse_lse=load(sparse_lse[b, h])[..., 0],
                        tail_lse=load(tail_lse[b, h])[..., 0],
                        kept=kept[b, h, rows],
                        logit=None if alpha_logit is None else alpha_logit[h, rows, None],
                        gain=None if alpha_gain is None else alpha_gain[h],
                    )
                    dq_rows, d_logit_rows, d_gain_rows = _backward_rows(
                        row, head, linear, grads, chunk.keeps_all, settings
                    )
                    dq[b, h, tokens] = dq_rows.flatten(0, 1)[: len(tokens)].to(dq.dtype)
                    d_logit[b, h, rows] = d_logit_rows
                    d_gain[b, h] += d_gain_rows
            dk_head, dv_head = _collect(head, linear, grads, settings)
            key_order = slice(None) if inputs.order is None else inputs.order
            dk[b, h_kv, key_order] = dk_head[: k.shape[2]].to(dk.dtype)
            dv[b, h_kv, key_order] = dv_head[: k.shape[2]].to(dv.dtype)
    return dq, dk, dv, d_logit, d_gain


def _zero_gradients(head: KeyHead, linear: LinearBlocks | None, dim: int) -> KeyGradients:
    total, size, _ = head.real.shape
    zeros = head.k_bar.new_zeros
    return KeyGradients(
        k=zeros(total, size, dim),
        v=zeros(total, size, dim),
        k_bar=zeros(total, dim),
        v_bar=zeros(total, dim),
        h=None if linear is None else zeros(total, dim, dim),
        z=None if linear is None else zeros(total, dim),
    )


def _backward_rows(
    row: Row, head: KeyHead, linear: LinearBlocks | None, grads: KeyGradients, keeps_all: bool, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (R, block_q, D), d logit (R,) and d gain () of some query blocks; adds their share to `grads`."""
    block_mask = kept_block_mask(row.kept, len(head.log_n))
    bias = tail_bias(head, block_mask)
    no_tail = tail_is_empty(bias)
    a = mixing_weight(row.sparse_lse, row.tail_lse, no_tail, row.logit, row.gain)[..., None]
    gain = 0 if row.gain is None else row.gain
    # Where there is no tail, a is 1 whatever the logit and the gain.
    spread = torch.where(no_tail[..., None], 0, row.s - row.d)
    d_alpha = (a * spread)[..., 0]  # (R, block_q), the gradient of a's logit
    dq = _sparse_gradient(row, head, grads, a, row.d + spread * (1 - gain), keeps_all, settings)
    if keeps_all:
        return dq, d_alpha.sum(-1), d_alpha.sum() * 0
    if linear is None:
        dq += _pooled_gradient(row, head, grads, a, a * spread * (1 - gain), bias, settings)
    else:
        dq += _linear_gradient(row, linear, grads, a, block_mask, no_tail, settings)
        if row.gain is not None:
            # The tail's log-sum-exp comes from the pooled scores, though its values do not.
            one = torch.ones_like(a)
            dq += _pooled_gradient(row, head, grads, one, -gain * a * spread, bias, settings)
    if row.gain is None:
        return dq, d_alpha.sum(-1), d_alpha.sum() * 0
    both = torch.isfinite(row.sparse_lse) & ~no_tail
    difference = torch.where(both, row.sparse_lse - row.tail_lse, 0)
    return dq, d_alpha.sum(-1), (d_alpha * difference).sum()


def _sparse_gradient(
    row: Row, head: KeyHead, grads: KeyGradients, a: Tensor, offset: Tensor, keeps_all: bool, settings: Settings
) -> Tensor:
    k, v, bias = gather_keys(head, row.kept, keeps_all)
    k, v = at_least_float32(k), at_least_float32(v)
    scores = row.q @ k.mT * settings.scale
    if bias is not None:
        scores = scores + bias
    lse = torch.where(row.sparse_lse.isfinite(), row.sparse_lse, torch.inf)  # a row with no key has no gradient
    probs = a * _probabilities(scores, lse)  # (R, block_q, K)
    d_scores = probs * (row.grad_out @ v.mT - offset) * settings.scale
    dk, dv = d_scores.mT @ row.q, probs.mT @ row.grad_out  # (R, K, D)
    if keeps_all:
        grads.k += dk.sum(0).view_as(grads.k)
        grads.v += dv.sum(0).view_as(grads.v)
    else:
        # Unused slots point at block 0 with probability 0, so they add nothing to it.
        blocks = row.kept[:, 1:].flatten().long()
        grads.k.index_add_(0, blocks, dk.view(-1, *grads.k.shape[1:]))
        grads.v.index_add_(0, blocks, dv.view(-1, *grads.v.shape[1:]))
    return d_scores @ k


def _pooled_gradient(
    row: Row, head: KeyHead, grads: KeyGradients, a: Tensor, shift: Tensor, bias: Tensor, settings: Settings
) -> Tensor:
    """Adds (1 - a)(dO . v_bar - d) + shift, times the tail's probabilities, to the pooled scores' gradient."""
    k_bar, v_bar = (at_least_float32(x) for x in head.pooled())
    scores = row.q @ k_bar.mT * settings.scale + bias
    lse = torch.where(row.tail_lse.isfinite(), row.tail_lse, torch.inf)
    probs = _probabilities(scores, lse)  # (R, block_q, T)
    d_scores = probs * ((1 - a) * (row.grad_out @ v_bar.mT - row.d) + shift) * settings.scale
    grads.k_bar += (d_scores.mT @ row.q).sum(0)
    grads.v_bar += (((1 - a) * probs).mT @ row.grad_out).sum(0)
    return d_scores @ k_bar


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), at most 1: the forward's own scores, low-bit or huge, may lie below these."""
    return (scores - lse[..., None]).clamp_(max=0).exp_()


def _linear_gradient(
    row: Row,
    linear: LinearBlocks,
    grads: KeyGradients,
    a: Tensor,
    block_mask: Tensor,
    no_tail: Tensor,
    settings: Settings,
) -> Tensor:
    state, normalizer = linear.outside(block_mask)
    phi_q = feature_map(row.q, settings.feature_map)
    weight = linear.row_weight(phi_q, normalizer)
    d_numerator = (1 - a) * row.grad_out / weight
    # (1 - a) dO . O_l = d - a s
    d_weight = -torch.where(no_tail[..., None], 0, row.d - a * row.s) / weight
    in_tail = (~block_mask).to(phi_q.dtype)
    assert grads.h is not None
    assert grads.z is not None
    grads.h += (in_tail.mT @ (phi_q.mT @ d_numerator).flatten(1)).view_as(grads.h)
    grads.z += in_tail.mT @ (phi_q.mT @ d_weight)[..., 0]
    d_phi = d_numerator @ state.mT + d_weight * normalizer[:, None]
    return _feature_map_gradient(row.q, d_phi, settings.feature_map)


def _feature_map_gradient(x: Tensor, grad: Tensor, name: str) -> Tensor:
    if name == "softmax":
        phi = x.softmax(-1)
        return phi * (grad - (grad * phi).sum(-1, keepdim=True))
    return grad * torch.where(x > 0, 1, x.exp() if name == "elu" else 0)


def _collect(
    head: KeyHead, linear: LinearBlocks | None, grads: KeyGradients, settings: Settings
) -> tuple[Tensor, Tensor]:
    """dk, dv (T * block_k, D): the branches' gradients added up, and K smoothing's."""
    share = head.real / head.real.sum(1, keepdim=True).clamp(min=1)  # (T, block_k, 1) weight of a token in its mean
    dk = grads.k + share * grads.k_bar[:, None]
    dv = grads.v + share * grads.v_bar[:, None]
    if linear is not None:
        assert grads.h is not None
        assert grads.z is not None
        k, v = (at_least_float32(x) for x in (head.k, head.v))
        d_phi = (v @ grads.h.mT + grads.z[:, None]) * head.real
        dk += _feature_map_gradient(k, d_phi, settings.feature_map)
        dv += linear.phi_k @ grads.h
    dk, dv, real = dk.flatten(0, 1), dv.flatten(0, 1), head.real.flatten(0, 1)
    return (dk - dk.sum(0) / real.sum().clamp(min=1)) * real, dv * real
