"""Counts of blocks: how many a sequence has, how many a query keeps, which are exact whatever the router says.

All functions take plain or symbolic integers, so that the same arithmetic serves the op, its fake and `explain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sla2_compile.config import SPARSITY_UNIT, SLA2Config


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks of `block_size` that `num_tokens` fill, the last one possibly short."""
    return (num_tokens + block_size - 1) // block_size


def num_kept_blocks(num_key_blocks: int, sparsity_units: int) -> int:
    """Key blocks that the router keeps for one query block: (1 - sparsity) of them rounded half up, at least one."""
    rounded = (num_key_blocks * (SPARSITY_UNIT - sparsity_units) + SPARSITY_UNIT // 2) // SPARSITY_UNIT
    return torch.sym_max(1, rounded)


@dataclass(frozen=True)
class ExactBlocks:
    """Blocks that hold at least one exact token: the first `num_first` of them, and all from `last_start` on."""

    num_first: int
    last_start: int
    num_blocks: int

    @property
    def count(self) -> int:
        # The difference is never negative, which only sym_max lets a symbolic length see.
        return self.num_first + torch.sym_max(0, self.num_blocks - self.last_start)


def exact_blocks(num_tokens: int, block_size: int, exact_prefix: int, exact_suffix: int) -> ExactBlocks:
    """The blocks of a sequence touched by its first `exact_prefix` and last `exact_suffix` tokens."""
    total = num_blocks(num_tokens, block_size)
    first = torch.sym_min(total, num_blocks(exact_prefix, block_size))
    # Without a suffix the last block is not exact even where it is short. No branch: the suffix may be unbacked.
    round_up = (1 - torch.sym_min(1, exact_suffix)) * (block_size - 1)
    last_start = (torch.sym_max(0, num_tokens - exact_suffix) + round_up) // block_size
    return ExactBlocks(first, torch.sym_max(first, last_start), total)


def exact_query_blocks(q_len: int, kv_len: int, block_size: int, exact_prefix: int, exact_suffix: int) -> ExactBlocks:
    """Query blocks that keep every key block. Exact tokens are keys; they are queries too where the lengths agree."""
    if q_len == kv_len:
        return exact_blocks(q_len, block_size, exact_prefix, exact_suffix)
    return exact_blocks(q_len, block_size, 0, 0)


def max_kept_blocks(kv_len: int, block_k: int, sparsity_units: int, exact_prefix: int, exact_suffix: int) -> int:
    """Most key blocks that a query block without exact tokens keeps: the exact ones and the router's choice."""
    total = num_blocks(kv_len, block_k)
    exact = exact_blocks(kv_len, block_k, exact_prefix, exact_suffix).count
    return torch.sym_min(total, exact + num_kept_blocks(total, sparsity_units))


def delivered_sparsity(q_len: int, kv_len: int, config: SLA2Config) -> float:
    """Fraction of (query block, key block) pairs that skip the sparse branch, after rounding and exact tokens."""
    total_q, total_k = num_blocks(q_len, config.block_q), num_blocks(kv_len, config.block_k)
    if total_q == 0 or total_k == 0:
        return 0.0
    kept = max_kept_blocks(kv_len, config.block_k, config.sparsity_units, config.exact_prefix, config.exact_suffix)
    all_rows = exact_query_blocks(q_len, kv_len, config.block_q, config.exact_prefix, config.exact_suffix).count
    return float(1 - (all_rows * total_k + (total_q - all_rows) * kept) / (total_q * total_k))
