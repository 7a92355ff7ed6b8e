"""Low-bit codes of values: FP8 with one scale per channel over all keys, each block transposed.

8-bit tensor cores want both operands of P V contiguous along the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import heads_fastest, in_elements, is_real, load_tile, token_of
from sla2_compile.kernels.triton_key_codes import CODE_TYPES, to_codes


@triton.jit
def stored_key(place):
    """The key of a group of 16 that is stored at `place`.

    Tensor cores leave a row's scores with each thread as keys 2c, 2c + 1, 2c + 8, 2c + 9 and want its probabilities,
    in 8 bits, as keys 4c to 4c + 3. A sum over keys does not mind their order, so the values come in the scores'.
    """
    return place // 16 * 16 + place % 16 // 4 * 2 + place % 2 + place % 4 // 2 * 8


@triton.jit
def in_stored_order(probs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Columns of `probs` (ROWS, KEYS) in the order of `stored_key`; moves nothing between threads."""
    probs = tl.reshape(probs, [ROWS, KEYS // 16, 2, 4, 2])
    return tl.reshape(tl.permute(probs, (0, 1, 3, 2, 4)), [ROWS, KEYS])


@triton.jit
def write_value_codes(
    v_ptr, real_ptr, order_ptr, scale, codes_ptr, first_token, N_KV, v_sn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes of one block of a head's values, transposed."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    for first in tl.range(0, BLOCK_K, ROWS, num_stages=1):
        position = first_token + first + stored_key(place)
        token = token_of(order_ptr, position, N_KV)
        real = is_real(real_ptr, token, position, N_KV)
        v = load_tile(v_ptr, token, real, v_sn, D, BLOCK_D).to(tl.float32)
        ptrs = codes_ptr + (d * BLOCK_K)[:, None] + (first + place)[None, :]
        tl.store(ptrs, tl.trans(to_codes(v, scale[None, :], True)), mask=(d < D)[:, None])


@triton.jit
def _value_codes_kernel(
    v_ptr, real_ptr, order_ptr, scale_ptr, codes_ptr, v_sb, v_sh, v_sn, real_sb, G, N_KV, T, num_stored,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G T,): blocks of values; heads vary fastest, as they do in memory. ROWS: values of a step."""
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    b, g, block = heads_fastest(tl.program_id(0).to(tl.int64), G, T)
    head = b * G + g
    if real_ptr is not None:
        real_ptr += b * real_sb
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr + head * D + d, mask=d < D, other=1.0)
    write_value_codes(
        v_ptr + b * v_sb + g * v_sh, real_ptr, order_ptr, scale, codes_ptr + (head * num_stored + block) * D * BLOCK_K,
        block * BLOCK_K, N_KV, v_sn, D, BLOCK_D, BLOCK_K, ROWS,
    )  # fmt: skip


def value_rows(block_d: int, settings: Settings) -> int:
    """Rows of a block that a program has in registers at once."""
    return min(settings.block_k, max(16, 4096 // block_d))


def empty_value_codes(v: Tensor, num_stored: int, settings: Settings) -> Tensor:
    """Uninitialised codes (B, G, num_stored, D, block_k) of v's heads in the settings' pv_format, which is one."""
    assert settings.pv_format is not None
    (batch, heads, _, dim), dtype = v.shape, CODE_TYPES[settings.pv_format]
    return v.new_empty(batch, heads, num_stored, dim, settings.block_k, dtype=dtype)


def value_codes(
    v: Tensor, scale: Tensor, num_stored: int, real: Tensor | None, order: Tensor | None, settings: Settings
) -> Tensor:
    """Codes of v's blocks (B, G, num_stored, D, block_k), in the settings' pv_format, which is one.

    Args:
        v: (B, G, N_kv, D), last stride 1.
        scale: (B, G, D) float32.
        num_stored: blocks to have room for, at least v's.
        real: (B, N_kv) bool, True where a key is real; None: all are.
        order: (N,) int32 the model's token at each visited position; None keeps the model's order.
        settings: the op's.
    """
    (batch, heads, kv_len, dim), (unit, strides) = v.shape, token_strides(v)
    T, block_d = num_blocks(kv_len, settings.block_k), padded_dim(dim)
    codes = empty_value_codes(v, num_stored, settings)
    launch(
        _value_codes_kernel, (batch * heads * T,),
        v, real, order, scale, codes, *strides, 0 if real is None else real.stride(0), heads, kv_len, T, num_stored,
        D=dim, BLOCK_D=block_d, BLOCK_K=settings.block_k, ROWS=value_rows(block_d, settings), UNIT=unit, num_warps=4,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return codes
