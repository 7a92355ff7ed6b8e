"""The router on the GPU: float32 scores of block means, and the best key blocks of each query block.

Deterministic: equal scores go to the lower index. Among many key blocks Hopper chooses with `gluon_choose.py`. Twin:
`blocked_routing.route`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_choose import choose_rows
from sla2_compile.kernels.hardware import capability
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, next_power_of_two, padded_dim
from sla2_compile.kernels.settings import Settings

# Part of the head dimension that a step of a float32 product takes.
CHUNK = 32
# Rows of scores begin at multiples of so many numbers.
ALIGNMENT = 16
# Of a thread that chooses: as many rows as these allow share a multiprocessor. With a mask it would spill at 96.
CHOOSE_REGISTERS, MASKED_CHOOSE_REGISTERS = 96, 128


@triton.jit
def _project_kernel(
    q_ptr, k_ptr, proj_q_ptr, proj_k_ptr, q_out_ptr, k_out_ptr, num_q, num_k, proj_q_sd, proj_q_se, proj_k_sd,
    proj_k_se, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (rows of q and of k / ROWS, BLOCK_D / CHUNK): each block mean times its projection, transposed."""
    tiles_q = (num_q + ROWS - 1) // ROWS
    tile = tl.program_id(0)
    is_key = tile >= tiles_q
    length, sd, se = num_q, proj_q_sd, proj_q_se
    if is_key:
        tile -= tiles_q
        q_ptr, q_out_ptr, proj_q_ptr = k_ptr, k_out_ptr, proj_k_ptr
        length, sd, se = num_k, proj_k_sd, proj_k_se
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    out = tl.zeros([ROWS, CHUNK], tl.float32)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=2):
        e = first + tl.arange(0, CHUNK)
        x = tl.load(q_ptr + row[:, None] * D + e[None, :], mask=(row < length)[:, None] & (e < D)[None, :], other=0.0)
        inside = (e < D)[:, None] & (d < D)[None, :]
        proj = tl.load(proj_q_ptr + d[None, :] * sd + e[:, None] * se, mask=inside, other=0.0).to(tl.float32)
        out = tl.dot(x, proj, out, input_precision="tf32x3")
    tl.store(q_out_ptr + row[:, None] * D + d[None, :], out, mask=(row < length)[:, None] & (d < D)[None, :])


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, scores_ptr, H, GROUP, M, T, pitch, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (B H, M / ROWS, T / KEYS): scale * q_bar k_bar^T, in rows that begin `pitch` numbers apart."""
    head = tl.program_id(0).to(tl.int64)
    kv_head = head // H * (H // GROUP) + head % H // GROUP
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    # A part of the head dimension at a time: a whole one in three tf32 parts does not fit into registers.
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=2):
        d = first + tl.arange(0, CHUNK)
        q_ptrs, k_ptrs = q_ptr + (head * M + m)[:, None] * D + d[None, :], k_ptr + (kv_head * T + t)[None, :] * D
        q = tl.load(q_ptrs, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        k = tl.load(k_ptrs + d[:, None], mask=(t < T)[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q, k, scores, input_precision="tf32x3")
    ptrs = scores_ptr + (head * M + m)[:, None] * pitch + t[None, :]
    # Up to the pitch: where that is known to be a multiple of 16, a thread's neighbours leave together.
    tl.store(ptrs, scores * scale, mask=(m < M)[:, None] & (t < pitch)[None, :])


@triton.jit
def _ordered_code(x):
    """float32 as unsigned integers in the same order."""
    code = x.to(tl.int32, bitcast=True)
    return tl.where(code < 0, ~code, code ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _count_bits(x):
    """How many bits of x, int32, are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _as_words(flags, place):
    """Flags (W, 32), 0 or 1, as bits of int32 words (W,)."""
    return tl.sum(flags << place[None, :], 1)


@triton.jit
def _rank(words, place):
    """How many bits of words (W,) are set before each (W, 32)."""
    in_word = _count_bits(words)
    before = tl.cumsum(in_word, 0) - in_word
    return before[:, None] + _count_bits(words[:, None] & ((1 << place) - 1)[None, :])


@triton.jit
def _reached_by(codes, slots, T, num_exact, lowest, highest):
    """(threshold, count): a code that the best `slots` of `codes` (BLOCK_T,) reach and no others; count is `slots`.

    Where several equal the best one that would be too many, the threshold is theirs and the count is larger. Codes are
    at least 1 but for padding; `num_exact` of them are the largest there is. The search halves the range of scores,
    from `lowest` to `highest`: nine steps at 512 normal ones, where bits of the code from the highest would be twenty.
    After 16 steps it halves the range of codes, which ends whatever the scores are.
    """
    low, high = tl.full([], 1, tl.uint32), tl.full([], 0xFFFFFFFF, tl.uint32)
    count = tl.zeros([], tl.int32) + T
    if num_exact >= slots:
        low, count = high, tl.zeros([], tl.int32) + slots
    step = tl.zeros([], tl.int32)
    while (count != slots) & (high - low > 1):
        middle = 0.5 * (lowest + highest)
        by_score = tl.minimum(tl.maximum(_ordered_code(middle), low + 1), high - 1)
        code = tl.where(step < 16, by_score, low + ((high - low) >> 1)).to(tl.uint32)
        num_better = tl.sum((codes >= code).to(tl.int32), 0)
        is_low = num_better >= slots
        count = tl.where(is_low, num_better, count)
        low, high = tl.where(is_low, code, low).to(tl.uint32), tl.where(is_low, high, code).to(tl.uint32)
        lowest, highest = tl.where(is_low, middle, lowest), tl.where(is_low, highest, middle)
        step += 1
    return low, count


@triton.jit
def _choose_kernel(
    scores_ptr, n_ptr, kept_ptr, bits_ptr, num_nonempty_ptr, H, M, T, pitch, slots, words, first_key, last_key,
    first_row, last_row, BLOCK_T: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (B H M,): count and ascending indices of the chosen key blocks, and the same as a bit mask.

    Key blocks before `first_key` and from `last_key` on are always chosen; query blocks before `first_row` and from
    `last_row` on keep all. num_nonempty_ptr None: nobody asks how many key blocks of a batch element have a real key.
    """
    row = tl.program_id(0).to(tl.int64)
    m = (row % M).to(tl.int32)
    b = row // (H * M)
    # As words of 32 key blocks: sums along a word stay within few threads.
    WORDS: tl.constexpr = BLOCK_T // 32
    word, place = tl.arange(0, WORDS), tl.arange(0, 32)
    t = word[:, None] * 32 + place[None, :]
    score = tl.load(scores_ptr + row * pitch + t, mask=t < T, other=0.0) + 0.0  # turns -0.0 into 0.0
    # In any order: then a thread has its own elements first.
    lowest = tl.min(tl.reshape(tl.where(t < T, score, float("inf")), [BLOCK_T], can_reorder=True), 0)
    highest = tl.max(tl.reshape(tl.where(t < T, score, float("-inf")), [BLOCK_T], can_reorder=True), 0)
    # Exact blocks come first, empty ones last, padding never.
    code = tl.minimum(tl.maximum(_ordered_code(score), 2), 0xFFFFFFFE)
    if num_nonempty_ptr is not None:
        real = tl.load(n_ptr + b * T + t, mask=t < T, other=0.0) > 0
        tl.store(num_nonempty_ptr + b, tl.sum(tl.sum(real.to(tl.int32), 1), 0), mask=row % (H * M) == 0)
        code = tl.where(real, code, 1)
    code = tl.where((t < first_key) | (t >= last_key), 0xFFFFFFFF, code)
    code = tl.where(t < T, code, 0).to(tl.uint32)
    all_codes = tl.reshape(code, [BLOCK_T], can_reorder=True)
    threshold, reach = _reached_by(all_codes, slots, T, first_key + T - last_key, lowest, highest)
    chosen = (code >= threshold) & (t < T)
    if reach != slots:
        # Not all that reach it have a place: of those that equal it, the first ones.
        num_better = tl.sum((all_codes > threshold).to(tl.int32), 0)
        equal = ((code == threshold) & (t < T)).to(tl.int32)
        first = _rank(_as_words(equal, place), place) < slots - num_better
        chosen = (code > threshold) | ((equal > 0) & first)
    if num_nonempty_ptr is not None:
        chosen = chosen & (tl.load(n_ptr + b * T + t, mask=t < T, other=0.0) > 0)
    chosen = chosen.to(tl.int32)
    chosen_words = _as_words(chosen, place)
    count = tl.sum(_count_bits(chosen_words), 0)

    keeps_all = (m < first_row) | (m >= last_row)
    kept_ptr += row * (1 + slots)
    tl.store(kept_ptr, tl.where(keeps_all, T, count))
    tl.store(kept_ptr + 1 + _rank(chosen_words, place), t, mask=chosen > 0)
    slot = tl.arange(0, SLOTS)
    tl.store(kept_ptr + 1 + slot, tl.zeros([SLOTS], tl.int32), mask=(slot >= count) & (slot < slots))
    # Blocks that there are not count as kept.
    end = tl.maximum(T - word * 32, 0)
    past_end = tl.where(end < 32, -1 << (end & 31), 0)
    bits = tl.where(keeps_all, -1, chosen_words | past_end)
    tl.store(bits_ptr + row * words + word, bits, mask=word < words)


@dataclass(frozen=True)
class Choice:
    """What the router chose beside `kept`."""

    bits: Tensor  # (B, H, M, W) int32, bit j % 32 of word j // 32: it keeps key block j, or there is none; W is even
    num_nonempty: Tensor | None  # (B,) int32 key blocks with a real key; None: all have one


def route(
    q_bar: Tensor,
    k_bar: Tensor,
    n: Tensor,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    kept: Tensor,
    q_len: int,
    kv_len: int,
    settings: Settings,
    *,
    masked: bool,
    gluon: bool = True,
) -> Choice:
    """Choose the key blocks of each query block.

    Args:
        q_bar: (B, H, M, D) float32 block means.
        k_bar: (B, G, T, D) float32 block means; smoothing them changes nothing.
        n: (B, T) real tokens of each key block.
        proj_q, proj_k: (D, D) or None for the identity.
        kept: (B, H, M, 1 + slots) int32, written as `settings.empty_saved` describes.
        q_len, kv_len: tokens.
        settings: the op's.
        masked: whether some keys may not be real.
        gluon: whether a Gluon kernel may run.
    """
    (batch, heads, rows, dim), (_, key_heads, total, _) = q_bar.shape, k_bar.shape
    if proj_q is not None and proj_k is not None:
        q_bar, k_bar = _project(q_bar, k_bar, proj_q, proj_k)
    pitch = ALIGNMENT * num_blocks(total, ALIGNMENT)
    scores = q_bar.new_empty(batch, heads, rows, pitch)
    tile = 64
    launch(
        _scores_kernel, (batch * heads, num_blocks(rows, tile), num_blocks(total, tile)),
        q_bar, k_bar, scores, heads, heads // key_heads, rows, total, pitch, settings.scale,
        D=dim, BLOCK_D=padded_dim(dim), ROWS=tile, KEYS=tile, CHUNK=min(CHUNK, padded_dim(dim)), num_warps=4,
        # Only Hopper fits without being told.
        maxnreg=None if capability(q_bar.device)[0] == 9 else MAX_REGISTERS,
    )  # fmt: skip
    words = 2 * num_blocks(total, 64)
    bits = kept.new_empty(batch, heads, rows, words)
    num_nonempty = kept.new_empty(batch) if masked else None
    keys, queries = settings.exact_keys(kv_len), settings.exact_queries(q_len, kv_len)
    limits = (keys.num_first, keys.last_start, queries.num_first, queries.last_start)
    arguments = (scores, n, kept, bits, num_nonempty, limits)
    if not (gluon and choose_rows(*arguments)):
        choose(*arguments)
    return Choice(bits, num_nonempty)


def choose(
    scores: Tensor,
    n: Tensor,
    kept: Tensor,
    bits: Tensor,
    num_nonempty: Tensor | None,
    limits: tuple[int, int, int, int],
) -> None:
    """Choose on any GPU; `gluon_choose.choose_rows` says what the arguments are."""
    (batch, heads, rows, pitch), total, slots = scores.shape, n.shape[1], kept.shape[3] - 1
    block_t = max(64, next_power_of_two(total))
    launch(
        _choose_kernel, (batch * heads * rows,),
        scores, n, kept, bits, num_nonempty, heads, rows, total, pitch, slots, bits.shape[3], *limits,
        BLOCK_T=block_t, SLOTS=next_power_of_two(slots),
        # Sums over a warp are one instruction, over several a wait for each other.
        num_warps=min(8, max(1, block_t // 512)),
        maxnreg=CHOOSE_REGISTERS if num_nonempty is None else MASKED_CHOOSE_REGISTERS,
    )  # fmt: skip


def _project(q_bar: Tensor, k_bar: Tensor, proj_q: Tensor, proj_k: Tensor) -> tuple[Tensor, Tensor]:
    """q_bar proj_q^T and k_bar proj_k^T."""
    dim, outputs = q_bar.shape[3], (torch.empty_like(q_bar), torch.empty_like(k_bar))
    num_q, num_k = (x.numel() // dim for x in (q_bar, k_bar))
    rows, chunk = 64, min(CHUNK, padded_dim(dim))
    launch(
        _project_kernel, (num_blocks(num_q, rows) + num_blocks(num_k, rows), padded_dim(dim) // chunk),
        q_bar, k_bar, proj_q, proj_k, *outputs, num_q, num_k, *proj_q.stride(), *proj_k.stride(),
        D=dim, BLOCK_D=padded_dim(dim), ROWS=rows, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return outputs
