"""Routing for the blocked implementation: block means, scores, and the kept key blocks as counts and indices."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.reference import block_sums
from sla2_compile.kernels.settings import Settings


def route(
    q: Tensor, k_bar: Tensor, n: Tensor, proj_q: Tensor | None, proj_k: Tensor | None, kv_len: int, settings: Settings
) -> Tensor:
    """The key blocks that each query block keeps.

    Args:
        q: (B, H, N, D), in visiting order.
        k_bar: (B, H_kv, T, D) block means of the smoothed keys, at least float32.
        n: (B, T) real tokens of each key block.
        proj_q, proj_k: (D, D) or None for the identity.
        kv_len: number of keys.
        settings: the op's.

    Returns:
        (B, H, M, 1 + slots) int32, as `settings.empty_saved` describes; slots past the count hold 0.
    """
    q_len = q.shape[2]
    size = block_sums(q.new_ones(q_len, 1), settings.block_q)  # (M, 1) tokens of each query block
    q_bar = block_sums(q, settings.block_q) / size
    return route_means(q_bar, k_bar, n, proj_q, proj_k, q_len, kv_len, settings)


def route_means(
    q_bar: Tensor,
    k_bar: Tensor,
    n: Tensor,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    q_len: int,
    kv_len: int,
    settings: Settings,
) -> Tensor:
    """`route` from the block means q_bar (B, H, M, D) of the queries."""
    heads, num_keys = q_bar.shape[1], k_bar.shape[2]
    if proj_q is not None and proj_k is not None:
        q_bar, k_bar = q_bar @ proj_q.to(q_bar.dtype).mT, k_bar @ proj_k.to(k_bar.dtype).mT
    scores = q_bar @ k_bar.repeat_interleave(heads // k_bar.shape[1], 1).mT * settings.scale  # (B, H, M, T)

    exact = settings.exact_keys(kv_len)
    block = torch.arange(num_keys, device=q_bar.device)
    is_exact = (block < exact.num_first) | (block >= exact.last_start)
    # Exact blocks come first even where they hold no real token, so that they never lend their slot to another block.
    is_real = (n > 0)[:, None, None].expand_as(scores)
    scores = scores.masked_fill(~is_real, -torch.inf).masked_fill(is_exact, torch.inf)
    slots = settings.num_kept(kv_len)
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :slots]
    mask = torch.zeros_like(is_real).scatter(-1, chosen, True) & is_real
    count = mask.sum(-1)
    # Ascending indices read memory in order; what is not kept goes to a spare last slot.
    place = torch.where(mask, mask.cumsum(-1) - 1, slots)
    kept = place.new_zeros(*place.shape[:-1], slots + 1).scatter(-1, place, block.expand_as(place))[..., :slots]
    rows = settings.exact_queries(q_len, kv_len)
    row = torch.arange(scores.shape[2], device=q_bar.device)
    count = torch.where((row < rows.num_first) | (row >= rows.last_start), num_keys, count)
    return torch.cat([count[..., None], kept], -1).int()


def kept_block_mask(kept: Tensor, num_keys: int) -> Tensor:
    """(..., 1 + slots) counts and indices as a (..., T) bool mask."""
    num_kept, kept = kept[..., 0], kept[..., 1:]
    slot = torch.arange(kept.shape[-1], device=kept.device)
    used = slot < num_kept[..., None]
    mask = torch.zeros(*kept.shape[:-1], num_keys + 1, dtype=torch.bool, device=kept.device)
    # Unused slots write to a spare last column.
    mask = mask.scatter(-1, torch.where(used, kept, num_keys).long(), True)
    return mask[..., :num_keys] | (num_kept == num_keys)[..., None]
