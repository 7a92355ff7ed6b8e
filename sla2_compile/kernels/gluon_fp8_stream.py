"""What a group of warps of `gluon_fp8_attention.py` does: its share of fetching tiles, and its loop over them.

A tile's products with the values are waited for before the next scores are issued, unlike in `gluon_stream.py`: that
leaves 128 registers enough, so that four groups share a multiprocessor, and while one waits three others work.

The two groups of a program fetch tiles in turn, the first the even ones of all its tiles and the second the odd ones:
none of 128 registers a thread could be left to warps that fetch alone. Whoever fetches a tile waits until the other
group is done with the one in whose place it comes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sla2_compile.kernels.gluon_fp8_softmax import own_bits, softmax, to_operand_of_tail, weigh_last
from sla2_compile.kernels.gluon_stream import (
    SMALLEST_FACTOR,
    group_barrier,
    left_operand,
    mask_short,
    out_layout,
    scores_layout,
    sum_in_thread,
    to_operand,
)
from sla2_compile.kernels.gluon_tiles import phase_of, slot_of

# Of a query block: the tables have places for no more.
MAX_TILES = 64
# Of tables in shared memory.
TABLE_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
PLACES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


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


@gluon.jit
def attend_to_tiles(
    part: gl.constexpr, acc, peak, total, step, first, last, num_tiles, q_smem, ones, k_smem, v_smem, full, empty,
    k_tiles, v_tiles, numbers, first_block, scales, factor, bias, words_ptr, T, short_size, last_bias,
    MEANS: gl.constexpr, RAGGED: gl.constexpr,
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
    low, high = own_bits(0, peak), own_bits(0, peak)
    for i in range(first, last):
        slot = slot_of(step, STAGES)
        zeros = gl.zeros([64, 64], gl.float32, layout=s_layout)
        token = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if MEANS:
            tile_words = words_ptr + another(2 * (i - first))
            low, high = own_bits(gl.load(tile_words), peak), own_bits(gl.load(tile_words + 1), peak)
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
                    scores = weigh_last(scores, tile_factor, another((T - 1) & 63), last_bias)
        elif RAGGED:
            for _ in range(gl.where((i == 0) & (short_size < 64), 1, 0)):
                scores = mask_short(scores, short_size)
        weights, peak, shrinks, acc = softmax(scores, peak, acc, low, high, tile_factor, bias, MEANS)
        if ones is None:
            total = total * shrinks + sum_in_thread(weights)
        if MEANS:
            probs = to_operand_of_tail(weights, low, high, p_layout)
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
