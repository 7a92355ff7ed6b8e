"""The op's settings as every implementation below it takes them, and the shapes of what it saves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import ExactBlocks, exact_blocks, exact_query_blocks, max_kept_blocks, num_blocks
from sla2_compile.quant.formats import rounds_means_values, statistics_dtype


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of `sla2::attention_forward` and `_backward` that are not tensors; see SLA2Config for their meaning."""

    scale: float
    sparsity_units: int
    block_q: int
    block_k: int
    feature_map: str
    qk_format: str | None
    pv_format: str | None
    tail: str
    mixing: str
    token_grid: list[int] | None
    exact_prefix: int
    exact_suffix: int
    fake_quant: bool = False

    @property
    def only_rounds(self) -> bool:
        """Whether formats are to be rounded to, and not to be run by the device's low-bit kernels."""
        return self.fake_quant and self.is_low_bit

    @property
    def smooths_keys(self) -> bool:
        """Whether subtracting the keys' mean changes anything: softmax does not see it, phi and low bits do."""
        return self.tail == "linear" or self.is_low_bit

    @property
    def rounds_means_values(self) -> bool:
        """Whether the values and probabilities of a pooled tail are FP8."""
        return rounds_means_values(self.qk_format, self.pv_format)

    @property
    def is_low_bit(self) -> bool:
        return self.qk_format is not None or self.pv_format is not None

    def num_kept(self, kv_len: int) -> int:
        """Slots of key blocks that a row without exact tokens has."""
        return max_kept_blocks(kv_len, self.block_k, self.sparsity_units, self.exact_prefix, self.exact_suffix)

    def exact_keys(self, kv_len: int) -> ExactBlocks:
        return exact_blocks(kv_len, self.block_k, self.exact_prefix, self.exact_suffix)

    def exact_queries(self, q_len: int, kv_len: int) -> ExactBlocks:
        return exact_query_blocks(q_len, kv_len, self.block_q, self.exact_prefix, self.exact_suffix)


def row_gain(q: Tensor, alpha_gain: Tensor | None, settings: Settings) -> Tensor | None:
    """The gain (H,) of row mixing, 1 where nothing is learned; None for block mixing."""
    if settings.mixing == "row" and alpha_gain is None:
        return q.new_ones(q.shape[1], dtype=statistics_dtype(q.dtype))
    return alpha_gain


def empty_output(q: Tensor) -> Tensor:
    """Uninitialised output for `q` (B, H, N, D): that shape over (B, N, H, D) storage, which models read next."""
    batch, heads, q_len, dim = q.shape
    return q.new_empty(batch, q_len, heads, dim).transpose(1, 2)


def empty_saved(q: Tensor, k: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised sparse_lse, tail_lse (B, H, N) and kept (B, H, M, 1 + slots) int32.

    `kept` holds a query block's count of key blocks, then their indices in ascending order. A row whose count is the
    number of key blocks keeps them all and lists none. Count and indices share a tensor so that no dimension is ever
    1, which would cost a recompilation where a symbolic length makes it 2.
    """
    batch, heads, q_len, _ = q.shape
    rows = num_blocks(q_len, settings.block_q)
    statistics = statistics_dtype(q.dtype)
    return (
        q.new_empty(batch, heads, q_len, dtype=statistics),
        q.new_empty(batch, heads, q_len, dtype=statistics),
        q.new_empty(batch, heads, rows, 1 + settings.num_kept(k.shape[2]), dtype=torch.int32),
    )
