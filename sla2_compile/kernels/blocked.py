"""SLA2 attention in ATen, one head and a few query blocks at a time: only the kept blocks' work, on any device.

Extra memory beside the results: one head's keys and values in blocks, and what a chunk of query blocks gathers.
Twin: `reference.attention`. Backward: `blocked_backward.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sla2_compile.kernels.blocked_routing import kept_block_mask, route
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.reference import (
    MIN_LINEAR_WEIGHT,
    at_least_float32,
    block_sums,
    feature_map,
    quantize_blocks,
    split_blocks,
)
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved, row_gain
from sla2_compile.kernels.softmax_attention import softmax_attention, sparse_branch
from sla2_compile.kernels.token_order import tile_order
from sla2_compile.quant.formats import quantize_dequantize, statistics_dtype

# Query rows times gathered keys that one step handles: large enough to fill the cores. In 16 bit at head dim 128 it
# gathers 4 MB, little beside the inputs.
CHUNK_SCORES = 1 << 20


@dataclass
class Inputs:
    """The op's tensors in visiting order, and what every head shares."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, H_kv, N_kv, D), not smoothed
    v: Tensor
    real: Tensor  # (B, N_kv) bool
    n: Tensor  # (B, T) real tokens per key block, at least float32
    order: Tensor | None  # (N,) visiting order of the model's tokens
    has_padding: bool  # some key of the padded blocks may not be real


def visit(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, settings: Settings) -> Inputs:
    """Put the op's inputs into visiting order and count the real tokens."""
    (batch, _, _, _), kv_len = q.shape, k.shape[2]
    if attn_mask is None:
        real = torch.ones(batch, kv_len, dtype=torch.bool, device=q.device)
    else:
        real = attn_mask.expand(batch, 1, 1, kv_len)[:, 0, 0]
    order = None
    if settings.token_grid is not None:
        order = tile_order(tuple(settings.token_grid), kv_len, settings.exact_prefix, device=q.device)  # type: ignore[arg-type]
        q, k, v, real = q[:, :, order], k[:, :, order], v[:, :, order], real[:, order]
    statistics = statistics_dtype(q.dtype)
    n = block_sums(real[..., None].to(statistics), settings.block_k)[..., 0]
    has_padding = attn_mask is not None or not statically_known_true(kv_len % settings.block_k == 0)
    return Inputs(q, k, v, real, n, order, has_padding)


@dataclass
class KeyHead:
    """One head's keys and values as blocks."""

    k: Tensor  # (T, block_k, D), in the inputs' dtype, or at least float32 where a format is yet to round them
    v: Tensor  # (T, block_k, D)
    k_bar: Tensor  # (T, D) means over real tokens, at least float32
    v_bar: Tensor  # (T, D)
    bias: Tensor | None  # (T, block_k) 0 where the key is real, else -inf; None: all are real
    log_n: Tensor  # (T,) log of the real tokens
    real: Tensor  # (T, block_k, 1) 1 where the key is real, else 0, in the statistics' dtype
    dtype: torch.dtype  # of the inputs

    def pooled(self) -> tuple[Tensor, Tensor]:
        """k_bar and v_bar in the inputs' dtype, as the tail attends to them; only the router needs more."""
        return self.k_bar.to(self.dtype), self.v_bar.to(self.dtype)


def key_head(inputs: Inputs, b: int, h: int, settings: Settings) -> KeyHead:
    """Head `h` of `H_kv`, smoothed (where that matters) and blocked."""
    real = inputs.real[b]
    masked = not bool(real.all())
    return block_head(
        inputs.k[b, h], inputs.v[b, h], real, inputs.n[b], settings, masked=masked, has_padding=inputs.has_padding
    )


def block_head(
    k: Tensor, v: Tensor, real: Tensor, num_real: Tensor, settings: Settings, *, masked: bool, has_padding: bool
) -> KeyHead:
    """Smooth the keys of one head, where that matters, and block its keys and values.

    Args:
        k, v: (N_kv, D).
        real: (N_kv,) bool.
        num_real: (T,) real tokens per block.
        settings: the op's.
        masked: some of them may not be real.
        has_padding: the same of the blocks, the last of which may be filled up.
    """
    if masked:
        # Keys and values that are not real may hold anything, NaN too: they must not reach a product.
        k, v = k.masked_fill(~real[:, None], 0), v.masked_fill(~real[:, None], 0)
    n, dtype = num_real[:, None], k.dtype
    k_sums, v_sums = block_sums(k, settings.block_k), block_sums(v, settings.block_k)
    k_bar, v_bar = k_sums / n.clamp(min=1), v_sums / n.clamp(min=1)
    weight = real[:, None].to(n.dtype)
    if settings.smooths_keys:
        k_mean = k_sums.sum(0) / n.sum().clamp(min=1)
        k, k_bar = (k - k_mean) * weight, k_bar - k_mean
        if settings.qk_format is None:
            k = k.to(dtype)
    real_blocks = split_blocks(weight, settings.block_k)
    bias = torch.where(real_blocks[..., 0] > 0, 0.0, -torch.inf).to(weight.dtype) if has_padding else None
    return KeyHead(
        k=split_blocks(k, settings.block_k).contiguous(),
        v=split_blocks(v, settings.block_k).contiguous(),
        k_bar=k_bar,
        v_bar=v_bar,
        bias=bias,
        log_n=num_real.log(),
        real=real_blocks,
        dtype=dtype,
    )


def with_rounded_values(head: KeyHead, settings: Settings) -> KeyHead:
    """The head with values as their format holds them, and their means if they are in it too.

    There is one scale per channel over all keys of the head.
    """
    if settings.pv_format is None:
        return head
    v, v_bar = at_least_float32(head.v), head.v_bar
    if settings.rounds_means_values:
        # No mean is larger than the largest value, so that the scale is the values' own.
        together = quantize_dequantize(torch.cat([v.flatten(0, 1), v_bar]), "fp8", (0,))
        tokens, v_bar = together.split([together.shape[0] - v_bar.shape[0], v_bar.shape[0]])
        v = tokens.view(v.shape)
    else:
        v = quantize_dequantize(v, "fp8", (0, 1))
    return KeyHead(**{**vars(head), "v": v, "v_bar": v_bar})


@dataclass(frozen=True)
class RowChunk:
    """Query blocks `start` to `stop`, which either all keep every key block or all keep those they list."""

    start: int
    stop: int
    keeps_all: bool


def row_chunks(q_len: int, kv_len: int, settings: Settings) -> Iterator[RowChunk]:
    """Query blocks in the portions that one step handles."""
    rows = num_blocks(q_len, settings.block_q)
    total, slots = num_blocks(kv_len, settings.block_k), settings.num_kept(kv_len)
    exact = settings.exact_queries(q_len, kv_len)
    for start, stop, keeps_all in (
        (0, exact.num_first, True),
        (exact.num_first, exact.last_start, slots == total),
        (exact.last_start, rows, True),
    ):
        num_keys = (total if keeps_all else slots) * settings.block_k
        size = max(1, CHUNK_SCORES // (settings.block_q * max(1, num_keys)))
        for first in range(start, stop, size):
            yield RowChunk(first, min(first + size, stop), keeps_all)


def gather_keys(head: KeyHead, kept: Tensor, keeps_all: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kept keys (R, K, D), values and bias (R or 1, 1, K) of query blocks with these (R, 1 + slots) choices."""
    rows, size = kept.shape[0], head.real.shape[1]
    if keeps_all:
        k, v = (x.flatten(0, 1).expand(rows, -1, -1) for x in (head.k, head.v))
        return k, v, None if head.bias is None else head.bias.view(1, 1, -1)
    num_kept, kept = kept[:, :1], kept[:, 1:].clone(memory_format=torch.contiguous_format)
    slots = kept.shape[1]
    k, v = (x.index_select(0, kept.view(-1)).view(rows, slots * size, -1) for x in (head.k, head.v))
    if head.bias is None:
        return k, v, None
    unused = torch.arange(slots, device=kept.device) >= num_kept
    bias = head.bias[kept.long()].masked_fill(unused[..., None], -torch.inf)
    return k, v, bias.view(rows, 1, slots * size)


def tail_bias(head: KeyHead, block_mask: Tensor) -> Tensor:
    """(R, 1, T): log n_j for blocks in the tail, -inf for kept and empty ones."""
    return head.log_n.masked_fill(block_mask, -torch.inf)[:, None]


def tail_is_empty(bias: Tensor) -> Tensor:
    """(R, 1): every block is kept or empty, so the sparse branch is the whole answer."""
    return ~(bias > -torch.inf).any(-1)


def mixing_weight(
    sparse_lse: Tensor, tail_lse: Tensor, no_tail: Tensor, logit: Tensor | None, gain: Tensor | None
) -> Tensor:
    """Weight a of the sparse branch: lse (R, block_q), no_tail, logit (R, 1), gain () or (R, 1), None: block mixing."""
    # Clamping keeps an empty branch from making inf - inf; its weight is set below.
    z = torch.zeros_like(sparse_lse) if logit is None else logit.to(sparse_lse.dtype).expand_as(sparse_lse)
    if gain is not None:
        empty = no_tail | ~sparse_lse.isfinite()
        z = z + gain * torch.where(empty, 0, sparse_lse - tail_lse)
    return torch.where(no_tail, 1, z.sigmoid())


@dataclass
class LinearBlocks:
    """What the linear tail needs of each key block of a head."""

    phi_k: Tensor  # (T, block_k, D)
    h: Tensor  # (T, D, D) = phi(k)^T v
    z: Tensor  # (T, D) = sum of phi(k)

    def outside(self, block_mask: Tensor) -> tuple[Tensor, Tensor]:
        """H (R, D, D) and Z (R, D) of the blocks that each row of `block_mask` (R, T) does not keep."""
        in_tail = (~block_mask).to(self.h.dtype)
        return (in_tail @ self.h.flatten(1)).view(-1, *self.h.shape[1:]), in_tail @ self.z

    @staticmethod
    def row_weight(phi_q: Tensor, normalizer: Tensor) -> Tensor:
        """phi(q) . Z (R, block_q, 1) to divide by: infinite where it is too small to mean anything."""
        weight = phi_q @ normalizer[..., None]
        return torch.where(weight > MIN_LINEAR_WEIGHT, weight, torch.inf)


def linear_blocks(head: KeyHead, settings: Settings) -> LinearBlocks:
    """h_j and z_j of every key block (the paper's section 3.2)."""
    k, v = (at_least_float32(x) for x in (head.k, head.v))
    phi_k = feature_map(k, settings.feature_map) * head.real
    return LinearBlocks(phi_k, phi_k.mT @ v, phi_k.sum(1))


def row_blocks(x: Tensor, chunk: RowChunk, block_q: int) -> Tensor:
    """Query blocks of the chunk: (N, D) to (R, block_q, D), the last one filled up with zeros."""
    return split_blocks(x[chunk.start * block_q : chunk.stop * block_q], block_q)


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
    out = empty_output(q)
    sparse_out = empty_output(q) if save_sparse_out else q.new_empty(0)
    sparse_lse, tail_lse, kept = empty_saved(q, k, settings)
    if q.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), sparse_out.zero_(), sparse_lse.zero_(), tail_lse.zero_(), kept.zero_()
    alpha_gain = row_gain(q, alpha_gain, settings)
    inputs = visit(q, k, v, attn_mask, settings)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h_kv in range(k.shape[1]):
            head = key_head(inputs, b, h_kv, settings)
            linear = linear_blocks(head, settings) if settings.tail == "linear" else None
            values = with_rounded_values(head, settings)
            heads = slice(h_kv * group, (h_kv + 1) * group)
            kept[b : b + 1, heads] = route(
                inputs.q[b : b + 1, heads],
                head.k_bar[None, None],
                inputs.n[b : b + 1],
                proj_q,
                proj_k,
                k.shape[2],
                settings,
            )
            for h in range(heads.start, heads.stop):
                for chunk in row_chunks(q.shape[2], k.shape[2], settings):
                    rows = slice(chunk.start, chunk.stop)
                    results = forward_rows(
                        row_blocks(inputs.q[b, h], chunk, settings.block_q),
                        head,
                        values,
                        linear,
                        kept[b, h, rows],
                        None if alpha_logit is None else alpha_logit[h, rows, None],
                        None if alpha_gain is None else alpha_gain[h],
                        chunk.keeps_all,
                        settings,
                    )
                    first = chunk.start * settings.block_q
                    last = min(chunk.stop * settings.block_q, q.shape[2])
                    tokens = slice(first, last) if inputs.order is None else inputs.order[first:last]
                    targets = (out, sparse_out, sparse_lse, tail_lse) if save_sparse_out else (out,)
                    for target, result in zip(targets, results, strict=False):
                        target[b, h, tokens] = result.flatten(0, 1)[: last - first]
    if not save_sparse_out:
        sparse_lse.zero_(), tail_lse.zero_()
    return out, sparse_out, sparse_lse, tail_lse, kept


def _low_bit_tail(q: Tensor, values: KeyHead, bias: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """`_tail` with keys, and maybe values, in the sparse branch's formats; `values` come from `with_rounded_values`."""
    # Rounded once, from float32; the mean of an empty block must not reach a scale.
    k_bar, v_bar = values.k_bar.masked_fill((values.log_n == -torch.inf)[:, None], 0), values.v_bar
    if not settings.rounds_means_values:
        v_bar, settings = v_bar.to(values.dtype), dataclasses.replace(settings, pv_format=None)
    return sparse_branch(q, k_bar[None], v_bar[None], bias, settings)


def _tail(q: Tensor, head: KeyHead, bias: Tensor, settings: Settings, fused: bool) -> tuple[Tensor, Tensor]:
    """Attention of the rows (R, block_q, D) to the blocks' means, with bias (R, 1, T): (R, block_q, D) and its lse."""
    k_bar, v_bar = (x.expand(q.shape[0], -1, -1) for x in head.pooled())
    return softmax_attention(q, k_bar, v_bar, bias, settings.scale, fused=fused)


def forward_rows(
    q: Tensor,
    head: KeyHead,
    values: KeyHead,
    linear: LinearBlocks | None,
    kept: Tensor,
    logit: Tensor | None,
    gain: Tensor | None,
    keeps_all: bool,
    settings: Settings,
    *,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and sparse_out (R, block_q, D), sparse_lse and tail_lse (R, block_q) of some query blocks (R, block_q, D)."""
    k, v, bias = gather_keys(values, kept, keeps_all)
    queries = q
    if settings.qk_format is not None:
        queries = quantize_blocks(at_least_float32(q), settings.block_q, settings.qk_format)
    if keeps_all:
        # One problem with many rows, since all see the same keys.
        together, lse = sparse_branch(queries.flatten(0, 1)[None], k[:1], v[:1], bias, settings, fused=fused)
        sparse_out, sparse_lse = together.view(q.shape).to(q.dtype), lse.view(q.shape[:2])
        return sparse_out, sparse_out, sparse_lse, torch.full_like(sparse_lse, -torch.inf)
    sparse_out, sparse_lse = sparse_branch(queries, k, v, bias, settings, fused=fused)
    block_mask = kept_block_mask(kept, head.log_n.shape[0])
    bias = tail_bias(head, block_mask)
    tail_out, tail_lse = None, torch.zeros_like(sparse_lse)
    if linear is None and settings.qk_format is not None:
        tail_out, tail_lse = _low_bit_tail(queries, values, bias, settings)
    elif linear is None or gain is not None:
        tail_out, tail_lse = _tail(q, head, bias, settings, fused)
    if linear is not None:
        state, normalizer = linear.outside(block_mask)
        phi_q = feature_map(at_least_float32(q), settings.feature_map)
        tail_out = phi_q @ state / linear.row_weight(phi_q, normalizer)
    no_tail = tail_is_empty(bias)
    a = mixing_weight(sparse_lse, tail_lse, no_tail, logit, gain)[..., None]
    assert tail_out is not None
    out = torch.lerp(tail_out.to(sparse_out.dtype), sparse_out, a.to(sparse_out.dtype)).to(q.dtype)
    return out, sparse_out, sparse_lse, tail_lse
