"""The router's choice of key blocks on Hopper, a warp for each query block: the fast path of `triton_router.py`.

A lane has every 32nd key block, so that what all lanes vote on is a word of the block mask, and how many blocks before
its own are chosen is a count of that word's lower bits. Words come in two parts, so that few stand for no blocks:
1,182 blocks take 32 and 8 words and not 64.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sla2_compile.kernels.hardware import capability
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, next_power_of_two

# Codes of scores: signed integers in the same order, between that of empty blocks and that of exact ones.
EMPTY, EXACT = gl.constexpr(-(2**31)), gl.constexpr(2**31 - 1)
# Steps that halve the range of scores, before those that halve the range of codes.
BY_SCORE = gl.constexpr(16)
# Below, `triton_router`'s kernel is as quick: on an H200 it took 0.0094 ms and this one 0.0102 for 3,072 query blocks
# with 512 key blocks, 0.277 and 0.137 for 23,640 with 1,182.
MIN_KEY_BLOCKS = 1024
# More take more registers than a warp has.
MAX_WORDS = 64
# Registers of a lane for up to so many words, with which twelve query blocks share a multiprocessor. More words would
# spill, and get all registers.
REGISTERS, FEW_WORDS = 168, 48


@gluon.jit
def _code_of(score):
    """float32 as signed integers in the same order."""
    bits = score.to(gl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@gluon.jit
def _vote(flags):
    """Words of 32 flags (W, 32), 0 or 1, a lane each; the same in all lanes."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r", [flags],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _count(words):
    """How many bits of each are set."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _count_below(words):
    """How many bits of each are set below the lane's."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 below; mov.u32 below, %lanemask_lt; and.b32 below, below, $1; popc.b32 $0, below; }", "=r,r",
        [words], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _rank(words, before):
    """How many flags come before each of (W, 32), which voted for these words, and how many up to their end."""
    counts = _count(words)
    up_to = gl.associative_scan(counts, 0, _add)
    return before + up_to - counts + _count_below(words), before + gl.max(gl.max(up_to, 0), 0)


@gluon.jit
def _read(scores_ptr, n_ptr, first_word, T, first_key, last_key, layout: gl.constexpr, WORDS: gl.constexpr):
    """Of some words' blocks: their numbers, codes, lowest and highest score, and whether they have real keys.

    Blocks that there are not have the score -inf, and no place before others that have it.
    """
    word = first_word + gl.arange(0, WORDS, layout=gl.SliceLayout(1, layout))
    t = word[:, None] * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, layout))[None, :]
    exists = t < T
    score = gl.load(scores_ptr + t, mask=exists, other=float("-inf")) + 0.0  # turns -0.0 into 0.0
    lowest = gl.min(gl.where(exists, score, float("inf")), 0)
    highest = gl.max(score, 0)
    code = _code_of(score)
    real = exists
    if n_ptr is not None:
        real = gl.load(n_ptr + t, mask=exists, other=0.0) > 0
        code = gl.where(real, code, EMPTY)
    if first_key is not None:
        code = gl.where((t < first_key) | ((t >= last_key) & exists), EXACT, code)
    return t, code, lowest, highest, real


@gluon.jit
def _number(a, b, threshold):
    """How many codes reach a threshold: first of a lane's own, then of all."""
    reached = gl.sum((a >= threshold).to(gl.int32), 0)
    if b is not None:
        reached += gl.sum((b >= threshold).to(gl.int32), 0)
    return gl.sum(reached, 0)


@gluon.jit
def _write(kept_ptr, bits_ptr, t, chosen, rank, T, words, keeps_all):
    """The chosen ones' numbers, by their ranks, and words of the mask."""
    gl.store(kept_ptr + rank, t, mask=chosen > 0)
    # Blocks that there are not count as kept.
    bits = _vote(gl.where(t < T, chosen, 1))
    # Each word by a lane of its own.
    word = t >> 5
    gl.store(bits_ptr + word, gl.where(keeps_all, -1, bits), mask=(word < words) & ((t & 31) == (word & 31)))


@gluon.jit
def _choose_rows_kernel(
    scores_ptr, n_ptr, kept_ptr, bits_ptr, num_nonempty_ptr, H, M, T, pitch, slots, words, first_key, last_key,
    first_row, last_row, WORDS: gl.constexpr, MORE_WORDS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Grid (B H M,): as `triton_router._choose_kernel`. n_ptr None: all blocks have real keys.

    first_key None: no keys are exact, and no queries.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 1], [1, 0])
    row = gl.program_id(0).to(gl.int64)
    scores_ptr += row * pitch
    kept_ptr += row * (1 + slots)
    bits_ptr += row * words
    if n_ptr is not None:
        n_ptr += row // (H * M) * T
    t, codes, lowest, highest, real = _read(scores_ptr, n_ptr, 0, T, first_key, last_key, layout, WORDS)
    more_t, more_codes, more_real = t, None, real
    if MORE_WORDS > 0:
        more_t, more_codes, more_lowest, more_highest, more_real = _read(
            scores_ptr, n_ptr, WORDS, T, first_key, last_key, layout, MORE_WORDS
        )
        lowest, highest = gl.minimum(lowest, more_lowest), gl.maximum(highest, more_highest)
    lowest, highest = gl.min(lowest, 0), gl.max(highest, 0)

    # As `triton_router._reached_by`: a code that the best `slots` reach and no others, if no two equal the last.
    low, high = T.to(gl.int64) * 0 + EMPTY, T.to(gl.int64) * 0 + EXACT
    count, step = T, T * 0
    if first_key is not None:
        if first_key + T - last_key >= slots:
            low, count = high, slots
    while (count != slots) & (high - low > 1):
        middle = 0.5 * (lowest + highest)
        by_score = gl.minimum(gl.maximum(_code_of(middle).to(gl.int64), low + 1), high - 1)
        threshold = gl.where(step < BY_SCORE, by_score, low + ((high - low) >> 1))
        reached = _number(codes, more_codes, threshold.to(gl.int32))
        is_low = reached >= slots
        count = gl.where(is_low, reached, count)
        low, high = gl.where(is_low, threshold, low), gl.where(is_low, high, threshold)
        lowest, highest = gl.where(is_low, middle, lowest), gl.where(is_low, highest, middle)
        step += 1
    threshold = low.to(gl.int32)

    chosen, more_chosen = (codes >= threshold).to(gl.int32), real
    if MORE_WORDS > 0:
        more_chosen = (more_codes >= threshold).to(gl.int32)
    if count != slots:
        # Not all that reach it have a place: of those that equal it, the first ones.
        places = slots
        if threshold < EXACT:
            places -= _number(codes, more_codes, threshold + 1)
        equal = (codes == threshold).to(gl.int32)
        rank, before = _rank(_vote(equal), 0)
        chosen = gl.where(codes > threshold, 1, gl.where(rank < places, equal, 0))
        if MORE_WORDS > 0:
            equal = (more_codes == threshold).to(gl.int32)
            rank, before = _rank(_vote(equal), before)
            more_chosen = gl.where(more_codes > threshold, 1, gl.where(rank < places, equal, 0))
    chosen = gl.where(real, chosen, 0)
    if MORE_WORDS > 0:
        more_chosen = gl.where(more_real, more_chosen, 0)
    if n_ptr is not None:
        num_nonempty = gl.sum(gl.sum(real.to(gl.int32), 0), 0)
        if MORE_WORDS > 0:
            num_nonempty += gl.sum(gl.sum(more_real.to(gl.int32), 0), 0)
        gl.store(num_nonempty_ptr + row // (H * M), num_nonempty, mask=row % (H * M) == 0)

    keeps_all = False
    if first_key is not None:
        m = (row % M).to(gl.int32)
        keeps_all = (m < first_row) | (m >= last_row)
    rank, count = _rank(_vote(chosen), 0)
    _write(kept_ptr + 1, bits_ptr, t, chosen, rank, T, words, keeps_all)
    if MORE_WORDS > 0:
        rank, count = _rank(_vote(more_chosen), count)
        _write(kept_ptr + 1, bits_ptr, more_t, more_chosen, rank, T, words, keeps_all)
    gl.store(kept_ptr, gl.where(keeps_all, T, count))
    slot = gl.arange(0, SLOTS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(kept_ptr + 1 + slot, slot * 0, mask=(slot >= count) & (slot < slots))


def choose_rows(
    scores: Tensor,
    n: Tensor,
    kept: Tensor,
    bits: Tensor,
    num_nonempty: Tensor | None,
    limits: tuple[int, int, int, int],
) -> bool:
    """Choose, and return True, or False where this kernel cannot or would be no quicker.

    Args:
        scores: (B, H, M, T or more) float32.
        n: (B, T) float32 real tokens of each key block.
        kept: (B, H, M, 1 + slots) int32, written as `settings.empty_saved` describes.
        bits: (B, H, M, W) int32, written as `triton_router.Choice` describes.
        num_nonempty: (B,) int32, likewise; None: all blocks have a real key.
        limits: first and last of the key blocks, and of the query blocks, between which none is exact.
    """
    (batch, heads, rows, pitch), T, slots = scores.shape, n.shape[1], kept.shape[3] - 1
    words = bits.shape[3]
    if capability(scores.device)[0] != 9 or T < MIN_KEY_BLOCKS or words > MAX_WORDS:
        return False
    most = next_power_of_two(words + 1) // 2
    more = 0 if words == most else next_power_of_two(words - most)
    exact = limits if limits != (0, T, 0, rows) else (None,) * 4
    launch(
        _choose_rows_kernel, (batch * heads * rows,),
        scores, None if num_nonempty is None else n, kept, bits, num_nonempty, heads, rows, T, pitch, slots, words,
        *exact, WORDS=most, MORE_WORDS=more, SLOTS=max(32, next_power_of_two(slots)), num_warps=1,
        maxnreg=REGISTERS if words <= FEW_WORDS else MAX_REGISTERS,
    )  # fmt: skip
    return True
