"""SLA2 attention of a few query blocks under a soft block mask: what stage 1 trains the router and the mixing with.

A query block's output needs every key but no other query block, so a training step takes a sample of query blocks. All
that does not depend on learned state (scores, exponentials, the dense output) is computed once per step and shared by
every sparsity and form that is being trained. Twin for a mask of zeros and ones: `reference.attention`.

Source: arXiv 2602.12675, section 4.2, and this project's pooled tail and row mixing under a soft mask: sparse weights
`m_ij exp(S_ij)`, linear weights `(1 - m_ij) phi(q) phi(k)^T`, pooled logits `t_ij + log(1 - m_ij)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sla2_compile.config import SLA2Config
from sla2_compile.kernels.blocks import exact_blocks, exact_query_blocks, num_kept_blocks
from sla2_compile.kernels.reference import (
    at_least_float32,
    block_means,
    block_sums,
    feature_map,
    smooth_keys,
    soft_topk,
    split_blocks,
)
from sla2_compile.kernels.token_order import tile_order

# Weights below this become 0. They change nothing, and products of them are denormal numbers, on which a CPU is slow.
NEGLIGIBLE = 1e-15


@dataclass
class BlockedSample:
    """q, k, v of one attention call and one batch element, in visiting order and in blocks, keys smoothed."""

    q: Tensor  # (H, M, block_q, D), the last block filled up with zeros
    k: Tensor  # (H, T * block_k, D)
    v: Tensor
    q_bar: Tensor  # (H, M, D) means over the tokens of each block, at least float32, as all that follows
    k_bar: Tensor  # (H, T, D)
    v_bar: Tensor  # (H, T, D)
    n: Tensor  # (T,) real tokens of each key block
    real: Tensor  # (T * block_k,) bool
    real_rows: Tensor  # (M, block_q) bool
    kv_len: int  # before the last key block was filled up
    scale: float
    config: SLA2Config
    choosable: Tensor = field(init=False)  # (T,) bool: key blocks that the router may choose
    num_choosable: int = field(init=False)
    exact: Tensor = field(init=False)  # (T,) bool: key blocks that every query keeps
    routed: range = field(init=False)  # query blocks that have a router

    def __post_init__(self) -> None:
        q_len, kv_len = int(self.real_rows.sum()), self.kv_len
        prefix, suffix = self.config.exact_prefix, self.config.exact_suffix
        exact = exact_blocks(kv_len, self.config.block_k, prefix, suffix)
        block = torch.arange(len(self.n), device=self.n.device)
        self.exact = (block < exact.num_first) | (block >= exact.last_start)
        self.choosable = ~self.exact & (self.n > 0)
        self.num_choosable = int(self.choosable.sum())
        rows = exact_query_blocks(q_len, kv_len, self.config.block_q, prefix, suffix)
        self.routed = range(rows.num_first, rows.last_start)


def block_sample(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float | None, config: SLA2Config
) -> BlockedSample:
    """Bring q (H, N, D), k, v (H_kv, N_kv, D) and real (N_kv) or None into the form that training reads."""
    kv_len = k.shape[1]
    real = torch.ones(kv_len, dtype=torch.bool, device=k.device) if real is None else real
    if config.token_grid is not None:
        order = tile_order(config.token_grid, kv_len, config.exact_prefix, device=q.device)
        q, k, v, real = q[:, order], k[:, order], v[:, order], real[order]
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    k, v = (x.masked_fill(~real[:, None], 0) for x in (k, v))
    k = smooth_keys(at_least_float32(k)[None], real[None, None])[0].to(k.dtype)
    missing = -kv_len % config.block_k
    q_blocks = split_blocks(q, config.block_q)
    real_rows = torch.arange(q_blocks.shape[1] * config.block_q, device=q.device) < q.shape[1]
    everyone = torch.ones(1, q.shape[1], dtype=torch.bool, device=q.device)
    wide_q, wide_k, wide_v = (at_least_float32(x) for x in (q, k, v))
    return BlockedSample(
        q=q_blocks,
        k=F.pad(k, (0, 0, 0, missing)),
        v=F.pad(v, (0, 0, 0, missing)),
        q_bar=block_means(wide_q, everyone, config.block_q),
        k_bar=block_means(wide_k, real[None], config.block_k),
        v_bar=block_means(wide_v, real[None], config.block_k),
        n=block_sums(real.to(wide_k.dtype)[:, None], config.block_k)[:, 0],
        real=F.pad(real, (0, missing)),
        real_rows=real_rows.view(-1, config.block_q),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        config=config,
        kv_len=kv_len,
    )


@dataclass
class Step:
    """R query blocks of a sample and everything about them that does not depend on learned state."""

    sample: BlockedSample
    rows: Tensor  # (R,) which query blocks
    exps: Tensor  # (H, R, block_q, T, block_k) exp(S - peak), in the dtype of v
    mass: Tensor  # (H, R, block_q, T) their sums over each block
    peak: Tensor  # (H, R, block_q)
    pooled: Tensor  # (H, R, block_q, T) scores of the block means plus the log of their tokens
    dense: Tensor  # (H, R, block_q, D) attention over all keys
    phi_q: Tensor  # (H, R, block_q, D)
    h: Tensor | None  # (H, T, D, D) phi(k)^T v of each key block; None where no linear tail is trained
    z: Tensor | None  # (H, T, D)


@torch.no_grad()
def take_step(sample: BlockedSample, rows: Tensor, *, with_linear_tail: bool) -> Step:
    """Compute what every form shares for the query blocks `rows` (R,) of a sample."""
    config, num_keys = sample.config, len(sample.n)
    q = sample.q[:, rows]  # (H, R, block_q, D)
    scores = at_least_float32(q.flatten(1, 2) @ sample.k.mT) * sample.scale  # (H, R * block_q, N_kv)
    scores = scores.masked_fill_(~sample.real, -torch.inf)
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0)
    exps = F.threshold((scores - peak).exp_(), NEGLIGIBLE, 0.0)
    shape = (*q.shape[:3], num_keys, config.block_k)
    mass = exps.view(shape).sum(-1)
    total = mass.sum(-1, keepdim=True)
    exps = exps.to(sample.v.dtype)
    dense = at_least_float32(exps @ sample.v).view(q.shape) / torch.where(total > 0, total, 1)
    wide_q = at_least_float32(q)
    pooled = torch.einsum("hrqd,htd->hrqt", wide_q, sample.k_bar) * sample.scale + sample.n.log()
    phi_q, h, z = feature_map(wide_q, config.feature_map), None, None
    if with_linear_tail:
        phi_k = feature_map(at_least_float32(sample.k), config.feature_map) * sample.real[:, None]
        phi_k, v = (x.unflatten(1, (num_keys, config.block_k)) for x in (phi_k, at_least_float32(sample.v)))
        h, z = phi_k.mT @ v, phi_k.sum(2)
    return Step(sample, rows, exps.view(shape), mass, peak.view(q.shape[:3]), pooled, dense, phi_q, h, z)


def router_scores(step: Step, proj_q: Tensor, proj_k: Tensor) -> Tensor:
    """Equation 16 for the step's query blocks: (H, R, T), -inf where the router has no choice."""
    sample = step.sample
    q_bar, k_bar = sample.q_bar[:, step.rows] @ proj_q.mT, sample.k_bar @ proj_k.mT
    return (q_bar @ k_bar.mT * sample.scale).masked_fill(~sample.choosable, -torch.inf)


def num_kept(sample: BlockedSample, sparsity_units: int) -> int:
    """Blocks that the router keeps for a query block of this sample."""
    return min(num_kept_blocks(len(sample.n), sparsity_units), sample.num_choosable)


def hard_mask(sample: BlockedSample, scores: Tensor, sparsity_units: int) -> Tensor:
    """The op's own choice as zeros and ones: (H, R, T)."""
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., : num_kept(sample, sparsity_units)]
    mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    return torch.where(sample.exact & (sample.n > 0), 1.0, mask)


def soft_mask(sample: BlockedSample, scores: Tensor, sparsity_units: int, tau: float) -> Tensor:
    """SoftTop-k with as many blocks in sum as the hard choice keeps: (H, R, T)."""
    kept = num_kept(sample, sparsity_units)
    if kept == sample.num_choosable:
        mask = sample.choosable.to(scores.dtype).expand_as(scores)
    else:
        mask = F.threshold(soft_topk(scores, kept / len(sample.n), tau), NEGLIGIBLE, 0.0)
    return torch.where(sample.exact & (sample.n > 0), 1.0, mask)


def soft_attention(step: Step, mask: Tensor, logit: Tensor, gain: Tensor | None, *, tail: str, mixing: str) -> Tensor:
    """SLA2 attention of the step's query blocks.

    Args:
        step: see `take_step`.
        mask: (H, R, T) from 0 to 1.
        logit: (H, R) logits of the sparse branch's weight.
        gain: (H,) gain of row mixing; None with `mixing="block"`.
        tail, mixing: as in SLA2Config.

    Returns:
        (H, R, block_q, D), differentiable in mask, logit and gain.
    """
    sample = step.sample
    weights = step.exps * mask[:, :, None, :, None].to(step.exps.dtype)
    sparse = at_least_float32(weights.flatten(3).flatten(1, 2) @ sample.v).view(step.dense.shape)
    total = (step.mass * mask[:, :, None]).sum(-1)  # (H, R, block_q)
    has_kept = total > 0
    total = torch.where(has_kept, total, 1)
    sparse, sparse_lse = sparse / total[..., None], total.log() + step.peak

    in_tail = (1 - mask) * (sample.n > 0)  # (H, R, T)
    is_tail = in_tail > 0
    has_tail = is_tail.any(-1)[..., None]  # (H, R, 1)
    log_tail = torch.where(is_tail, torch.where(is_tail, in_tail, 1).log(), -torch.inf)
    # A row without a tail gets one of no consequence instead of a NaN.
    log_tail = torch.where(has_tail, log_tail, 0)
    tail_scores = torch.where(sample.n > 0, step.pooled, -torch.inf) + log_tail[:, :, None]
    tail_lse = tail_scores.logsumexp(-1)
    if tail == "pooled":
        out = torch.einsum("hrqt,htd->hrqd", tail_scores.softmax(-1), sample.v_bar)
    else:
        assert step.h is not None
        assert step.z is not None
        state = (in_tail @ step.h.flatten(2)).unflatten(-1, step.h.shape[2:])  # (H, R, D, D)
        normalizer = step.phi_q @ (in_tail @ step.z)[..., None]
        out = step.phi_q @ state / torch.where(normalizer > 0, normalizer, 1)

    weight = logit[..., None].expand_as(sparse_lse)
    if mixing == "row":
        assert gain is not None
        weight = weight + gain[:, None, None] * torch.where(has_kept, sparse_lse - tail_lse, 0)
    a = torch.where(has_tail, weight.sigmoid(), 1)[..., None]
    return a * sparse + (1 - a) * out
