"""Which query blocks keep a key block: `kept` turned round, on the GPU, in a fixed order.

Three results. `bits`: the block mask as 32-bit words, for the tail's kernels. `lists`: per key head, the query blocks
of each key block one after the other, ascending. A split of long lists into parts of about equal length, since a few
popular key blocks would otherwise keep one multiprocessor busy after all others are done.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import next_power_of_two
from sla2_compile.kernels.settings import Settings

# A list is split where it is both this long and this many times the mean length: fewer parts would leave the last
# multiprocessors waiting, more would cost memory for partial sums (half of k and v at 4 times the mean).
MIN_PART_LENGTH = 24
PART_LENGTH_RATIO = 3


@dataclass(frozen=True)
class InverseIndex:
    """`B G` is the batch times the key heads; a query block of the group is g * M + m, g its head in the group."""

    bits: Tensor  # (B H, M, W) int32, bit j % 32 of word j // 32 is set where the query block keeps key block j
    count: Tensor  # (B G, T) int32 entries of each list
    start: Tensor  # (B G, T) int32 their first entry
    lists: Tensor  # (B G, capacity) int32 query blocks
    first_part: Tensor  # (B G, T) int32 first part of a list that is split
    part_key: Tensor  # (B G, max_parts) int32 key block of a part; -1 past the last one
    part_length: int  # lists of at least twice this many entries are split into parts of at least this many


@triton.jit
def _bits_kernel(kept_ptr, bits_ptr, slots, T, W, SLOT_TILE: tl.constexpr, WORD_TILE: tl.constexpr):
    """Grid (B H M, W / WORD_TILE)."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORD_TILE + tl.arange(0, WORD_TILE)
    kept_ptr += row * (1 + slots)
    count = tl.load(kept_ptr)
    bits = tl.zeros([WORD_TILE], tl.int32)
    if count == T:
        bits += tl.where((word + 1) * 32 <= T, -1, (1 << (T & 31)) - 1)
    else:
        for first in range(0, count, SLOT_TILE):
            slot = first + tl.arange(0, SLOT_TILE)
            key = tl.load(kept_ptr + 1 + slot, mask=slot < count, other=-1)
            bit = tl.where(key >= 0, 1 << (key & 31), 0)
            # Indices differ, so that adding bits is the same as or-ing them.
            bits += tl.sum(tl.where((key >> 5)[:, None] == word[None, :], bit[:, None], 0), 0)
    tl.store(bits_ptr + row * W + word, bits, mask=word < W)


@triton.jit
def _count_kernel(bits_ptr, count_ptr, num_rows, T, W, ROW_TILE: tl.constexpr):
    """Grid (B G, W): the lengths of 32 lists."""
    head, word = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bit = tl.arange(0, 32)
    bits_ptr += head * num_rows * W + word
    count = tl.zeros([32], tl.int32)
    for first in range(0, num_rows, ROW_TILE):
        row = first + tl.arange(0, ROW_TILE)
        words = tl.load(bits_ptr + row.to(tl.int64) * W, mask=row < num_rows, other=0)
        count += tl.sum((words[:, None] >> bit[None, :]) & 1, 0)
    key = word * 32 + bit
    tl.store(count_ptr + head * T + key, count, mask=key < T)


@triton.jit
def _plan_kernel(count_ptr, start_ptr, first_part_ptr, part_key_ptr, T, max_parts, part_length, TILE: tl.constexpr):
    """Grid (B G,): where the lists start, and the parts of the long ones."""
    head = tl.program_id(0).to(tl.int64)
    count_ptr, start_ptr, first_part_ptr = count_ptr + head * T, start_ptr + head * T, first_part_ptr + head * T
    part_key_ptr += head * max_parts
    entries = tl.zeros([], tl.int32)
    num_parts = tl.zeros([], tl.int32)
    for first in range(0, T, TILE):
        key = first + tl.arange(0, TILE)
        count = tl.load(count_ptr + key, mask=key < T, other=0)
        parts = tl.where(count >= 2 * part_length, count // part_length, 0)
        first_part = num_parts + tl.cumsum(parts, 0) - parts
        tl.store(start_ptr + key, entries + tl.cumsum(count, 0) - count, mask=key < T)
        tl.store(first_part_ptr + key, first_part, mask=key < T)
        for part in range(tl.max(parts, 0)):
            tl.store(part_key_ptr + first_part + part, key, mask=part < parts)
        entries += tl.sum(count, 0)
        num_parts += tl.sum(parts, 0)
    for first in range(num_parts, max_parts, TILE):
        part = first + tl.arange(0, TILE)
        tl.store(part_key_ptr + part, tl.full([TILE], -1, tl.int32), mask=part < max_parts)


@triton.jit
def _fill_kernel(bits_ptr, start_ptr, lists_ptr, num_rows, T, W, capacity, ROW_TILE: tl.constexpr):
    """Grid (B G, W): the entries of 32 lists."""
    head, word = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = word * 32 + tl.arange(0, 32)
    bits_ptr += head * num_rows * W + word
    start = tl.load(start_ptr + head * T + key, mask=key < T, other=0)
    for first in range(0, num_rows, ROW_TILE):
        row = first + tl.arange(0, ROW_TILE)
        words = tl.load(bits_ptr + row.to(tl.int64) * W, mask=row < num_rows, other=0)
        is_kept = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
        place = start[None, :] + tl.cumsum(is_kept, 0) - 1
        entry = tl.broadcast_to(row[:, None], [ROW_TILE, 32])
        tl.store(lists_ptr + head * capacity + place, entry, mask=is_kept != 0)
        start += tl.sum(is_kept, 0)


def inverse_index(kept: Tensor, num_key_heads: int, q_len: int, kv_len: int, settings: Settings) -> InverseIndex:
    """The inverse of `kept` (B, H, M, 1 + slots)."""
    batch, heads, rows, _ = kept.shape
    kept, slots = kept.contiguous(), kept.shape[3] - 1
    T, exact = num_blocks(kv_len, settings.block_k), settings.exact_queries(q_len, kv_len).count
    words, key_heads, group = num_blocks(T, 32), batch * num_key_heads, heads // num_key_heads
    capacity = group * (exact * T + (rows - exact) * slots)
    part_length = max(MIN_PART_LENGTH, PART_LENGTH_RATIO * num_blocks(capacity, T))
    new = kept.new_empty
    index = InverseIndex(
        bits=new(batch * heads, rows, words),
        count=new(key_heads, T),
        start=new(key_heads, T),
        lists=new(key_heads, capacity),
        first_part=new(key_heads, T),
        part_key=new(key_heads, max(1, capacity // part_length)),
        part_length=part_length,
    )
    max_parts = index.part_key.shape[1]
    word_tile, grid = min(128, next_power_of_two(words)), (key_heads, words)
    launch(
        _bits_kernel, (batch * heads * rows, num_blocks(words, word_tile)),
        kept, index.bits, slots, T, words, SLOT_TILE=16, WORD_TILE=word_tile, num_warps=1,
    )  # fmt: skip
    launch(_count_kernel, grid, index.bits, index.count, group * rows, T, words, ROW_TILE=256, num_warps=4)
    launch(
        _plan_kernel, (key_heads,), index.count, index.start, index.first_part, index.part_key, T, max_parts,
        part_length, TILE=1024, num_warps=4,
    )  # fmt: skip
    launch(
        _fill_kernel, grid, index.bits, index.start, index.lists, group * rows, T, words, capacity, ROW_TILE=128,
        num_warps=4,
    )  # fmt: skip
    return index
