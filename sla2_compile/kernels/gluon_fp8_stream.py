"""What a group of warps of `gluon_fp8_attention.py` does: its share of fetching tiles, and its loop over them.

A tile's products with the values are waited for before the next scores are issued, unlike in `gluon_stream.py`: that
leaves 128 registers enough, so that four groups share a multiprocessor, and while one waits three others work.

The two groups of a program fetch tiles in turn, the first the even ones of all its tiles and the second the odd ones:
none of 128 registers a thread could be left to warps that fetch alone. Whoever fetches a tile waits until the other
group is done with the one in whose place it comes.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sla2_compile.kernels.gluon_stream import (
    SMALLEST_FACTOR,
    TOP_CODE,
    group_barrier,
    left_operand,
    mask_means,
    mask_short,
    max_in_thread,
    out_layout,
    scores_layout,
    shrink_assembly,
    shrink_constraints,
    sum_in_thread,
    to_operand,
)
from sla2_compile.kernels.gluon_tiles import phase_of, slot_of

# Of a query block: the tables have places for no more.
MAX_TILES = 64
# By so many powers of two a score may exceed the peak before that is raised. Weights that are 0 then may be 2^-15.8 of
# the largest, in place of 2^-17.8; but of normal scores 8 % of a warp's steps raise a peak and not 27 %.
HEADROOM = gl.constexpr(2)
# Of tables in shared memory.
TABLE_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLACES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_SHIFT = gl.constexpr(math.log2(TOP_CODE.value) - HEADROOM.value)


@gluon.jit
def place_of(turn, H, GROUP, M):
    """Of the query block a program comes to at its turn: its head of all, itself, batch element, head, key head."""
    index = gl.program_id(0) + turn * gl.num_programs(0)
    head, m = index // M, index % M
    return head.to(gl.int64), m, head // H, head % H, (head // GROUP).to(gl.int64)


@gluon.jit
def _block_of(kept_row, tile, count, T):
    """Of tiles of a query block the blocks of codes: kept ones from the last to the first, then those of means."""
    return gl.load(kept_row + (count - tile), mask=tile < count, other=T + tile - count)


@gluon.jit
def write_tables(
    turn, kept_ptr, k_scale_ptr, numbers, scales, first, H, GROUP, M, T, slots, num_blocks
):  # fmt: skip
    """What the loop over a query block's tiles looks up: scales of all, and numbers of those this group fetches.

    Args:
        turn: which of the program's query blocks; there may be none.
        numbers: (32,) int16 in shared memory, for every second tile from `first` on.
        scales: (64,) float32 in shared memory.

    Returns:
        How many keys' tiles and how many tiles there are, and the key head's first block of codes.
    """
    head, m, _, _, kv_head = place_of(turn, H, GROUP, M)
    block = head * M + m
    num_means = (T + 63) // 64
    kept_row = kept_ptr + block * (1 + slots)
    count = gl.load(kept_row, mask=block < num_blocks, other=0)
    num_tiles = gl.where(count == 0, 0, count + num_means)
    first_block = kv_head * (T + num_means)
    # Until all warps are done with the tables.
    group_barrier()
    tile = gl.arange(0, 64, layout=PLACES)
    number = _block_of(kept_row, tile, count, T)
    scales.store(gl.load(k_scale_ptr + first_block + number, mask=tile < num_tiles, other=0.0))
    own = first + 2 * gl.arange(0, 32, layout=PLACES)
    numbers.store(_block_of(kept_row, own, count, T).to(gl.int16))
    return count, num_tiles, first_block.to(gl.int32)


@gluon.jit
def _entry(table, place):
    """A number of a table in shared memory, by all threads."""
    alone = table._reinterpret(table.dtype, [table.shape[0], 1], TABLE_LAYOUT).index(place)
    return gl.sum(alone.load(PLACES), 0)


@gluon.jit
def fetch(k_tiles, v_tiles, numbers, first_block, tile, step, k_smem, v_smem, full, empty):
    """A query block's tile number `tile`, of all tiles number `step`, once its place in the ring is empty."""
    STAGES: gl.constexpr = k_smem.shape[0]
    slot = slot_of(step, STAGES)
    block = first_block + _entry(numbers, tile >> 1).to(gl.int32)
    mbarrier.wait(empty.index(slot), phase_of(step, STAGES) ^ 1)
    mbarrier.expect(full.index(slot), k_tiles.block_type.nbytes + v_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(k_tiles, [block * 64, 0], full.index(slot), k_smem.index(slot))
    tma.async_copy_global_to_shared(v_tiles, [block * v_smem.shape[1], 0], full.index(slot), v_smem.index(slot))


@gluon.constexpr_function
def _raise_assembly(headroom):
    """PTX: peaks of a thread's two rows, raised where they must be, and what sums up to here shrink by.

    A warp none of whose scores is too large looks at no other thread's.
    """
    rows = "\n".join(
        f"""
        shfl.sync.bfly.b32 y, ${4 + row}, 2, 0x1f, 0xffffffff;
        max.f32 x, y, ${4 + row};
        shfl.sync.bfly.b32 y, x, 1, 0x1f, 0xffffffff;
        max.f32 x, x, y;
        cvt.rpi.f32.f32 x, x;
        add.f32 y, ${6 + row}, {headroom}.0;
        setp.gt.f32 above, x, y;
        selp.f32 ${row}, x, ${6 + row}, above;
        sub.f32 y, ${6 + row}, ${row};
        ex2.approx.ftz.f32 ${2 + row}, y;"""
        for row in range(2)
    )
    return f"""{{
    .reg .pred above, any;
    .reg .f32 x, y;
    mov.f32 $0, $6;
    mov.f32 $1, $7;
    mov.f32 $2, 0f3F800000;
    mov.f32 $3, 0f3F800000;
    add.f32 x, $6, {headroom}.0;
    setp.gt.f32 above, $4, x;
    add.f32 x, $7, {headroom}.0;
    setp.gt.or.f32 above, $5, x, above;
    vote.sync.any.pred any, above, 0xffffffff;
    @!any bra done;
    {rows}
    done:
    }}"""


@gluon.jit
def _raise_peak(largest, peak):
    """(64, 4) peaks, whole numbers, and 2^(old - new), from (64, 4) largest scores of each thread's columns."""
    ASSEMBLY: gl.constexpr = _raise_assembly(HEADROOM)
    return gl.inline_asm_elementwise(
        ASSEMBLY, "=&f,=&f,=&f,=&f,f,f,f,f", [largest, peak], dtype=(gl.float32, gl.float32), is_pure=False, pack=2
    )


@gluon.jit
def _for_columns(x, wide_layout: gl.constexpr):
    """(64, 4), a number for each thread of a row, for the columns that are the thread's: (64, 1, 4, 1)."""
    return gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(3, wide_layout)))[:, None, :, None]


@gluon.jit
def _softmax(scores, peak, total, factor, bias):
    """One step of an online softmax in base 2: weights (64, 64), the peak, the total, what sums shrink by.

    Peaks and totals are (64, 4): of a row a thread has its own total, and the same peak as the other three.
    """
    layout: gl.constexpr = peak.type.layout
    largest = gl.convert_layout(max_in_thread(scores), layout) * factor + bias
    peak, shrinks = _raise_peak(largest, peak)
    wide = gl.reshape(scores, [64, 8, 4, 2])
    wide_layout: gl.constexpr = wide.type.layout
    weights = gl.exp2(wide * factor - _for_columns(peak - (bias + _SHIFT), wide_layout))
    weights = gl.convert_layout(gl.reshape(weights, [64, 64]), scores.type.layout)
    return weights, peak, total * shrinks + sum_in_thread(weights), shrinks


@gluon.jit
def _shrink(acc, shrinks):
    """`acc` (64, D) times (64, 4), equal numbers in each row; skipped by warps for whose rows that is 1."""
    SIZE: gl.constexpr = acc.shape[1] // 2
    wide = gl.reshape(acc, [64, acc.shape[1] // 8, 4, 2])
    wide_layout: gl.constexpr = wide.type.layout
    wide = gl.inline_asm_elementwise(
        shrink_assembly(SIZE), shrink_constraints(SIZE), [wide, _for_columns(shrinks, wide_layout)],
        dtype=gl.float32, is_pure=False, pack=SIZE,
    )  # fmt: skip
    return gl.convert_layout(gl.reshape(wide, acc.shape), acc.type.layout)


@gluon.jit
def _weigh_last(scores, factor, place, last_bias):
    """Scores with `last_bias`, in base 2, added for the mean in the column `place`.

    As bits of words, like `mask_means`: columns compared with the place would be held in registers through the loop.
    """
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, scores.type.layout))
    bit = 1 << (place & 31)
    low, high = gl.where(place < 32, bit, 0), gl.where(place < 32, 0, bit)
    word = (gl.where(column < 32, low, high) >> (column & 6)) >> (column & 25)
    return gl.where(((word & 1) == 1)[None, :], scores + last_bias / factor, scores)


@gluon.jit
def attend_to_tiles(
    part: gl.constexpr, acc, peak, total, step, first, last, num_tiles, q_smem, k_smem, v_smem, full, empty, k_tiles,
    v_tiles, numbers, first_block, scales, factor, bias, words_ptr, T, short_size, last_bias, MEANS: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    """Attend to a query block's tiles `first` to `last`, which is the next one, of `num_tiles`.

    Args:
        part: which of the program's two groups.
        acc: (64, D) float32 sums of weights times values.
        peak, total: (64, 4) float32, see `_softmax`.
        step: how many tiles came before, all query blocks together; the next one has been waited for.
        q_smem: (64, D) queries' codes.
        numbers, scales, first_block: see `write_tables`.
        factor: what makes of a product of codes a score in base 2, but for the keys' scale.
        bias: a whole number, added to scores in base 2.
        words_ptr: for MEANS, the words of the block mask, those of tile i at 2 i.
        short_size: keys of the first tile, fewer than 64 if it is the last, short block.
        last_bias: what the mean of the last key block weighs less than others', in base 2.

    Returns:
        acc, peak, total, step.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    s_layout: gl.constexpr = scores_layout(1)
    p_layout: gl.constexpr = left_operand(out_layout(q_smem.shape[1], 1), 1)
    low, high = 0, 0
    for i in range(first, last):
        slot = slot_of(step, STAGES)
        zeros = gl.zeros([64, 64], gl.float32, layout=s_layout)
        token = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if MEANS:
            low, high = gl.load(words_ptr + 2 * i), gl.load(words_ptr + 2 * i + 1)
        # While the scores are multiplied.
        if (step + part) & 1 == 0:
            # The tile before was the other group's to fetch.
            group_barrier()
            mbarrier.arrive(empty.index(slot_of(step - 1, STAGES)), count=1, pred=i > 0)
            if i + 2 < num_tiles:
                fetch(k_tiles, v_tiles, numbers, first_block, i + 2, step + 2, k_smem, v_smem, full, empty)
        scores = warpgroup_mma_wait(0, deps=[token])
        tile_factor = gl.maximum(factor * _entry(scales, i), SMALLEST_FACTOR)
        # Loops that run once or not at all: of a branch the assembler makes instructions that all tiles execute.
        if MEANS:
            scores = mask_means(scores, low, high)
            if RAGGED:
                for _ in range(gl.where(i == last - 1, 1, 0)):
                    scores = _weigh_last(scores, tile_factor, (T - 1) & 63, last_bias)
        elif RAGGED:
            for _ in range(gl.where((i == 0) & (short_size < 64), 1, 0)):
                scores = mask_short(scores, short_size)
        weights, peak, total, shrinks = _softmax(scores, peak, total, tile_factor, bias)
        acc = _shrink(acc, shrinks)
        probs = to_operand(weights, v_smem.dtype, p_layout)
        token = warpgroup_mma(probs, v_smem.index(slot).permute((1, 0)), acc, is_async=True)
        step += 1
        if i + 1 < num_tiles:
            mbarrier.wait(full.index(slot_of(step, STAGES)), phase_of(step, STAGES))
        acc = warpgroup_mma_wait(0, deps=[token])
    return acc, peak, total, step
