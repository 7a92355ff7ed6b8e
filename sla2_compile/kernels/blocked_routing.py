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
    heads, q_len = q.shape[1:3]
    num_keys = k_bar.shape[2]
    size = block_sums(q.new_ones(q_len, 1), settings.block_q)  # (M, 1) tokens of each query block
    q_bar = block_sums(q, settings.block_q) / size
    if proj_q is not None and proj_k is not None:
        q_bar, k_bar = q_bar @ proj_q.to(q_bar.dtype).mT, k_bar @ proj_k.to(k_bar.dtype).mT
    scores = q_bar @ k_bar.repeat_interleave(heads // k_bar.shape[1], 1).mT * settings.scale  # (B, H, M, T)

    exact = settings.exact_keys(kv_len)
    block = torch.arange(num_keys, device=q.device)
    is_exact = (block < exact.num_first) | (block >= exact.last_start)
    # Exact blocks come first even where they hold no real token, so that they never lend their slot to another block.
    is_real = (n > 0)[:, None, None].expand_as(scores)
    scores = scores.masked_fill(~is_real, -torch.inf).masked_fill(is_exact, torch.inf)
    slots = settings.num_kept(kv_len)
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :slots]
    usable = is_real.gather(-1, chosen)
    count = usable.sum(-1)
    # Ascending indices read memory in order; unusable ones sort behind and are then cleared.
    kept = torch.where(usable, chosen, num_keys).sort(-1).values
    kept = torch.where(kept < num_keys, kept, 0)
    rows = settings.exact_queries(q_len, kv_len)
    count[:, :, : rows.num_first] = num_keys
    count[:, :, rows.last_start :] = num_keys
    return torch.cat([count[..., None], kept], -1).int()


def kept_block_mask(kept: Tensor, num_keys: int) -> Tensor:
    """(..., 1 + slots) counts and indices as a (..., T) bool mask."""
    num_kept, kept = kept[..., 0], kept[..., 1:]
    slot = torch.arange(kept.shape[-1], device=kept.device)
    used = slot < num_kept[..., None]
    mask = torch.zeros(*kept.shape[:-1], num_keys + 1, dtype=torch.bool, device=kept.device)
    # Unused slots write to a spare last column.
    mask.scatter_(-1, torch.where(used, kept, num_keys).long(), True)
    return mask[..., :num_keys] | (num_kept == num_keys)[..., None]
