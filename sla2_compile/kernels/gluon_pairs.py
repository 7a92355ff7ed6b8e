"""FP8 tiles two at a time: the inner loop of `gluon_consume.py` where the tensor cores may add up FP8 values.

In FP8 the tensor cores need 256 cycles for a group's 64 rows and 64 keys, and the exponentials 272, while what a step
waits for in turn, scores, maxima and barriers, takes as long as in 16 bit. Here two tiles share a step and a slot of
the ring. Where the number of kept tiles is odd, the last slot holds its tile twice, and the second one is masked.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from sla2_compile.kernels.gluon_stream import (
    KEYS,
    LOG2_TOP_CODE,
    as_scores,
    issue_scores,
    issue_values,
    left_operand,
    next_slot,
    row_maximum,
    sum_in_thread,
    tile_factor,
    to_operand,
)


@gluon.jit
def _masked(scores, number, count, kept_ptr, T, last_size):
    """-inf where kept tile `number` is past the last one, or has no key: it may be the short block's."""
    j = gl.load(kept_ptr + number, mask=(count < T) & (number < count), other=number)
    limit = gl.where(j == T - 1, last_size, KEYS)
    limit = gl.where(number < count, limit, 0)
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores.type.layout))
    return gl.where((column < limit)[None, :], scores, float("-inf"))


@gluon.jit
def _softmax(scores_1, scores_2, peak, factor_1, factor_2, bias):
    """Of two tiles: their weights, the new peak, what sums so far shrink by, and sums (64, 4) of the weights."""
    new_peak = gl.maximum(row_maximum(scores_1) * factor_1, row_maximum(scores_2) * factor_2) + bias
    # Whole numbers: codes then do not depend on which tiles came before.
    new_peak = gl.maximum(peak, gl.ceil(new_peak))
    offset = new_peak - bias - LOG2_TOP_CODE
    weights_1 = gl.exp2(scores_1 * factor_1[:, None] - offset[:, None])
    weights_2 = gl.exp2(scores_2 * factor_2[:, None] - offset[:, None])
    return weights_1, weights_2, new_peak, gl.exp2(peak - new_peak), sum_in_thread(weights_1) + sum_in_thread(weights_2)


@gluon.jit
def _to_operands(weights_1, weights_2, layout: gl.constexpr):
    operand: gl.constexpr = left_operand(layout, 1)
    return to_operand(weights_1, gl.float8e4nv, operand), to_operand(weights_2, gl.float8e4nv, operand)


@gluon.jit
def begin_pairs(
    acc, peak, q, k_smem, scale_smem, full, slot, phase, count, factor, bias, kept_ptr, T, last_size,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The first pair's weights, with nothing in flight; as `gluon_stream.begin`.

    Returns:
        weights_1, weights_2: (64, 64) float32 of the two tiles.
        peak, held, total, slot, phase: as there.
    """
    o_layout: gl.constexpr = acc.type.layout
    peak = gl.convert_layout(peak, gl.SliceLayout(1, q.type.layout.parent))
    mbarrier.wait(full.index(slot), phase)
    token_1, token_2 = issue_scores(q, k_smem.index(2 * slot)), issue_scores(q, k_smem.index(2 * slot + 1))
    factor_1, factor_2 = tile_factor(factor, q, scale_smem, 2 * slot), tile_factor(factor, q, scale_smem, 2 * slot + 1)
    slot, phase = next_slot(slot, phase, STAGES)
    products_1, products_2 = warpgroup_mma_wait(0, deps=[token_1, token_2])
    scores_1 = _masked(as_scores(products_1), 0, count, kept_ptr, T, last_size)
    scores_2 = _masked(as_scores(products_2), 1, count, kept_ptr, T, last_size)
    weights_1, weights_2, peak, rescale, total = _softmax(scores_1, scores_2, peak, factor_1, factor_2, bias)
    if count > 2:
        mbarrier.wait(full.index(slot), phase)
    return weights_1, weights_2, peak, gl.convert_layout(rescale, gl.SliceLayout(1, o_layout)), total, slot, phase


@gluon.jit
def _pairs(
    acc, weights_1, weights_2, peak, held, total, q, k_smem, v_smem, scale_smem, full, empty, last_slot, slot, phase,
    first, end, num_pairs, count, factor, bias, kept_ptr, T, last_size, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The loop of `stream_pairs` over pairs `first` to `end`."""
    o_layout: gl.constexpr = acc.type.layout
    for i in range(first, end):
        # Before the scores, which take the registers of the weights.
        probs_1, probs_2 = _to_operands(weights_1, weights_2, o_layout)
        token_1, token_2 = issue_scores(q, k_smem.index(2 * slot)), issue_scores(q, k_smem.index(2 * slot + 1))
        factor_1 = tile_factor(factor, q, scale_smem, 2 * slot)
        factor_2 = tile_factor(factor, q, scale_smem, 2 * slot + 1)
        # Behind the scores: the tensor cores have work in the meantime.
        acc = acc * held[:, None]
        acc_token = issue_values(probs_1, v_smem.index(2 * last_slot), acc, False)
        acc_token = issue_values(probs_2, v_smem.index(2 * last_slot + 1), acc_token, False)
        products_1, products_2 = warpgroup_mma_wait(2, deps=[token_1, token_2])
        scores_1, scores_2 = as_scores(products_1), as_scores(products_2)
        if MASKED:
            scores_1 = _masked(scores_1, 2 * i, count, kept_ptr, T, last_size)
            scores_2 = _masked(scores_2, 2 * i + 1, count, kept_ptr, T, last_size)
        weights_1, weights_2, peak, rescale, added = _softmax(scores_1, scores_2, peak, factor_1, factor_2, bias)
        after, after_phase = next_slot(slot, phase, STAGES)
        # Here and not where it is needed: a branch keeps the assembler from moving the next wait up to before the
        # softmax.
        if i + 1 < num_pairs:
            mbarrier.wait(full.index(after), after_phase)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        mbarrier.arrive(empty.index(last_slot), count=1)
        held = gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))
        total = total * gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout))[:, None] + added
        last_slot, slot, phase = slot, after, after_phase
    return acc, weights_1, weights_2, peak, held, total, last_slot, slot, phase


@gluon.jit
def stream_pairs(
    acc, weights_1, weights_2, peak, held, total, q, k_smem, v_smem, scale_smem, full, empty, last_slot, slot, phase,
    count, factor, bias, kept_ptr, T, last_size, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend to the kept tiles behind the first pair, as `gluon_stream.stream`; only the last pair needs masks.

    Args:
        weights_1, weights_2: (64, 64) float32 of the last pair's tiles, whose values are not added yet.
        k_smem, v_smem: two tiles for each slot of the ring, (2 STAGES, 64, D) and (2 STAGES, D, 64).
        scale_smem: (2 STAGES, 1) float32.
        count: number of kept tiles.
        kept_ptr: their list.
    """
    num_pairs = (count + 1) // 2
    whole = gl.maximum(1, num_pairs - 1)
    acc, weights_1, weights_2, peak, held, total, last_slot, slot, phase = _pairs(
        acc, weights_1, weights_2, peak, held, total, q, k_smem, v_smem, scale_smem, full, empty, last_slot, slot,
        phase, 1, whole, num_pairs, count, factor, bias, kept_ptr, T, last_size, STAGES, False,
    )  # fmt: skip
    acc, weights_1, weights_2, peak, held, total, last_slot, slot, phase = _pairs(
        acc, weights_1, weights_2, peak, held, total, q, k_smem, v_smem, scale_smem, full, empty, last_slot, slot,
        phase, whole, num_pairs, num_pairs, count, factor, bias, kept_ptr, T, last_size, STAGES, True,
    )  # fmt: skip
    return acc, weights_1, weights_2, peak, held, total, last_slot, slot, phase


@gluon.jit
def issue_last_pair(acc, weights_1, weights_2, held, v_smem, last_slot):
    """The sums and, in flight, the last pair's product with the values, both for `gluon_stream.finish`."""
    probs_1, probs_2 = _to_operands(weights_1, weights_2, acc.type.layout)
    acc = acc * held[:, None]
    token = issue_values(probs_1, v_smem.index(2 * last_slot), acc, False)
    return acc, issue_values(probs_2, v_smem.index(2 * last_slot + 1), token, False)
