"""Low-bit codes and means of blocks of keys and of values on Hopper, a warp for each block; see `triton_one_pass.py`.

The copy engine brings a block into shared memory, from where its warp reads it a part at a time. So few registers are
taken that 12 blocks share a multiprocessor, and no warp waits for another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_codes import FP8_WORD, quotient, to_code_words
from sla2_compile.kernels.gluon_tiles import BLOCK_K, token_tiles
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps
from sla2_compile.quant.formats import FP8_MAX, INT8_MAX


@gluon.constexpr_function
def _rows_layout(dim):
    """Rows over a warp, eight channels a thread."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [1, 1], [1, 0])


@gluon.constexpr_function
def _rows_at_once(dim):
    """So many that a thread has 64 numbers of them."""
    return 2048 // dim


@gluon.jit
def _rows(smem, first, ROWS: gl.constexpr):
    """Tokens (ROWS, D) from a row on, float32."""
    return smem.slice(first, ROWS).load(_rows_layout(smem.shape[1])).to(gl.float32)


@gluon.jit
def _fill(smem, num_real, value, ROWS: gl.constexpr):
    """Put `value` (D,) in the place of tokens that a short block does not have."""
    for i in gl.static_range(smem.shape[0] // ROWS):
        x = _rows(smem, i * ROWS, ROWS)
        row = i * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, x.type.layout))
        x = gl.where((row < num_real)[:, None], x, value[None, :])
        smem.slice(i * ROWS, ROWS).store(x.to(smem.dtype))


@gluon.jit
def _fetch(tiles, rows, head_rows, columns, G, T, smem, full):
    """Send for this program's block; heads vary fastest, as they do in memory. Its batch element, head and number."""
    mbarrier.init(full, count=1)
    fence_async_shared()
    program = gl.program_id(0)
    b, g, block = program // (T * G), program % G, program // G % T
    mbarrier.expect(full, tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(tiles, [b * rows + g * head_rows + block * 64, g * columns], full, smem)
    return b, g, block


@gluon.jit
def _write_words(codes_ptr, first, words, num_real):
    """Write words of codes (ROWS, D / 4), or 0 for keys that are not there, where `num_real` is not None."""
    ROWS: gl.constexpr = words.shape[0]
    WORDS: gl.constexpr = words.shape[1]
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, words.type.layout))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, words.type.layout))
    pointers = codes_ptr + (row * WORDS)[:, None] + word[None, :]
    if num_real is None:
        gl.store(pointers, words)
    else:
        gl.store(pointers, words * 0, mask=(row >= num_real)[:, None])


# A number of heads that is 1 would be a constant to the compiler, which then holds a whole block in registers.
@gluon.jit(do_not_specialize=["G"])
def _key_blocks_kernel(
    k_tiles, center_ptr, codes_ptr, scale_ptr, mean_ptr, n_ptr, k_rows, k_head_rows, k_columns, G, N_KV, T, num_stored,
    limit, FP8: gl.constexpr,
):  # fmt: skip
    """Grid (B G T,): blocks of keys. codes_ptr: words of four codes."""
    D: gl.constexpr = k_tiles.block_type.shape[1]
    # And how many of them are in different threads.
    ROWS: gl.constexpr = _rows_at_once(D)
    BETWEEN: gl.constexpr = 256 // D
    smem = gl.allocate_shared_memory(k_tiles.dtype, k_tiles.block_type.shape, k_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b, g, block = _fetch(k_tiles, k_rows, k_head_rows, k_columns, G, T, smem, full)
    head = b * G + g
    stored = (head * num_stored + block).to(gl.int64)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, _rows_layout(D)))
    center = gl.load(center_ptr + head * D + channel)
    codes_ptr += stored * (64 * D // 4)
    num_real = gl.minimum(N_KV - block * 64, 64)
    mbarrier.wait(full, 0)
    # What is as good as not there: 0 without the center, but for its rounding.
    filling = center.to(smem.dtype).to(gl.float32)
    if num_real < 64:
        _fill(smem, num_real, filling, ROWS)
    total, largest = None, None
    for i in gl.static_range(64 // ROWS):
        x = _rows(smem, i * ROWS, ROWS)
        # Of a channel those first that are in one thread.
        own = gl.reshape(x, [ROWS // BETWEEN, BETWEEN, D])
        smoothed = gl.reshape(gl.abs(x - center[None, :]), own.shape)
        if i == 0:
            total, largest = gl.sum(own, 0), gl.max(smoothed, 0)
        else:
            total, largest = total + gl.sum(own, 0), gl.maximum(largest, gl.max(smoothed, 0))
    peak = gl.max(gl.max(largest, 1), 0)
    scale = gl.where(peak > 0, gl.div_rn(peak, limit), 1.0)
    for i in gl.static_range(64 // ROWS):
        words = to_code_words(_rows(smem, i * ROWS, ROWS) - center[None, :], scale, FP8)
        _write_words(codes_ptr, i * ROWS, words, None)
        if num_real < 64:
            _write_words(codes_ptr, i * ROWS, words, num_real)
    gl.store(scale_ptr + stored, scale)
    total = gl.convert_layout(gl.sum(total, 0), center.type.layout) - (64 - num_real).to(gl.float32) * filling
    gl.store(mean_ptr + (head * T + block).to(gl.int64) * D + channel, total / num_real.to(gl.float32))
    if g == 0:
        gl.store(n_ptr + b * T + block, num_real.to(gl.float32))


@gluon.jit
def _words_of_channels(x):
    """Words of four FP8 codes of (32, C) values, keys in the order of `stored_key`: (C, 2, 4) int32."""
    x = gl.reshape(x, [2, 2, 4, 2, x.shape[1]])
    even, odd = gl.split(gl.permute(x, (4, 0, 2, 1, 3)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    parts = [first, second, third, fourth]
    return gl.inline_asm_elementwise(FP8_WORD, "=r,f,f,f,f", parts, dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _write_channels(codes_ptr, words):
    """Write words (64, 2, 4) of a block's channels, which have 16 each."""
    # The same but for the order in which a thread has them: it writes four places at once.
    layout: gl.constexpr = gl.BlockedLayout([2, 1, 4], [16, 2, 1], [1, 1, 1], [2, 0, 1])
    channel = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    group = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    place = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    pointers = codes_ptr + (16 * channel)[:, None, None] + (4 * group)[None, :, None] + place[None, None, :]
    gl.store(pointers, gl.convert_layout(words, layout))


@gluon.jit
def _value_blocks_kernel(
    v_tiles, scale_ptr, codes_ptr, mean_ptr, peak_ptr, v_rows, v_head_rows, v_columns, G, N_KV, T, num_stored,
):  # fmt: skip
    """Grid (B G T,): blocks of values, transposed as they are stored. codes_ptr: words of four codes."""
    D: gl.constexpr = v_tiles.block_type.shape[1]
    # Of 32 values a thread has the 16 that are stored together, and of 64 channels four: neighbours twice.
    layout: gl.constexpr = gl.BlockedLayout([16, 2], [2, 16], [1, 1], [1, 0])
    smem = gl.allocate_shared_memory(v_tiles.dtype, v_tiles.block_type.shape, v_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b, g, block = _fetch(v_tiles, v_rows, v_head_rows, v_columns, G, T, smem, full)
    head = b * G + g
    row = (head * T + block).to(gl.int64)
    codes_ptr += (head * num_stored + block).to(gl.int64) * (D * 16)
    channel = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    num_real = gl.minimum(N_KV - block * 64, 64)
    scales = ()
    for part in gl.static_range(D // 64):
        scales = scales + (gl.load(scale_ptr + head * D + part * 64 + channel),)
    mbarrier.wait(full, 0)
    if num_real < 64:
        _fill(smem, num_real, gl.zeros([D], gl.float32, layout=gl.SliceLayout(0, _rows_layout(D))), _rows_at_once(D))
    for part in gl.static_range(D // 64):
        total, largest = None, None
        for i in gl.static_range(2):
            x = smem.slice(32 * i, 32).slice(64 * part, 64, 1).load(layout).to(gl.float32)
            own = gl.reshape(x, [2, 16, 64])
            if i == 0:
                total, largest = gl.sum(own, 1), gl.max(gl.abs(own), 1)
            else:
                total, largest = total + gl.sum(own, 1), gl.maximum(largest, gl.max(gl.abs(own), 1))
            words = _words_of_channels(quotient(x, scales[part][None, :]))
            _write_channels(codes_ptr + 64 * part * 16 + 2 * i * 4, words)
        mean = gl.convert_layout(gl.sum(total, 0), channel.type.layout) / num_real.to(gl.float32)
        gl.store(mean_ptr + row * D + part * 64 + channel, mean.to(mean_ptr.dtype.element_ty))
        peak = gl.convert_layout(gl.max(largest, 0), channel.type.layout)
        gl.store(peak_ptr + row * D + part * 64 + channel, peak)


def write_key_blocks(
    k: Tensor, center: Tensor, codes: Tensor, scale: Tensor, mean: Tensor, n: Tensor, settings: Settings
) -> bool:
    """Write codes and means of k (B, G, N_kv, D); False where its layout forbids it.

    Args:
        k: all real and in the model's order; `triton_one_pass.suits` them.
        center: (B, G, D) float32 what to subtract before rounding.
        codes: (B, G, T or more, block_k, D).
        scale: (B, G, T or more) float32.
        mean: (B, G, T, D) float32.
        n: (B, T) float32.
        settings: the op's.
    """
    tiles, (batch, heads, kv_len, _) = token_tiles(k), k.shape
    if tiles is None:
        return False
    T, is_fp8 = num_blocks(kv_len, BLOCK_K), settings.qk_format == "fp8"
    launch(
        _key_blocks_kernel, (batch * heads * T,),
        tiles, center, codes.view(torch.int32), scale, mean, n, *matrix_steps(k), heads, kv_len, T, scale.shape[2],
        FP8_MAX if is_fp8 else INT8_MAX, FP8=is_fp8, num_warps=1,
    )  # fmt: skip
    return True


def write_value_blocks(v: Tensor, scale: Tensor, codes: Tensor, mean: Tensor, peak: Tensor) -> bool:
    """Write codes, means and largest absolute values of v (B, G, N_kv, D); False where its layout forbids it.

    Args:
        v: all real and in the model's order; `triton_one_pass.suits` them.
        scale: (B, G, D) float32. Values beyond its range get the largest code.
        codes: (B, G, T or more, D, block_k) FP8, keys in the order of `triton_value_codes.stored_key`.
        mean: (B, G, T, D).
        peak: (B, G, T, D) float32.
    """
    tiles, (batch, heads, kv_len, _) = token_tiles(v), v.shape
    if tiles is None:
        return False
    T = num_blocks(kv_len, BLOCK_K)
    launch(
        _value_blocks_kernel, (batch * heads * T,),
        tiles, scale, codes.view(torch.int32), mean, peak, *matrix_steps(v), heads, kv_len, T, codes.shape[2],
        num_warps=1,
    )  # fmt: skip
    return True
