"""SLA2 attention in plain PyTorch: the truth that every kernel is tested against, forward and (by autograd) backward.

Everything is N x N and in the inputs' dtype; use float64. Equations: "SLA2: Sparse-Linear Attention with Learnable
Routing and QAT", arXiv 2602.12675, sections 3 and 4; the pooled tail and row mixing are this project's own.

Dimension letters, everywhere in this package: B batch, H heads, N tokens, D head dim, M query blocks and T key blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla2_compile.config import SLA2Config
from sla2_compile.kernels.blocks import exact_blocks, exact_query_blocks, num_blocks, num_kept_blocks
from sla2_compile.kernels.token_order import inverse_order, tile_order
from sla2_compile.quant.formats import (
    quantize_dequantize,
    quantize_dequantize_probabilities,
    rounds_means_values,
    statistics_dtype,
)

# A row of the linear tail whose weights sum to less has none: near float32's smallest number they are noise.
MIN_LINEAR_WEIGHT = 1e-30


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    router: tuple[Tensor, Tensor] | None = None,
    alpha_logit: Tensor | None = None,
    alpha_gain: Tensor | None = None,
    config: SLA2Config,
    block_mask: Tensor | None = None,
) -> Tensor:
    """SLA2 attention.

    Args:
        q: (B, H, N, D) floating.
        k, v: (B, H_kv, N_kv, D), H a multiple of H_kv.
        attn_mask: (B or 1, 1, 1, N_kv) bool, True where the key is real; None: all are.
        scale: of the scores; None is 1 / sqrt(D).
        router: (proj_q, proj_k), each (D, D); None is the identity.
        alpha_logit: (H, M') logit of the mixing weight, interpolated to M query blocks; None is 0.
        alpha_gain: (H,) gain of row mixing; None is 1.
        config: settings.
        block_mask: (B, H, M, T) bool to use in place of the router's choice.

    Returns:
        (B, H, N, D). A row with no real key is 0.
    """
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    real = torch.ones(batch, kv_len, dtype=torch.bool, device=q.device)
    real = real if attn_mask is None else attn_mask.expand(batch, 1, 1, kv_len)[:, 0, 0]
    order = None
    if config.token_grid is not None:
        order = tile_order(config.token_grid, kv_len, config.exact_prefix, device=q.device)
        q, k, v, real = q[:, :, order], k[:, :, order], v[:, :, order], real[:, order]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    real = real[:, None]  # (B, 1, N_kv)
    # Keys and values that are not real may hold anything: they must not even reach a low-bit scale.
    k, v = (x.masked_fill(~real[..., None], 0) for x in (k, v))
    k = smooth_keys(k, real)
    k_bar, v_bar = (block_means(x, real, config.block_k) for x in (k, v))
    n = block_sums(real.to(q.dtype)[..., None], config.block_k)[..., 0]  # (B, 1, T) real tokens per block
    if block_mask is None:
        block_mask = _route(q, k_bar, n, scale, router, kv_len, config)
    kept = block_mask.repeat_interleave(config.block_q, 2)[:, :, :q_len]  # (B, H, N, T)
    kept_keys = kept.repeat_interleave(config.block_k, 3)[..., :kv_len]  # (B, H, N, N_kv)

    k_bar, v_bar, log_n = (x.to(q.dtype) for x in (k_bar, v_bar, n.log()))
    values, formats = v, config
    if config.pv_format is not None:
        values = quantize_dequantize(v, config.pv_format, (-2,))
    if config.tail == "linear":
        # It reads the means for a log-sum-exp alone, which then is not low-bit, as that tail is not.
        formats = dataclasses.replace(config, qk_format=None, pv_format=None)
    elif rounds_means_values(config.qk_format, config.pv_format):
        # With the values' scales.
        v_bar = quantize_dequantize(torch.cat([v, v_bar], -2), "fp8", (-2,))[..., kv_len:, :]
    else:
        formats = dataclasses.replace(config, pv_format=None)
    sparse_out, sparse_lse = _softmax_branch(q, k, values, kept_keys & real[..., None, :], 0.0, scale, config)
    in_tail = ~kept & (n > 0)[..., None, :]  # (B, H, N, T)
    tail_out, tail_lse = _softmax_branch(q, k_bar, v_bar, in_tail, log_n[..., None, :], scale, formats)
    if config.tail == "linear":
        weights = feature_map(q, config.feature_map) @ feature_map(k, config.feature_map).mT
        weights = weights * (~kept_keys & real[..., None, :])
        total = weights.sum(-1, keepdim=True)
        tail_out = weights @ v / torch.where(total > MIN_LINEAR_WEIGHT, total, torch.inf)

    logit = q.new_zeros(heads, 1) if alpha_logit is None else alpha_logit
    logit = interpolate_logit(logit.to(q.dtype), num_blocks(q_len, config.block_q))
    logit = logit.repeat_interleave(config.block_q, -1)[:, :q_len]  # (H, N)
    if config.mixing == "row":
        gain = q.new_ones(heads) if alpha_gain is None else alpha_gain.to(q.dtype)
        has_both = in_tail.any(-1) & sparse_lse.isfinite()
        difference = torch.where(has_both, sparse_lse - torch.where(has_both, tail_lse, 0), 0)
        logit = logit + gain[:, None] * difference
    a = torch.where(in_tail.any(-1), logit.sigmoid(), 1)[..., None]
    out = a * sparse_out + (1 - a) * tail_out
    return out if order is None else out[:, :, inverse_order(order)]


def block_mask(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    router: tuple[Tensor, Tensor] | None = None,
    config: SLA2Config,
) -> Tensor:
    """The router's choice, in visiting order: (B, H, M, T) bool, True where the query block keeps the key block."""
    (batch, heads, _, dim), kv_len = q.shape, k.shape[2]
    real = torch.ones(batch, kv_len, dtype=torch.bool, device=q.device)
    real = real if attn_mask is None else attn_mask.expand(batch, 1, 1, kv_len)[:, 0, 0]
    if config.token_grid is not None:
        order = tile_order(config.token_grid, kv_len, config.exact_prefix, device=q.device)
        q, k, real = q[:, :, order], k[:, :, order], real[:, order]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    # Smoothing K shifts all of a row's scores alike, so the choice does not need it.
    k_bar = block_means(k, real[:, None], config.block_k)
    n = block_sums(real[:, None, :, None].to(q.dtype), config.block_k)[..., 0]
    return _route(q, k_bar, n, dim**-0.5 if scale is None else scale, router, kv_len, config)


def _route(
    q: Tensor,
    k_bar: Tensor,
    n: Tensor,
    scale: float,
    router: tuple[Tensor, Tensor] | None,
    kv_len: int,
    config: SLA2Config,
) -> Tensor:
    """Equation 16 and the exact tokens: (B, H, M, T) bool. Ties go to the lower block index."""
    q_len, num_keys = q.shape[2], k_bar.shape[2]
    everyone = torch.ones(1, 1, q_len, dtype=torch.bool, device=q.device)
    # float32 at least, end to end: ties of 16-bit scores change the choice.
    q_bar, k_bar = (at_least_float32(x) for x in (block_means(q, everyone, config.block_q), k_bar))
    if router is not None:
        q_bar, k_bar = q_bar @ router[0].to(q_bar.dtype).mT, k_bar @ router[1].to(k_bar.dtype).mT
    scores = q_bar @ k_bar.mT * scale
    exact = exact_blocks(kv_len, config.block_k, config.exact_prefix, config.exact_suffix)
    block = torch.arange(num_keys, device=q.device)
    is_exact = (block < exact.num_first) | (block >= exact.last_start)
    empty = n[:, :, None] == 0
    scores = scores.masked_fill(is_exact | empty, -torch.inf)
    num_kept = min(num_kept_blocks(num_keys, config.sparsity_units), num_keys)
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True) | is_exact
    rows = exact_query_blocks(q_len, kv_len, config.block_q, config.exact_prefix, config.exact_suffix)
    row = torch.arange(scores.shape[2], device=q.device)[:, None]
    return (mask | (row < rows.num_first) | (row >= rows.last_start)) & ~empty


def _softmax_branch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float, scale: float, config: SLA2Config
) -> tuple[Tensor, Tensor]:
    """Softmax over kept keys or block means, at the precision asked for: (B, H, N, D) and its log-sum-exp (B, H, N).

    `v` comes rounded to its format; `bias` is added to the scores.
    """
    if config.qk_format is not None:
        q = quantize_blocks(q, config.block_q, config.qk_format)
        k = quantize_blocks(k, config.block_k, config.qk_format)
    scores = q @ k.mT * scale + bias
    probs, lse = masked_softmax(scores, mask)
    if config.pv_format is not None:
        probs = quantize_dequantize_probabilities(probs, scores.masked_fill(~mask, -torch.inf).amax(-1), lse)
    return probs @ v, lse


def masked_softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension where `mask` is True and its log-sum-exp; an empty row gives 0 and -inf."""
    scores = scores.masked_fill(~mask, -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True)
    exp = (scores - torch.where(peak.isfinite(), peak, 0)).exp()
    total = exp.sum(-1, keepdim=True)
    nonempty = total > 0
    lse = torch.where(nonempty, torch.where(nonempty, total, 1).log() + peak, -torch.inf)
    return exp / torch.where(nonempty, total, 1), lse[..., 0]


def smooth_keys(k: Tensor, real: Tensor) -> Tensor:
    """`k` less its mean over the real tokens, 0 elsewhere: k (B, H, N_kv, D), real (B, 1, N_kv)."""
    weight = real[..., None].to(k.dtype)
    return (k - (k * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)) * weight


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """(..., N, D) to (..., T, block_size, D), the last block filled up with zeros; a view where none are needed."""
    total = num_blocks(x.shape[-2], block_size)
    # Written so that a symbolic length shows that the blocks hold it, and is not compared.
    missing = total * block_size - x.shape[-2]
    padded = x if statically_known_true(missing == 0) else F.pad(x, (0, 0, 0, missing))
    return padded.unflatten(-2, (total, block_size))


def block_sums(x: Tensor, block_size: int) -> Tensor:
    """Sums over blocks of tokens, at least float32: (..., N, D) to (..., T, D)."""
    return split_blocks(x, block_size).sum(-2, dtype=statistics_dtype(x.dtype))


def block_means(x: Tensor, real: Tensor, block_size: int) -> Tensor:
    """Means over the real tokens of each block; 0 where it has none. x (B, H, N, D), real (B, 1, N)."""
    weight = real[..., None].to(x.dtype)
    return block_sums(x * weight, block_size) / block_sums(weight, block_size).clamp(min=1)


def quantize_blocks(x: Tensor, block_size: int, number_format: str) -> Tensor:
    """`x` (..., N, D) as it is after low-bit storage with one scale per block of tokens."""
    rounded = quantize_dequantize(split_blocks(x, block_size), number_format, (-2, -1))
    return rounded.flatten(-3, -2)[..., : x.shape[-2], :]


def feature_map(x: Tensor, name: str) -> Tensor:
    """phi of the linear branch; every value is >= 0."""
    if name == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if name == "elu" else F.relu(x)


def interpolate_logit(logit: Tensor, num_query_blocks: int) -> Tensor:
    """(H, M') logits read at `num_query_blocks` equally spaced places, linearly: (H, num_query_blocks)."""
    given = logit.shape[1]
    if given == 1 or num_query_blocks == 0:
        return logit[:, :1].expand(-1, num_query_blocks)
    # A symbolic length must not be compared: that would fix it.
    if isinstance(num_query_blocks, int) and given == num_query_blocks:
        return logit
    # Made from the logit, so that a sharded one meets tensors of its own kind.
    ones = logit.detach().new_ones
    place = (ones(num_query_blocks).cumsum(0) - 0.5) * given / num_query_blocks
    distance = (place - 0.5).clamp(0, given - 1)[None] - (ones(given).cumsum(0) - 1)[:, None]
    # Not F.interpolate, whose backward on CUDA is not deterministic, nor indices: DTensors have none in torch 2.11.
    return (logit[:, :, None] * (1 - distance.abs()).clamp(min=0)).sum(1)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it has more."""
    return x.to(statistics_dtype(x.dtype))


def soft_topk(scores: Tensor, kept_ratio: float, tau: float = 0.1) -> Tensor:
    """SoftTop-k (section 4.2, equation 17): a mask that training can follow, in place of the hard choice of blocks.

    `mask_ij = sigmoid(scores_ij / tau + lambda_i)`, with `lambda_i` such that row i sums to `kept_ratio * T`. The
    gradient is exact: it passes through lambda, so that adding a constant to a row changes nothing.

    Args:
        scores: (..., M, T) floating, finite, or -inf for a block that must not be kept. Use float32 or more: a mask in
            16 bits does not keep its sum.
        kept_ratio: in (0, 1]. A row needs more than `kept_ratio * T` blocks that are not -inf.
        tau: temperature, > 0; towards 0 the mask becomes the hard one.

    Returns:
        (..., M, T) in the dtype of `scores`, from 0 to 1, rows summing to `kept_ratio * T`.

    Raises:
        ValueError: `kept_ratio` or `tau` out of range.
        TypeError: scores that are no floating tensor.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() == 0:
        got = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a floating tensor (..., M, T), got {got}; convert them")
    if not isinstance(kept_ratio, (int, float)) or not 0 < kept_ratio <= 1:
        raise ValueError(f"kept_ratio: expected a fraction in (0, 1], got {kept_ratio!r}; it is 1 - sparsity")
    if not isinstance(tau, (int, float)) or not tau > 0:
        raise ValueError(f"tau: expected a positive number, got {tau!r}; the paper's is 0.1")
    return _SoftTopK.apply(scores, kept_ratio, tau)


def find_shift(logits: Tensor, target: float, num_points: int) -> Tensor:
    """The lambda (..., 1) from -60 to 60 at which sigmoid(logits + lambda) sums to `target` over the last dimension.

    Each round looks at `num_points` (1, 3, 7 or 15) between the bounds, evenly spaced; one point is bisection.
    """
    width, low = 120.0, torch.full_like(logits[..., :1], -60.0)
    steps = torch.arange(1, num_points + 1, dtype=logits.dtype, device=logits.device) / (num_points + 1)
    while width > 1e-16:
        sums = (logits[..., None, :] + (low + width * steps)[..., None]).sigmoid().sum(-1)
        width /= num_points + 1
        low = low + width * (sums <= target).sum(-1, keepdim=True)
    return low + width / 2


class _SoftTopK(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, kept_ratio: float, tau: float) -> Tensor:
        num_blocks = scores.shape[-1]
        target = kept_ratio * num_blocks
        # In float64 (where the device has it): near a hard mask the sum is steep in lambda.
        wide = scores if scores.device.type == "mps" else scores.double()
        # Counted from the score at the threshold, lambda is moderate however large or far apart the scores are.
        rank = min(int(target), num_blocks - 1)
        pivot = wide.sort(dim=-1, descending=True).values[..., rank : rank + 1]
        logits = (wide - pivot) / tau
        # A GPU spends its time on launches: more points at once, fewer rounds.
        num_points = 15 if scores.is_cuda and scores.numel() < 1 << 20 else 1
        return (logits + find_shift(logits, target, num_points)).sigmoid().to(scores.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.tau = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        # In float64: where a row is nearly hard, what remains is a difference of almost equal numbers.
        mask, wide_grad = (x if x.device.type == "mps" else x.double() for x in (mask, grad))
        slope = mask * (1 - mask)
        total = slope.sum(-1, keepdim=True)
        # d lambda / d scores_ij = -slope_ij / (tau sum_j slope_ij); a row that is hard everywhere has no gradient.
        share = slope / torch.where(total > 0, total, 1)
        wide = (slope * wide_grad - share * (slope * wide_grad).sum(-1, keepdim=True)) / ctx.tau
        return wide.to(grad.dtype), None, None
