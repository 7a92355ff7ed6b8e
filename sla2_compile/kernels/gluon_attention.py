"""The attention kernel for Hopper, warp-specialised: the fast path of `triton_mixture.py`.

One warp fetches tiles of K and V with the copy engine into rings in shared memory; two groups of four warps, 64 query
rows each, consume them. In a group the softmax of one tile runs while the tensor cores multiply the last tile's
probabilities with its values; the groups do not wait for each other, so that one's softmax hides the other's matmuls.
Programs are persistent: the fetching warp is already at the next query block while the last one is finished.

Kept keys and block means are one softmax here, which pooled tail and row mixing without a learned gain are. A linear
tail with block mixing adds phi(q) H / (phi(q) . Z) with one more matmul. All else is `triton_mixture.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sla2_compile.kernels.attention_stage import AttentionInputs, Outputs
from sla2_compile.kernels.hardware import capability, num_multiprocessors
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_shape

BLOCK_Q, BLOCK_K = 128, 64
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
# As in reference.py: a row of the linear tail whose weights sum to less has none.
MIN_LINEAR_WEIGHT = gl.constexpr(1e-30)


@gluon.jit
def _query_block(index, num_heads, M, first_exact, last_exact):
    """(head, query block) number `index`; the blocks that keep every key block come first, since they take longest."""
    num_exact = first_exact + M - last_exact
    is_exact = index < num_heads * num_exact
    per_head = gl.where(is_exact, num_exact, M - num_exact)
    index = gl.where(is_exact, index, index - num_heads * num_exact)
    head, m = index // per_head, index % per_head
    exact_m = gl.where(m < first_exact, m, last_exact + m - first_exact)
    return head, gl.where(is_exact, exact_m, first_exact + m)


@gluon.jit
def _num_tiles(kept_ptr, T, TAIL: gl.constexpr):
    """Kept key blocks of a query block, and all its tiles: those, then 64 block means each."""
    count = gl.load(kept_ptr)
    tail = 0
    if TAIL:
        tail = gl.where(count == T, 0, (T + 63) // 64)
    return count, count + tail


@gluon.jit
def _fetch_tile(tiles, mean_tiles, row, column, mean_row, i, j, count, full, smem, TAIL: gl.constexpr):
    mbarrier.expect(full, tiles.block_type.nbytes)
    if TAIL:
        if i < count:
            tma.async_copy_global_to_shared(tiles, [row + j * 64, column], full, smem)
        else:
            tma.async_copy_global_to_shared(mean_tiles, [mean_row + (i - count) * 64, 0], full, smem)
    else:
        tma.async_copy_global_to_shared(tiles, [row + j * 64, column], full, smem)


@gluon.jit
def _fetch(
    q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, kept_ptr, q_smem, k_smem, v_smem, state_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, state_full, state_empty, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn,
    v_sb, v_sh, v_sn, H, GROUP, M, T, slots, num_heads, first_exact, last_exact,
    TAIL: gl.constexpr, LINEAR: gl.constexpr,
):  # fmt: skip
    """The fetching warp. Every tensor is a matrix to it, whose rows are as far apart as two tokens."""
    STAGES: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = q_smem.shape[2]
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_heads * M, gl.num_programs(0)):
        head, m = _query_block(index, num_heads, M, first_exact, last_exact)
        b, h = (head // H).to(gl.int64), (head % H).to(gl.int64)
        g = h // GROUP
        at_q, at_k, at_v = b * q_sb + h * q_sh, b * k_sb + g * k_sh, b * v_sb + g * v_sh
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * q_tiles.block_type.nbytes)
        q_row, q_column = (at_q // q_sn).to(gl.int32) + m * 128, (at_q % q_sn).to(gl.int32)
        tma.async_copy_global_to_shared(q_tiles, [q_row, q_column], q_full, q_smem.index(0))
        tma.async_copy_global_to_shared(q_tiles, [q_row + 64, q_column], q_full, q_smem.index(1))
        kept_row = kept_ptr + (head.to(gl.int64) * M + m) * (1 + slots)
        count, num_tiles = _num_tiles(kept_row, T, TAIL)
        k_row, k_column = (at_k // k_sn).to(gl.int32), (at_k % k_sn).to(gl.int32)
        v_row, v_column = (at_v // v_sn).to(gl.int32), (at_v % v_sn).to(gl.int32)
        mean_row = (b.to(gl.int32) * (H // GROUP) + g.to(gl.int32)) * T
        for i in range(num_tiles):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            j = gl.load(kept_row + 1 + i, mask=(i < count) & (count < T), other=0)
            j = gl.where(count == T, i, j)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            _fetch_tile(
                k_tiles, k_bar_tiles, k_row, k_column, mean_row, i, j, count, k_full.index(stage), k_smem.index(stage),
                TAIL,
            )  # fmt: skip
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _fetch_tile(
                v_tiles, v_bar_tiles, v_row, v_column, mean_row, i, j, count, v_full.index(stage), v_smem.index(stage),
                TAIL,
            )  # fmt: skip
            step += 1
        if LINEAR:
            mbarrier.wait(state_empty, (turn & 1) ^ 1)
            mbarrier.expect(state_full, state_tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(state_tiles, [(head * M + m) * D, 0], state_full, state_smem)
        turn += 1


@gluon.jit
def _feature_map(x, MAP: gl.constexpr):
    if MAP == "softmax":
        x = gl.exp2((x - gl.max(x, 1)[:, None]) * LOG2_E)
        return x / gl.sum(x, 1)[:, None]
    if MAP == "elu":
        return gl.where(x > 0, x + 1, gl.exp2(gl.minimum(x, 0.0) * LOG2_E))
    return gl.maximum(x, 0.0)


@gluon.jit
def _needs_mask(i, count, last, T, RAGGED: gl.constexpr):
    """Whether tile i holds block means, or keys past the end."""
    needs = i >= count
    if RAGGED:
        needs = needs | gl.where(count == T, i == T - 1, (i == count - 1) & (last == T - 1))
    return needs


@gluon.jit
def _mask_scores(scores, i, count, bits_ptr, T, last_size, last_bias, RAGGED: gl.constexpr, layout: gl.constexpr):
    """Scores of tile i with -inf for keys past the end and for means of blocks that are kept."""
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    if i < count:
        scores = gl.where((column < last_size)[None, :], scores, float("-inf"))
    else:
        first = (i - count) * 64
        low = gl.load(bits_ptr + (i - count) * 2)
        high = gl.load(bits_ptr + (i - count) * 2 + 1, mask=first + 32 < T, other=-1)
        # In the last tile: past the last block the bits of a word are 0, and that block may be short.
        if first + 64 >= T:
            low = gl.where(T - first < 32, low | (-1 << (T - first)), low)
            past = gl.where(T - first > 32, high | (-1 << (T - first - 32)), -1)
            high = gl.where(T - first < 64, past, high)
            if RAGGED:
                scores += gl.where(first + column == T - 1, last_bias, 0.0)[None, :]
        word = gl.where(column < 32, low, high) >> (column & 31)
        scores = gl.where(((word & 1) == 0)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _store_rows(ptr, x, first, N, stride):
    """Write (64, D) to the tokens from `first` on that exist, 16 bytes a thread."""
    D: gl.constexpr = x.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    pointers = ptr + row.to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(pointers, gl.convert_layout(x, layout), mask=(row < N)[:, None])


@gluon.jit
def _consume(
    part: gl.constexpr, kept_ptr, bits_ptr, logit_ptr, normalizer_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr,
    tail_lse_ptr, q_smem, k_smem, v_smem, state_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, state_full,
    state_empty, out_sb, out_sh, out_sn, H, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact, scale_log2,
    RAGGED: gl.constexpr, TAIL: gl.constexpr, LINEAR: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """One group of warps: its half of every query block of this program."""
    STAGES: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = q_smem.shape[2]
    SAVE: gl.constexpr = sparse_out_ptr is not None
    dtype: gl.constexpr = q_smem.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    probs_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    empty = gl.zeros([64, 64], gl.float32, layout=scores_layout)
    last_size = N_KV - (T - 1) * 64
    # What the mean of the last, short block weighs less than the others', as a score.
    last_bias = (gl.log2(last_size.to(gl.float32)) - 6.0) / scale_log2
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_heads * M, gl.num_programs(0)):
        head, m = _query_block(index, num_heads, M, first_exact, last_exact)
        wide_head = head.to(gl.int64)
        block = wide_head * M + m
        kept_row = kept_ptr + block * (1 + slots)
        bits_row = bits_ptr + block * words
        count, num_tiles = _num_tiles(kept_row, T, TAIL)
        last = gl.load(kept_row + gl.minimum(count, slots))
        # In base 2, what a learned logit adds to the scores of kept keys.
        logit = 0.0
        if TAIL:
            if logit_ptr is not None:
                logit = gl.load(logit_ptr + (head % H) * M + m) * LOG2_E
        offset = (wide_head // H) * out_sb + (wide_head % H) * out_sh

        mbarrier.wait(q_full, turn & 1)
        q = q_smem.index(part).load(q_layout)
        mbarrier.arrive(q_empty, count=1)
        acc = gl.zeros([64, D], gl.float32, layout=out_layout)
        tail_total = gl.zeros([64], gl.float32, layout=row_layout)

        # The first tile's scores. From then on, in each turn, the next tile's scores are issued, then the last tile's
        # values; the softmax of the scores runs while the values are multiplied.
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        token = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if RAGGED:
            if _needs_mask(0, count, last, T, RAGGED):
                scores = _mask_scores(scores, 0, count, bits_row, T, last_size, last_bias, RAGGED, scores_layout)
        peak = gl.max(scores, 1) * scale_log2 + logit
        weights = gl.exp2(scores * scale_log2 - (peak - logit)[:, None])
        total = gl.sum(weights, 1)
        probs = gl.convert_layout(weights.to(dtype), probs_layout)
        if num_tiles > 1:
            mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1)
        for i in range(1, num_tiles):
            before, stage = step % STAGES, (step + 1) % STAGES
            token = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), (step // STAGES) & 1)
            acc_token = warpgroup_mma(probs, v_smem.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if RAGGED or TAIL:
                if _needs_mask(i, count, last, T, RAGGED):
                    scores = _mask_scores(scores, i, count, bits_row, T, last_size, last_bias, RAGGED, scores_layout)
            # A mean stands for 64 keys: in base 2 its score is 6 higher.
            raised = gl.where(i < count, logit, 6.0)
            new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2 + raised)
            rescale = gl.exp2(peak - new_peak)
            weights = gl.exp2(scores * scale_log2 - (new_peak - raised)[:, None])
            added = gl.sum(weights, 1)
            # Here and not where it is needed: a branch keeps the assembler from moving the next wait up to before the
            # softmax.
            if i + 1 < num_tiles:
                mbarrier.wait(k_full.index((step + 2) % STAGES), ((step + 2) // STAGES) & 1)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(v_empty.index(before), count=1)
            if SAVE:
                if i == count:
                    # All kept keys are in, and no block mean.
                    sparse_out = acc * gl.convert_layout(1 / total, out_row_layout)[:, None]
                    _store_rows(sparse_out_ptr + offset, sparse_out.to(dtype), m * 128 + part * 64, N, out_sn)
            acc = acc * gl.convert_layout(rescale, out_row_layout)[:, None]
            total = total * rescale + gl.where(i < count, added, 0.0)
            tail_total = tail_total * rescale + gl.where(i < count, 0.0, added)
            peak = new_peak
            probs = gl.convert_layout(weights.to(dtype), probs_layout)
            step += 1
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        acc_token = warpgroup_mma(probs, v_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1

        if LINEAR:
            weight = 0.5
            if logit_ptr is not None:
                weight = 1 / (1 + gl.exp2(gl.load(logit_ptr + (head % H) * M + m) * -LOG2_E))
            weight = gl.where(count == T, 1.0, weight)
            acc = acc * gl.convert_layout(weight / total, out_row_layout)[:, None]
            d = gl.arange(0, D, layout=gl.SliceLayout(0, q_layout))
            phi = _feature_map(q.to(gl.float32), MAP)
            mass = gl.sum(phi * gl.load(normalizer_ptr + block * D + d)[None, :], 1)
            phi = phi * gl.where(mass > MIN_LINEAR_WEIGHT, (1 - weight) / mass, 0.0)[:, None]
            if dtype == gl.float16:
                # As `to_finite` of the other kernels.
                phi = gl.minimum(phi, 65504.0)
            phi = gl.convert_layout(phi.to(dtype), probs_layout)
            mbarrier.wait(state_full, turn & 1)
            acc_token = warpgroup_mma(phi, state_smem, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(state_empty, count=1)
        else:
            acc = acc * gl.convert_layout(1 / (total + tail_total), out_row_layout)[:, None]
        _store_rows(out_ptr + offset, acc.to(dtype), m * 128 + part * 64, N, out_sn)
        if SAVE:
            if count == num_tiles:
                _store_rows(sparse_out_ptr + offset, acc.to(dtype), m * 128 + part * 64, N, out_sn)
            row = m * 128 + part * 64 + gl.arange(0, 64, layout=row_layout)
            lse = (peak - logit + gl.log2(total)) * LN_2
            gl.store(sparse_lse_ptr + wide_head * N + row, lse, mask=row < N)
            seen = tail_total > 0
            lse = gl.where(seen, (peak + gl.log2(gl.where(seen, tail_total, 1.0))) * LN_2, float("-inf"))
            gl.store(tail_lse_ptr + wide_head * N + row, lse, mask=row < N)
        else:
            row = m * 128 + part * 64 + gl.arange(0, 64, layout=row_layout)
            zero = gl.zeros([64], gl.float32, layout=row_layout)
            gl.store(sparse_lse_ptr + wide_head * N + row, zero, mask=row < N)
            gl.store(tail_lse_ptr + wide_head * N + row, zero, mask=row < N)
        turn += 1


@gluon.jit
def _attention_kernel(
    q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, kept_ptr, bits_ptr, logit_ptr, normalizer_ptr,
    out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
    out_sb, out_sh, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact, scale_log2,
    RAGGED: gl.constexpr, TAIL: gl.constexpr, LINEAR: gl.constexpr, MAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as multiprocessors. sparse_out_ptr None: nothing is saved, log-sum-exps are 0."""
    q_smem = gl.allocate_shared_memory(q_tiles.dtype, [2] + q_tiles.block_type.shape, q_tiles.layout)
    k_smem = gl.allocate_shared_memory(k_tiles.dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
    v_smem = gl.allocate_shared_memory(v_tiles.dtype, [STAGES] + v_tiles.block_type.shape, v_tiles.layout)
    state_smem = q_smem
    if LINEAR:
        state_smem = gl.allocate_shared_memory(state_tiles.dtype, state_tiles.block_type.shape, state_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    state_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    state_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    # What is full one thread announces; what is empty, both groups.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(state_full, count=1)
    mbarrier.init(state_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), kept_ptr, bits_ptr, logit_ptr, normalizer_ptr, out_ptr, sparse_out_ptr,
                        sparse_lse_ptr, tail_lse_ptr, q_smem, k_smem, v_smem, state_smem, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, state_full, state_empty, out_sb, out_sh, out_sn, H, N, N_KV, M, T,
                        slots, words, num_heads, first_exact, last_exact, scale_log2, RAGGED, TAIL, LINEAR, MAP)),
            (_consume, (gl.constexpr(1), kept_ptr, bits_ptr, logit_ptr, normalizer_ptr, out_ptr, sparse_out_ptr,
                        sparse_lse_ptr, tail_lse_ptr, q_smem, k_smem, v_smem, state_smem, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, state_full, state_empty, out_sb, out_sh, out_sn, H, N, N_KV, M, T,
                        slots, words, num_heads, first_exact, last_exact, scale_log2, RAGGED, TAIL, LINEAR, MAP)),
            (_fetch, (q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, kept_ptr, q_smem, k_smem,
                      v_smem, state_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, state_full, state_empty,
                      q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, H, GROUP, M, T, slots, num_heads,
                      first_exact, last_exact, TAIL, LINEAR)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _is_eligible(inputs: AttentionInputs, outputs: Outputs, settings: Settings) -> bool:
    on_hopper = capability(inputs.q.device)[0] == 9
    fits = inputs.q.dtype in (torch.bfloat16, torch.float16) and inputs.q.shape[3] in (64, 128)
    blocks = (settings.block_q, settings.block_k) == (BLOCK_Q, BLOCK_K)
    plain = inputs.real is None and inputs.order is None and not inputs.is_low_bit and inputs.k.shape[2] > 1
    one_softmax = settings.tail == "pooled" and settings.mixing == "row" and inputs.alpha_gain is None
    one_more_matmul = settings.tail == "linear" and settings.mixing == "block" and outputs.sparse_out is None
    no_tail = not inputs.has_tail and not settings.smooths_keys
    return on_hopper and fits and blocks and plain and (one_softmax or one_more_matmul or no_tail)


def attend(outputs: Outputs, inputs: AttentionInputs, settings: Settings) -> bool:
    """Write the outputs and return True, or False where this kernel cannot do it, and nothing is written."""
    if not _is_eligible(inputs, outputs, settings):
        return False
    q, k, statistics, linear = inputs.q, inputs.k, inputs.statistics, inputs.linear
    (batch, heads, q_len, dim), (key_heads, kv_len) = q.shape, k.shape[1:3]
    T, slots, blocks = statistics.n.shape[1], inputs.kept.shape[3] - 1, inputs.kept.shape[2]
    element = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([64, dim], element)
    tiles = [_rows_of(x, layout) for x in (q, k, inputs.v)]
    if None in tiles:
        return False
    pooled = inputs.has_tail and settings.tail == "pooled"
    for mean in (statistics.k_bar, statistics.v_bar):
        tiles.append(_rows_of(mean.flatten(0, 2)[None, None], layout) if pooled else None)
    if linear is None:
        tiles.append(None)
    else:
        state, square = linear.state, gl.NVMMASharedLayout.get_default_for([dim, dim], element)
        tiles.append(TensorDescriptor(state, [state.numel() // dim, dim], [dim, 1], [dim, dim], square))
    exact = settings.exact_queries(q_len, kv_len)
    num_programs = num_multiprocessors(q.device)
    _attention_kernel[min(num_programs, batch * heads * blocks),](
        *tiles, inputs.kept, inputs.bits, inputs.alpha_logit, None if linear is None else linear.normalizer,
        outputs.out, outputs.sparse_out, outputs.sparse_lse, outputs.tail_lse,
        *(s for x in (q, k, inputs.v, outputs.out) for s in x.stride()[:3]),
        heads, heads // key_heads, q_len, kv_len, blocks, T, slots, inputs.bits.shape[3], batch * heads,
        exact.num_first, exact.last_start, settings.scale * LOG2_E.value,
        RAGGED=kv_len % BLOCK_K != 0, TAIL=pooled, LINEAR=linear is not None, MAP=settings.feature_map,
        # Rings as deep as shared memory allows beside the queries, the state and the scratch of the stores.
        STAGES=4 if dim == 128 else 6, num_warps=4,
    )  # fmt: skip
    return True


def _rows_of(x: Tensor, layout: Any) -> TensorDescriptor | None:
    """A descriptor for tiles of 64 tokens of `x` (B, H, N, D); None where its layout forbids it."""
    shape = matrix_shape(x)
    return shape and TensorDescriptor(x, list(shape), [shape[1], 1], [64, x.shape[3]], layout)
