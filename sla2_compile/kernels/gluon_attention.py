"""The attention kernel for Hopper, warp-specialised: the fast path of `triton_mixture.py`.

One warp fetches tiles of K and V with the copy engine into rings in shared memory (`gluon_fetch.py`), or four gather
them row by row (`gluon_gather.py`); two groups of four warps, 64 query rows each, consume them (`gluon_consume.py`,
with the inner loop in `gluon_stream.py`). In a group the softmax of one tile runs while the tensor cores multiply the
last tile's probabilities with its values; the groups do not wait for each other, so that one's softmax hides the
other's matmuls. Programs are persistent: the fetching warps are already at the next query block while the last one is
finished.

Kept keys and block means are one softmax here where they can be, with a pooled tail and row mixing without a learned
gain; otherwise two, one after the other. A linear tail with block mixing adds phi(q) H / (phi(q) . Z) with one more
matmul. All else is `triton_mixture.py`'s.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sla2_compile.kernels.attention_stage import AttentionInputs, Outputs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_consume import consume
from sla2_compile.kernels.gluon_fetch import fetch
from sla2_compile.kernels.gluon_gather import gather
from sla2_compile.kernels.gluon_stream import MIN_STAGES
from sla2_compile.kernels.gluon_tiles import BLOCK_K, matrix_tiles, suits_hopper, token_tiles
from sla2_compile.kernels.hardware import num_multiprocessors, shared_memory
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps

# Of FP8 values that tensor cores add up: each addition cuts off up to 2^-13 of the sum, so 128 of them 0.8 % at most.
MAX_TILES_IN_TENSOR_CORES = 64


@gluon.jit
def _bring(
    q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, q_ptr, k_ptr, v_ptr, q_pitch, k_pitch, v_pitch,
    order_ptr, k_scale_ptr, kept_ptr, q_smem, k_smem, v_smem, scale_smem, v_bar_smem, state_smem, q_full, q_empty,
    full, empty, state_full, state_empty, q_rows, q_head_rows, q_columns, k_rows, k_head_rows, k_columns, v_rows,
    v_head_rows, v_columns, H, GROUP, N, N_KV, M, T, num_stored, slots, num_heads, first_exact, last_exact,
):  # fmt: skip
    """The warps that fetch tiles: one that leaves it to the copy engine, or four that gather rows."""
    if order_ptr is None:
        fetch(
            q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, k_scale_ptr, kept_ptr, q_smem, k_smem,
            v_smem, scale_smem, v_bar_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty, q_rows,
            q_head_rows, q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, H, GROUP, M, T,
            num_stored, slots, num_heads, first_exact, last_exact,
        )  # fmt: skip
    else:
        gather(
            q_ptr, k_ptr, v_ptr, q_pitch, k_pitch, v_pitch, order_ptr, k_bar_tiles, v_bar_tiles, state_tiles,
            kept_ptr, q_smem, k_smem, v_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty,
            q_rows, q_head_rows, q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, H, GROUP,
            N, N_KV, M, T, slots, num_heads, first_exact, last_exact,
        )  # fmt: skip


@gluon.jit
def _attention_kernel(
    q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, out_tiles, sparse_out_tiles, q_ptr, k_ptr,
    v_ptr, q_pitch, k_pitch, v_pitch, order_ptr, kept_ptr, bits_ptr, logit_ptr, gain_ptr, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr, q_rows, q_head_rows,
    q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, out_rows, out_head_rows, out_columns,
    out_sn, H, GROUP, N, N_KV, M, T, num_stored, slots, words, num_heads, first_exact, last_exact, scale,
    RAGGED: gl.constexpr, APART: gl.constexpr, PROMOTE: gl.constexpr, MAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as multiprocessors. sparse_out_ptr None: nothing is saved, log-sum-exps are 0.

    k_bar_tiles, state_tiles None: the tail is not pooled, not linear. Scales are None where there are no codes.
    order_ptr None: tokens are visited in the model's order, otherwise (N,) int32 in this one.
    """
    TAIL: gl.constexpr = k_bar_tiles is not None
    LINEAR: gl.constexpr = state_tiles is not None
    SAVES: gl.constexpr = sparse_out_ptr is not None
    # Two query blocks: the output leaves by the place of its queries while the next ones arrive.
    q_smem = gl.allocate_shared_memory(q_tiles.dtype, [4] + q_tiles.block_type.shape, q_tiles.layout)
    k_smem = gl.allocate_shared_memory(k_tiles.dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
    v_smem = gl.allocate_shared_memory(v_tiles.dtype, [STAGES] + v_tiles.block_type.shape, v_tiles.layout)
    scale_smem, v_bar_smem, state_smem = q_smem, v_smem, q_smem
    if k_scale_ptr is not None:
        scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if TAIL and v_bar_tiles.dtype != v_tiles.dtype:
        v_bar_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES] + q_tiles.block_type.shape, q_tiles.layout)
    if LINEAR:
        state_smem = gl.allocate_shared_memory(state_tiles.dtype, state_tiles.block_type.shape, state_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    state_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    state_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    head_start = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(head_start, count=1)
    # What is full one thread announces; what is empty, both groups.
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    mbarrier.init(state_full, count=1)
    mbarrier.init(state_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (gl.constexpr(0), out_tiles, sparse_out_tiles, order_ptr, kept_ptr, bits_ptr, logit_ptr,
                        gain_ptr, q_scale_ptr, v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr,
                        sparse_lse_ptr, tail_lse_ptr, q_smem, k_smem, v_smem, scale_smem, v_bar_smem, state_smem,
                        q_full, q_empty, full, empty, state_full, state_empty, head_start, out_rows, out_head_rows,
                        out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact,
                        scale, RAGGED, TAIL, LINEAR, APART, PROMOTE, MAP)),
            (consume, (gl.constexpr(1), out_tiles, sparse_out_tiles, order_ptr, kept_ptr, bits_ptr, logit_ptr,
                        gain_ptr, q_scale_ptr, v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr,
                        sparse_lse_ptr, tail_lse_ptr, q_smem, k_smem, v_smem, scale_smem, v_bar_smem, state_smem,
                        q_full, q_empty, full, empty, state_full, state_empty, head_start, out_rows, out_head_rows,
                        out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact,
                        scale, RAGGED, TAIL, LINEAR, APART, PROMOTE, MAP)),
            (_bring, (q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, q_ptr, k_ptr, v_ptr, q_pitch,
                      k_pitch, v_pitch, order_ptr, k_scale_ptr, kept_ptr, q_smem, k_smem, v_smem, scale_smem,
                      v_bar_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty, q_rows,
                      q_head_rows, q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, H, GROUP,
                      N, N_KV, M, T, num_stored, slots, num_heads, first_exact, last_exact)),
        ],
        [4, 1 if order_ptr is None else 4],
        # Of a thread; the fetching warps give theirs to the groups that compute.
        [240, 24] if k_scale_ptr is not None or (LINEAR and SAVES and order_ptr is None) else [232, 40],
    )  # fmt: skip


def _is_eligible(inputs: AttentionInputs, settings: Settings) -> bool:
    plain = inputs.real is None and inputs.k.shape[2] > 1
    smooth = inputs.codes.v is None or inputs.codes.k is not None
    tail = settings.tail == "pooled" or settings.mixing == "block" or not inputs.has_tail
    # Whoever gathers has no registers to spare for codes, and copies 16 bytes at a time.
    order = inputs.order is None or (
        not settings.is_low_bit
        and all(x.stride(2) % 16 == 0 and x.data_ptr() % 16 == 0 for x in (inputs.q, inputs.k, inputs.v))
    )
    return suits_hopper(inputs.q, settings) and plain and smooth and tail and order


def attend(outputs: Outputs, inputs: AttentionInputs, settings: Settings) -> bool:
    """Write the outputs and return True, or False where this kernel cannot do it, and nothing is written."""
    if not _is_eligible(inputs, settings):
        return False
    q, k, v, codes, statistics, states = inputs.q, inputs.k, inputs.v, inputs.codes, inputs.statistics, inputs.states
    (batch, heads, q_len, dim), (key_heads, kv_len) = q.shape, k.shape[1:3]
    T, slots, blocks = statistics.n.shape[1], inputs.kept.shape[3] - 1, inputs.kept.shape[2]
    tiles = [
        token_tiles(q),
        token_tiles(k) if codes.k is None else matrix_tiles(codes.k, BLOCK_K),
        token_tiles(v) if codes.v is None else matrix_tiles(codes.v, dim),
    ]
    pooled = inputs.has_tail and settings.tail == "pooled"
    num_stages = _num_stages(dim, inputs, pooled=pooled)
    if None in tiles or num_stages < MIN_STAGES:
        return False
    if pooled:
        # Codes of means lie behind the keys'.
        tiles.append(matrix_tiles(statistics.k_bar, BLOCK_K) if codes.k is None else tiles[1])
        tiles.append(tiles[2] if codes.has_means_values else matrix_tiles(statistics.v_bar, BLOCK_K))
    else:
        tiles += [None, None]
    tiles.append(None if states is None else matrix_tiles(states, dim))
    tiles += [None if x is None else token_tiles(x) for x in (outputs.out, outputs.sparse_out)]
    gathered = [None if inputs.order is None else x for x in (q, k, v)]
    exact = settings.exact_queries(q_len, kv_len)
    shifts = codes.k is None and outputs.sparse_out is not None
    num_tiles = slots + (num_blocks(T, BLOCK_K) if codes.has_means_values else 0)
    launch(
        _attention_kernel, (min(num_multiprocessors(q.device), batch * heads * blocks),),
        *tiles, *gathered, *(0 if x is None else x.stride(2) for x in gathered), inputs.order,
        inputs.kept, inputs.bits, inputs.alpha_logit, inputs.alpha_gain, codes.q_scale, codes.k_scale, codes.v_scale,
        statistics.center if shifts else None, states,
        outputs.out, outputs.sparse_out, outputs.sparse_lse, outputs.tail_lse,
        *(step for x in (q, k, v, outputs.out) for step in matrix_steps(x)), outputs.out.stride(2),
        heads, heads // key_heads, q_len, kv_len, blocks, T, codes.num_stored, slots, inputs.bits.shape[3],
        batch * heads, exact.num_first, exact.last_start, settings.scale,
        RAGGED=kv_len % BLOCK_K != 0, MAP=settings.feature_map, STAGES=num_stages,
        # Kept keys and means are one softmax, or two.
        APART=pooled and (settings.mixing == "block" or inputs.alpha_gain is not None),
        PROMOTE=codes.v is not None and (exact.count > 0 or num_tiles > MAX_TILES_IN_TENSOR_CORES),
        num_warps=4,
    )  # fmt: skip
    return True


def _num_stages(dim: int, inputs: AttentionInputs, *, pooled: bool) -> int:
    """Slots of the rings: as deep as shared memory allows beside queries, state and barriers."""
    tile = BLOCK_K * dim
    held = 4 * tile * 2 + (dim * dim * 2 if inputs.states is not None else 0) + 2048
    slot = sum(tile * 2 if codes is None else tile for codes in (inputs.codes.k, inputs.codes.v))
    if pooled and inputs.codes.v is not None and not inputs.codes.has_means_values:
        # Means of values have slots of their own.
        slot += tile * 2
    return min(6, (shared_memory(inputs.q.device) - held) // slot)
