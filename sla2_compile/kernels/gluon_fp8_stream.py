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

from sla2_compile.kernels.gluon_codes import in_stored_order
from sla2_compile.kernels.gluon_stream import (
    SMALLEST_FACTOR,
    TOP_CODE,
    group_barrier,
    left_operand,
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
# By so many powers of two a score may exceed the peak before that is raised. Weights that are 0 then may be 2^-14.8 of
# the largest, in place of 2^-17.8; but of normal scores 2 % of a warp's steps raise a peak and not 27 %.
HEADROOM = gl.constexpr(3)
# Of tables in shared memory.
TABLE_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLACES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
FLOATS = gl.constexpr((gl.float32,) * 34)
_SHIFT = gl.constexpr(math.log2(TOP_CODE.value) - HEADROOM.value)
# PTX that makes a word of four FP8 codes of float32, and keeps of them the bits that are not set in another word.
MASKED_FP8_WORD = gl.constexpr("""{
.reg .b16 low, high;
.reg .b32 word, kept;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 word, {low, high};
not.b32 kept, $5;
and.b32 $0, word, kept;
}""")


@gluon.jit
def another(x):
    """`x`, but to the compiler another number: what is computed from it again is not held in registers meanwhile."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bring(address):
    """Bring what is at addresses, of which the layout may hold any, into the first-level cache meanwhile."""
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


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
    turn, kept_ptr, k_scale_ptr, numbers, scales, first, H, GROUP, M, T, slots, num_blocks, MEANS: gl.constexpr
):  # fmt: skip
    """What the loop over a query block's tiles looks up: scales of all, and numbers of those this group fetches.

    Args:
        turn: which of the program's query blocks; there may be none.
        numbers: (32,) int16 in shared memory, for every second tile from `first` on.
        scales: (64,) float32 in shared memory.
        MEANS: whether means' tiles follow the keys'.

    Returns:
        How many keys' tiles and how many tiles there are, and the key head's first block of codes.
    """
    head, m, _, _, kv_head = place_of(turn, H, GROUP, M)
    block = head * M + m
    num_means = 0
    if MEANS:
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


@gluon.jit
def fetch_states(state_tiles, row, step, k_smem, v_smem, full, empty):
    """Half of a query block's state H (64, D) from a row on, as tile number `step`: left of 64 columns, and right."""
    STAGES: gl.constexpr = k_smem.shape[0]
    slot = slot_of(step, STAGES)
    left, right = states_in_slot(state_tiles, k_smem, v_smem, slot)
    mbarrier.wait(empty.index(slot), phase_of(step, STAGES) ^ 1)
    mbarrier.expect(full.index(slot), 2 * state_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(state_tiles, [row, 0], full.index(slot), left)
    tma.async_copy_global_to_shared(state_tiles, [row, 64], full.index(slot), right)


@gluon.jit
def states_in_slot(state_tiles, k_smem, v_smem, slot):
    """Where a tile's keys and values otherwise are, the halves (64, 64) of half a state."""
    left = k_smem.index(slot)._reinterpret(state_tiles.dtype, state_tiles.block_type.shape, state_tiles.layout)
    right = v_smem.index(slot)._reinterpret(state_tiles.dtype, state_tiles.block_type.shape, state_tiles.layout)
    return left, right


@gluon.constexpr_function
def _largest_assembly(row, means, inputs):
    """PTX: in x the largest score of a thread's row; of means that of blocks which are not kept."""
    if not means:
        return f"mov.f32 x, ${inputs + row};"
    columns = "\n".join(
        f"""
        and.b32 bit, ${inputs + 4 + 2 * (column // 8)}, {1 << (8 * (column // 2 % 4) + column % 2)};
        setp.eq.u32 tail, bit, 0;
        @tail max.f32 x, x, ${inputs + 12 + 2 * (column // 2 + 8 * (column % 2)) + row};"""
        for column in range(16)
    )
    return f"""
        mov.f32 x, 0fFF800000;
        {columns}
        fma.rn.f32 x, x, ${inputs + 8}, ${inputs + 10};"""


@gluon.constexpr_function
def _raise_assembly(headroom, means, num_sums):
    """PTX: peaks of a thread's two rows, raised where they must be, what sums shrink by, and the sums, less by that.

    A warp none of whose scores is too large looks at no other thread's, nor at which means are those of kept blocks.
    """
    inputs = 4 + 2 * num_sums
    rows = "\n".join(
        f"""
        {_largest_assembly(row, means, inputs)}
        shfl.sync.bfly.b32 y, x, 2, 0x1f, 0xffffffff;
        max.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 1, 0x1f, 0xffffffff;
        max.f32 x, x, y;
        cvt.rpi.f32.f32 x, x;
        add.f32 y, ${inputs + 2 + row}, {headroom}.0;
        setp.gt.f32 above, x, y;
        selp.f32 ${row}, x, ${inputs + 2 + row}, above;
        sub.f32 y, ${inputs + 2 + row}, ${row};
        ex2.approx.ftz.f32 ${2 + row}, y;"""
        for row in range(2)
    )
    sums = "\n".join(f"mul.f32 ${4 + i}, ${4 + i}, ${2 + i % 2};" for i in range(2 * num_sums))
    return f"""{{
    .reg .pred above, any, tail;
    .reg .f32 x, y;
    .reg .b32 bit;
    add.f32 x, ${inputs + 2}, {headroom}.0;
    setp.gt.f32 above, ${inputs}, x;
    add.f32 x, ${inputs + 3}, {headroom}.0;
    setp.gt.or.f32 above, ${inputs + 1}, x, above;
    vote.sync.any.pred any, above, 0xffffffff;
    mov.f32 $0, ${inputs + 2};
    mov.f32 $1, ${inputs + 3};
    mov.f32 $2, 0f3F800000;
    mov.f32 $3, 0f3F800000;
    @!any bra done;
    {rows}
    {sums}
    done:
    }}"""


@gluon.constexpr_function
def _raise_constraints(means, num_sums):
    others = ["f"] * 4 + (["r"] * 4 + ["f"] * 36 if means else [])
    return ",".join(["=&f"] * 4 + ["=f"] * (2 * num_sums) + others + [str(4 + i) for i in range(2 * num_sums)])


@gluon.jit
def _pieces(x, layout: gl.constexpr):
    """(64, N, 4) as a tuple of N times (64, 4), in a layout in which nothing moves."""
    if x.shape[1] == 1:
        return (gl.convert_layout(gl.reshape(x, [64, 4]), layout),)
    else:
        first, second = gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2, 4]), (0, 2, 3, 1)))
        return _pieces(first, layout) + _pieces(second, layout)


@gluon.jit
def _joined(pieces, first: gl.constexpr, count: gl.constexpr):
    """`_pieces` undone, for `count` of them from a first one on."""
    if count == 1:
        return gl.reshape(pieces[first], [64, 1, 4])
    else:
        a, b = _joined(pieces, first, count // 2), _joined(pieces, first + count // 2, count // 2)
        return gl.reshape(gl.permute(gl.join(a, b), (0, 3, 1, 2)), [64, count, 4])


@gluon.jit
def _raise_peak(scores, largest, peak, acc, low, high, factor, bias, MEANS: gl.constexpr):
    """Peaks (64, 4), whole numbers, what sums shrink by, 2^(old - new), and the sums `acc` (64, D), less by that.

    Args:
        scores: (64, 64), to be looked at for MEANS, for those whose bits in the two words are not set.
        largest: (64, 4) of each thread's columns, of all.
    """
    layout: gl.constexpr = peak.type.layout
    NUM: gl.constexpr = acc.shape[1] // 4
    ASSEMBLY: gl.constexpr = _raise_assembly(HEADROOM, MEANS, NUM)
    CONSTRAINTS: gl.constexpr = _raise_constraints(MEANS, NUM)
    even, odd = gl.split(gl.reshape(acc, [64, acc.shape[1] // 8, 4, 2]))
    sums = _pieces(even, layout) + _pieces(odd, layout)
    arguments = (largest, peak)
    if MEANS:
        even_scores, odd_scores = gl.split(gl.reshape(scores, [64, 8, 4, 2]))
        arguments = arguments + (low, high, factor, bias) + _pieces(even_scores, layout) + _pieces(odd_scores, layout)
    found = gl.inline_asm_elementwise(
        ASSEMBLY, CONSTRAINTS, arguments + sums, dtype=FLOATS, is_pure=False, pack=2
    )
    even, odd = _joined(found, 2, NUM // 2), _joined(found, 2 + NUM // 2, NUM // 2)
    acc = gl.convert_layout(gl.reshape(gl.join(even, odd), acc.shape), acc.type.layout)
    return found[0], found[1], acc


@gluon.jit
def _for_columns(x, wide_layout: gl.constexpr):
    """(64, 4), a number for each thread of a row, for the columns that are the thread's: (64, 1, 4, 1)."""
    return gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(3, wide_layout)))[:, None, :, None]


@gluon.jit
def _softmax(scores, peak, acc, low, high, factor, bias, MEANS: gl.constexpr):
    """One step of an online softmax in base 2: weights (64, 64), of kept blocks' means too, peaks, what sums shrink by.

    Peaks are (64, 4), of a row the same ones in its four threads.
    """
    layout: gl.constexpr = peak.type.layout
    largest = gl.convert_layout(max_in_thread(scores), layout) * factor + bias
    peak, shrinks, acc = _raise_peak(scores, largest, peak, acc, low, high, factor, bias, MEANS)
    wide = gl.reshape(scores, [64, 8, 4, 2])
    wide_layout: gl.constexpr = wide.type.layout
    weights = gl.exp2(wide * factor - _for_columns(peak - (bias + _SHIFT), wide_layout))
    return gl.convert_layout(gl.reshape(weights, [64, 64]), scores.type.layout), peak, shrinks, acc


@gluon.jit
def _own_bits(word, peak):
    """(64, 4) words like `peak`, a thread's columns' bits first of every eight: those of 8 i and 8 i + 1."""
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, peak.type.layout))
    bits, _ = gl.broadcast((word >> (2 * thread))[None, :], peak)
    return bits


@gluon.jit
def _weights_of_tail(weights, low, high):
    """`weights` (64, 64) as codes in stored order, 0 where they are of means of kept blocks."""
    wide = gl.reshape(weights, [64, 8, 4, 2])
    wide_layout: gl.constexpr = wide.type.layout
    of_column: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, wide_layout)))
    column = gl.arange(0, 8, layout=of_column)[None, :, None, None]
    word = gl.where(column < 4, _for_columns(low, wide_layout), _for_columns(high, wide_layout))
    # Of four codes in a word, even columns' bits as the uppermost of its bytes, odd ones' of another's.
    which = gl.where((column & 2) == 0, 0xD9C8, 0xFBEA)
    kept = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word << 7, word << 6, which], dtype=gl.int32, is_pure=True, pack=1
    )
    _, kept = gl.broadcast(wide, kept)
    return gl.convert_layout(gl.reshape(kept, [64, 64]), weights.type.layout)


@gluon.jit
def _to_operand_of_tail(weights, low, high, layout: gl.constexpr):
    """As `to_operand`, 0 for means of kept blocks, whose bits in words (64, 4) are set; see `_own_bits`."""
    words = gl.convert_layout(in_stored_order(_weights_of_tail(weights, low, high)), layout)
    weights = gl.convert_layout(in_stored_order(weights), layout)
    return gl.inline_asm_elementwise(
        MASKED_FP8_WORD, "=r,r,r,r,r,r,r,r,r", [weights, words], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


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
    part: gl.constexpr, acc, peak, total, step, first, last, num_tiles, q_smem, ones, k_smem, v_smem, full, empty,
    k_tiles, v_tiles, numbers, first_block, scales, factor, bias, words_ptr, T, short_size, last_bias, MEANS: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    """Attend to a query block's tiles `first` to `last`, which is the next one, of `num_tiles`.

    Args:
        part: which of the program's two groups.
        acc: (64, D) float32 sums of weights times values.
        peak, total: (64, 4) float32; of a row its threads have the same peak, and the same sum of weights with `ones`.
        step: how many tiles came before, all query blocks together; the next one has been waited for.
        q_smem: (64, D) queries' codes.
        ones: (8, 64), of codes, or None: sums of weights are then found by the threads, not by the tensor cores.
        numbers, scales, first_block: see `write_tables`.
        factor: what makes of a product of codes a score in base 2, but for the keys' scale.
        bias: a whole number, added to scores in base 2.
        words_ptr: for MEANS, the words of the block mask.
        short_size: keys of the first tile, fewer than 64 if it is the last, short block.
        last_bias: what the mean of the last key block weighs less than others', in base 2.

    Returns:
        acc, peak, total, step.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    s_layout: gl.constexpr = scores_layout(1)
    p_layout: gl.constexpr = left_operand(out_layout(q_smem.shape[1], 1), 1)
    sums_layout: gl.constexpr = out_layout(8, 1)
    sums_p_layout: gl.constexpr = left_operand(sums_layout, 1)
    low, high = _own_bits(0, peak), _own_bits(0, peak)
    for i in range(first, last):
        slot = slot_of(step, STAGES)
        zeros = gl.zeros([64, 64], gl.float32, layout=s_layout)
        token = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if MEANS:
            tile_words = words_ptr + another(2 * (i - first))
            low, high = _own_bits(gl.load(tile_words), peak), _own_bits(gl.load(tile_words + 1), peak)
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
            if RAGGED:
                for _ in range(gl.where(i == last - 1, 1, 0)):
                    scores = _weigh_last(scores, tile_factor, another((T - 1) & 63), last_bias)
        elif RAGGED:
            for _ in range(gl.where((i == 0) & (short_size < 64), 1, 0)):
                scores = mask_short(scores, short_size)
        weights, peak, shrinks, acc = _softmax(scores, peak, acc, low, high, tile_factor, bias, MEANS)
        if ones is None:
            total = total * shrinks + sum_in_thread(weights)
        if MEANS:
            probs = _to_operand_of_tail(weights, low, high, p_layout)
        else:
            probs = to_operand(weights, v_smem.dtype, p_layout)
        if ones is not None:
            # The same in all columns, and of this tile alone: next to a large sum tensor cores cut small weights off.
            none = gl.zeros([64, 8], gl.float32, layout=sums_layout)
            again = gl.convert_layout(probs, sums_p_layout)
            sums = warpgroup_mma(again, ones.permute((1, 0)), none, use_acc=False, is_async=True)
        token = warpgroup_mma(probs, v_smem.index(slot).permute((1, 0)), acc, is_async=True)
        step += 1
        if i + 1 < num_tiles:
            mbarrier.wait(full.index(slot_of(step, STAGES)), phase_of(step, STAGES))
        if ones is None:
            acc = warpgroup_mma_wait(0, deps=[token])
        else:
            acc, sums = warpgroup_mma_wait(0, deps=[token, sums])
            in_column, _ = gl.split(gl.reshape(sums, [64, 4, 2]))
            total = total * shrinks + gl.convert_layout(in_column, total.type.layout)
    return acc, peak, total, step
