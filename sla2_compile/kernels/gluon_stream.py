"""What a group of warps does with tiles of keys and values: the inner loop of `gluon_consume.py`.

A step issues the next tile's scores to the tensor cores, then the last tile's probabilities times its values; the
softmax of the scores runs while the values are multiplied. At 64 rows a group and 64 keys a tile a step keeps the
tensor cores busy for 512 cycles in 16 bit, and the two groups of a program take turns on them. What a group does one
after the other, with the tensor cores idle if the other group is at the same point, is what a step costs beyond that:
so maxima are trees, the sums so far shrink behind the next scores, and a tile is waited for and handed back once.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from sla2_compile.kernels.gluon_codes import INTEGER_FLOAT, in_stored_order, pack_fp8
from sla2_compile.quant import formats

# Of a ring: a step uses two slots and gives back one of the step before; one more is on its way.
MIN_STAGES = 4
# Of the warps of a group; Triton 3.6 calls it otherwise.
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
# A mean stands for 64 keys: in base 2 its score is 6 higher.
MEAN_BIAS = gl.constexpr(6.0)
# Of weights in 16 bits. Sums of values are below 2^16 times as large as values, so float32 holds what float16 does.
MAX_LOG2_WEIGHT = gl.constexpr(8.0)
TOP_CODE = gl.constexpr(formats.TOP_CODE)
LOG2_TOP_CODE = gl.constexpr(math.log2(formats.TOP_CODE))
# INTEGER_FLOAT's; added as bits they make a float32 of an integer below 2^22.
INTEGER_BITS = gl.constexpr(0x4B400000)
# Two tiny scales must not make 0 of what a masked score, -inf, is multiplied by.
SMALLEST_FACTOR = gl.constexpr(1e-35)


@gluon.constexpr_function
def scores_layout(itemsize):
    """Layout of a tile of scores of operands of so many bytes an element."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 32 // itemsize])


@gluon.constexpr_function
def out_layout(dim, itemsize):
    """Layout of the output, of probabilities and values of so many bytes an element."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, dim, 32 // itemsize])


@gluon.constexpr_function
def left_operand(layout, itemsize):
    """Layout in registers of what is multiplied from the left into `layout`."""
    return gl.DotOperandLayout(0, layout, 4 // itemsize)


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot of a ring after this one, and its phase, which changes with every turn."""
    wraps = slot + 1 == STAGES
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def give_back(empty, slot):
    """Tell the fetching warps that this group is done with a slot; nothing where that is -1."""
    mbarrier.arrive(empty.index(gl.maximum(slot, 0)), count=1, pred=slot >= 0)


@gluon.jit
def sum_in_thread(weights):
    """Sums (64, 4) of those columns of `weights` (64, 64) that one thread holds."""
    return gl.sum(gl.sum(gl.reshape(weights, [ROWS, 8, 4, 2]), 3), 1)


@gluon.jit
def max_in_thread(scores):
    """Maxima (64, 4) likewise, in four steps: one maximum over all columns is compiled to a chain of 15."""
    pairs = gl.max(gl.reshape(scores, [ROWS, 2, 4, 4, 2]), 4)
    return gl.max(gl.max(pairs, 2), 1)


@gluon.jit
def _row_maximum(scores):
    """(64,) maxima of rows."""
    layout: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    return gl.convert_layout(gl.max(max_in_thread(scores), 1), layout)


@gluon.jit
def _issue_scores(q, keys):
    element: gl.constexpr = gl.int32 if q.dtype == gl.int8 else gl.float32
    layout: gl.constexpr = q.type.layout.parent
    empty = gl.zeros([ROWS, KEYS], element, layout=layout)
    return warpgroup_mma(q, keys.permute((1, 0)), empty, use_acc=False, is_async=True)


@gluon.jit
def _issue_values(probs, values, acc, APART: gl.constexpr):
    """APART: into sums of their own."""
    if values.dtype == gl.float8e4nv:
        values = values.permute((1, 0))
    if APART:
        layout: gl.constexpr = acc.type.layout
        empty = gl.zeros([ROWS, acc.shape[1]], gl.float32, layout=layout)
        return warpgroup_mma(probs, values, empty, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(probs, values, acc, is_async=True)


@gluon.jit
def mask_short(scores, last_size):
    """-inf for keys past the end of the last, short key block."""
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
    return gl.where((column < last_size)[None, :], scores, float("-inf"))


@gluon.jit
def _mask_means(scores, low, high):
    """-inf for means of kept blocks, whose bits in the two words are set."""
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
    # In two parts: the first is the same for all columns of a thread, the second a constant.
    word = (gl.where(column < 32, low, high) >> (column & 6)) >> (column & 25)
    return gl.where(((word & 1) == 0)[None, :], scores, float("-inf"))


@gluon.jit
def _weigh_short_mean(scores, factor, first, T, last_bias):
    """Scores with `last_bias`, in base 2, added for the mean of the last block."""
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
    return scores + gl.where((first + column == T - 1)[None, :], (last_bias / factor)[:, None], 0.0)


@gluon.jit
def _factor(factor, q, scale_smem, slot):
    """(64,) what makes of the products of a tile scores in base 2."""
    layout: gl.constexpr = gl.SliceLayout(1, q.type.layout.parent)
    factor = gl.full([ROWS], factor, gl.float32, layout=layout)
    if q.dtype.primitive_bitwidth == 8:
        # From shared memory: read from a list of numbers, it would hold up the next scores.
        factor = gl.maximum(factor * scale_smem.index(slot).load(layout), SMALLEST_FACTOR)
    return factor


@gluon.jit
def _softmax(scores, peak, factor, bias, FP8: gl.constexpr, SHIFTED: gl.constexpr):
    """One step of an online softmax in base 2: weights, the new peak, and what sums up to here shrink by.

    With FP8 peaks are whole numbers: codes then do not depend on which tiles came before. Otherwise a peak stands until
    it is exceeded by so much that weights could leave float16's range, so that the sums seldom shrink.
    """
    largest = _row_maximum(scores)
    if SHIFTED:
        largest -= INTEGER_FLOAT
    new_peak = largest * factor + bias
    if FP8:
        new_peak = gl.maximum(peak, gl.ceil(new_peak))
    else:
        new_peak = gl.where(new_peak > peak + MAX_LOG2_WEIGHT, new_peak, peak)
    offset = new_peak - bias
    if FP8:
        offset -= LOG2_TOP_CODE
    if SHIFTED:
        offset += INTEGER_FLOAT * factor
    return gl.exp2(scores * factor[:, None] - offset[:, None]), new_peak, gl.exp2(peak - new_peak)


@gluon.jit
def to_operand(weights, dtype: gl.constexpr, layout: gl.constexpr):
    """Probabilities as the left operand of the product with the values; moves nothing between threads.

    8-bit ones come in the order in which `triton_value_codes.stored_key` has the values.
    """
    if dtype == gl.float8e4nv:
        return pack_fp8(gl.convert_layout(in_stored_order(weights), layout))
    else:
        return gl.convert_layout(weights.to(dtype), layout)


@gluon.constexpr_function
def is_shifted(dtype, fp8_values, weighs_means):
    """Whether scores are INTEGER_FLOAT too large for a while. A mean's weight would be lost in such a number."""
    return dtype == gl.int8 and not fp8_values and not weighs_means


@gluon.jit
def _as_scores(products, SHIFTED: gl.constexpr):
    """Products of 8-bit integers as float32, by instructions at full rate, unlike a conversion.

    SHIFTED: INTEGER_FLOAT too large, which `_softmax` takes off in passing. What it takes off is rounded like the last
    digit of a product: enough for weights in 16 bits, while codes of weights would change.
    """
    if products.dtype == gl.int32:
        products = (products + INTEGER_BITS).to(gl.float32, bitcast=True)
        if not SHIFTED:
            products -= INTEGER_FLOAT
    return products


@gluon.jit
def begin(
    acc, peak, q, k_smem, v_smem, scale_smem, full, slot, phase, num_waits, factor, bias, words_ptr, T,
    is_short, last_size, last_bias, MEANS: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """The first tile's weights, with nothing in flight; see `stream` for the arguments.

    Args:
        acc: (64, D) float32 sums so far, zeros or those of tiles before.
        peak: (64,) float32 about the largest score so far, in base 2; -inf before the first tile.
        is_short: whether this is the last, short key block, or holds its mean.
        last_size: its keys.
    Returns:
        weights, peak, held, total: what `stream` takes.
        slot, phase: of the next tile, which has been waited for if there is one.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    FP8: gl.constexpr = v_smem.dtype == gl.float8e4nv
    SHIFTED: gl.constexpr = is_shifted(q.dtype, FP8, MEANS and RAGGED)
    mbarrier.wait(full.index(slot), phase)
    products = warpgroup_mma_wait(0, deps=[_issue_scores(q, k_smem.index(slot))])
    peak = gl.convert_layout(peak, gl.SliceLayout(1, q.type.layout.parent))
    low, high = 0, 0
    if MEANS:
        low, high = gl.load(words_ptr), gl.load(words_ptr + 1)
    tile_factor = _factor(factor, q, scale_smem, slot)
    slot, phase = next_slot(slot, phase, STAGES)
    scores = _as_scores(products, SHIFTED)
    if MEANS:
        scores = _mask_means(scores, low, high)
    if RAGGED:
        if MEANS:
            scores = _weigh_short_mean(scores, tile_factor, 0, T, gl.where(is_short, last_bias, 0.0))
        else:
            scores = mask_short(scores, gl.where(is_short, last_size, KEYS))
    weights, peak, rescale = _softmax(scores, peak, tile_factor, bias, FP8, SHIFTED)
    if num_waits > 1:
        mbarrier.wait(full.index(slot), phase)
    held = gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))
    return weights, peak, held, sum_in_thread(weights), slot, phase


@gluon.constexpr_function
def _shrink_assembly(size):
    """PTX that multiplies `size` numbers of a thread, two of a row and two of another in turn, or leaves it."""
    products = "\n".join(f"mul.f32 ${i}, ${i}, ${2 * size + i};" for i in range(size))
    return f"""{{
    .reg .pred apart, any;
    setp.neu.f32 apart, ${2 * size}, 0f3F800000;
    setp.neu.or.f32 apart, ${2 * size + 2}, 0f3F800000, apart;
    vote.sync.any.pred any, apart, 0xffffffff;
    @!any bra done;
    {products}
    done:
    }}"""


@gluon.constexpr_function
def _shrink_constraints(size):
    return ",".join(["=f"] * size + [str(i) for i in range(size)] + ["f"] * size)


@gluon.jit
def _shrink(acc, held):
    """`acc` (64, D) times `held` (64,), a slice of its layout; skipped by warps for whose rows that is 1."""
    SIZE: gl.constexpr = acc.shape[1] // 2
    return gl.inline_asm_elementwise(
        _shrink_assembly(SIZE), _shrink_constraints(SIZE), [acc, held[:, None]], dtype=gl.float32, is_pure=False,
        pack=SIZE,
    )  # fmt: skip


@gluon.jit
def stream(
    acc, weights, peak, held, total, q, k_smem, v_smem, scale_smem, full, empty, used_slot, last_slot, slot, phase,
    first, num_tiles, num_waits, factor, bias, words_ptr, T, last_bias, MEANS: gl.constexpr, RAGGED: gl.constexpr,
    PROMOTE: gl.constexpr,
):  # fmt: skip
    """Attend to tiles `first` to `num_tiles`, after another one whose weights are there and whose values are not.

    Args:
        acc: (64, D) float32 sums of weights times values, in an `out_layout`, without the last tile's.
        weights: (64, 64) float32 of the last tile.
        peak: (64,) float32 about the largest score so far, in base 2.
        held: (64,) what `acc` must be multiplied by before the last tile's product is added.
        total: (64, 4) float32 sums of the weights so far, in each thread.
        q: (64, D) queries or their codes, in registers.
        scale_smem: (slots of the ring, 64) float32 scales of the tiles, the same for all rows, where q is codes.
        used_slot: of the ring, of the tile before the last one, which is done with but not given back; -1 for none.
        last_slot, slot, phase: of the ring, of the last tile and of the next one, which has been waited for.
        num_waits: as many as `num_tiles`, or more where tiles follow with nothing between.
        factor: what makes of a product of q and k a score in base 2, but for a code's scale.
        bias: added to scores in base 2.
        words_ptr: for MEANS, the words of the block mask.
        T: number of key blocks.
        last_bias: what the mean of the last key block weighs less than others', in base 2. That block itself is no
            matter here: where it is short, it comes first.
        PROMOTE: add up the tiles' products outside of the tensor cores, which cut off all but some 14 bits of FP8 sums:
            that matters where very many tiles are added.

    Returns:
        acc, weights, peak, held, total and the four of the ring, for what follows.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    FP8: gl.constexpr = v_smem.dtype == gl.float8e4nv
    SHIFTED: gl.constexpr = is_shifted(q.dtype, FP8, MEANS and RAGGED)
    o_layout: gl.constexpr = acc.type.layout
    p_layout: gl.constexpr = left_operand(o_layout, v_smem.dtype.primitive_bitwidth // 8)
    sum_layout: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    low, high = 0, 0
    for i in range(first, num_tiles):
        # What is read from memory here is used after the scores.
        if MEANS:
            low, high = gl.load(words_ptr + 2 * i), gl.load(words_ptr + 2 * i + 1)
        tile_factor = _factor(factor, q, scale_smem, slot)
        token = _issue_scores(q, k_smem.index(slot))
        if not PROMOTE:
            # Behind the scores: the tensor cores have work in the meantime.
            acc = _shrink(acc, held)
        probs = to_operand(weights, v_smem.dtype, p_layout)
        acc_token = _issue_values(probs, v_smem.index(last_slot), acc, PROMOTE)
        # Here and not when it is done with: the compiler lets a group's warps wait for each other before and after
        # what it takes for an access to all shared memory, and here they wait for the scores in any case.
        give_back(empty, used_slot)
        group_barrier()
        scores = _as_scores(warpgroup_mma_wait(1, deps=[token]), SHIFTED)
        if MEANS:
            scores = _mask_means(scores, low, high)
        if MEANS and RAGGED:
            # A loop that runs once or not at all: of a branch the assembler makes instructions that all tiles execute.
            for _ in range(gl.where(i == num_tiles - 1, 1, 0)):
                scores = _weigh_short_mean(scores, tile_factor, i * KEYS, T, last_bias)
        weights, peak, rescale = _softmax(scores, peak, tile_factor, bias, FP8, SHIFTED)
        added = sum_in_thread(weights)
        after, after_phase = next_slot(slot, phase, STAGES)
        # Here and not where it is needed: a branch keeps the assembler from moving the next wait up to before the
        # softmax.
        if i + 1 < num_waits:
            mbarrier.wait(full.index(after), after_phase)
        product = warpgroup_mma_wait(0, deps=[acc_token])
        acc = acc * held[:, None] + product if PROMOTE else product
        held = gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))
        total = total * gl.convert_layout(rescale, sum_layout)[:, None] + added
        used_slot = last_slot
        last_slot, slot, phase = slot, after, after_phase
    return acc, weights, peak, held, total, used_slot, last_slot, slot, phase


@gluon.jit
def issue_last(acc, weights, held, v_smem, last_slot, PROMOTE: gl.constexpr):
    """The sums and, in flight, the last tile's product with the values, both for `finish`."""
    if not PROMOTE:
        acc = acc * held[:, None]
    p_layout: gl.constexpr = left_operand(acc.type.layout, v_smem.dtype.primitive_bitwidth // 8)
    probs = to_operand(weights, v_smem.dtype, p_layout)
    return acc, _issue_values(probs, v_smem.index(last_slot), acc, PROMOTE)


@gluon.jit
def finish(acc, token, held, empty, used_slot, last_slot, PROMOTE: gl.constexpr):
    """The sums with the last tile's; all slots are given back."""
    product = warpgroup_mma_wait(0, deps=[token])
    give_back(empty, used_slot)
    mbarrier.arrive(empty.index(last_slot), count=1)
    if PROMOTE:
        product += acc * held[:, None]
    return product


@gluon.jit
def row_totals(total, layout: gl.constexpr):
    """(64,) sums of the weights."""
    return gl.convert_layout(gl.sum(total, 1), layout)
