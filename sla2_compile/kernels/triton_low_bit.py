"""Low-bit codes of k and v, written once in visiting order for the attention kernel to read many times.

Keys: one scale per block after smoothing, see `triton_key_codes.py`. Values: FP8 with one scale per channel over all
keys, each block transposed, since 8-bit tensor cores want both operands of P V contiguous along the keys. Scales are
those of `quant/formats.py`. The means that a pooled tail attends to follow as if they were more blocks of keys and
values: kept keys and means then are one stretch of tiles to a kernel. Means of values are FP8 only where keys are too
(`quant/formats.py`), with the values' scales, so that both add up in one sum.

Queries have no codes in memory: only the attention kernel reads them, once, and it rounds them itself by the scales
that `triton_statistics.py` found.

For shape (1, 12, 32760, 128) 0.2 GB are read and 0.1 GB written: 0.07 ms at 4.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import heads_fastest, in_elements, is_real, load_tile, token_of
from sla2_compile.kernels.triton_key_codes import (
    CODE_TYPES,
    KeyCodes,
    empty_key_codes,
    key_rows,
    launch_key_codes,
    to_codes,
    write_key_codes,
)
from sla2_compile.kernels.triton_statistics import Statistics
from sla2_compile.quant.formats import FP8_MAX, INT8_MAX


@dataclass(frozen=True)
class Codes:
    """A field is None where its format is not low-bit."""

    q_scale: Tensor | None  # (B, H, M) float32
    k: Tensor | None  # (B, G, T + S, block_k, D) codes of the smoothed keys, 0 where a key is not real
    k_scale: Tensor | None  # (B, G, T + S) float32
    v: Tensor | None  # (B, G, T + S, D, block_k) FP8 codes, keys in the order of `stored_key`
    v_scale: Tensor | None  # (B, G, D) float32
    num_stored: int  # T + S: the S blocks past the keys' T hold the means that a pooled tail attends to
    has_means_values: bool  # of v too: they are not written otherwise


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
def _write_value_codes(
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
def _means_codes_kernel(
    k_mean_ptr, v_bar_ptr, n_ptr, center_ptr, v_scale_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, G, T, num_stored,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, VALUE_ROWS: tl.constexpr,
    FP8_KEYS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G (num_stored - T),): blocks of means of keys, and of values where v_bar_ptr is not None."""
    b, g, block = heads_fastest(tl.program_id(0).to(tl.int64), G, num_stored - T)
    head = b * G + g
    row = head * num_stored + T + block
    d = tl.arange(0, BLOCK_D)
    center = tl.load(center_ptr + head * D + d, mask=d < D, other=0.0)
    # The mean of an empty block is not 0 after smoothing, and must not reach the scale: it is no real key.
    write_key_codes(
        k_mean_ptr + head * T * D, n_ptr + b * T, None, center, k_codes_ptr + row * BLOCK_K * D, k_scale_ptr + row,
        block * BLOCK_K, T, D, D, BLOCK_D, BLOCK_K, ROWS, FP8_KEYS, LIMIT,
    )  # fmt: skip
    if v_bar_ptr is not None:
        v_scale = tl.load(v_scale_ptr + head * D + d, mask=d < D, other=1.0)
        _write_value_codes(
            v_bar_ptr + head * T * D, None, None, v_scale, v_codes_ptr + row * D * BLOCK_K, block * BLOCK_K, T, D, D,
            BLOCK_D, BLOCK_K, VALUE_ROWS,
        )  # fmt: skip


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
    _write_value_codes(
        v_ptr + b * v_sb + g * v_sh, real_ptr, order_ptr, scale, codes_ptr + (head * num_stored + block) * D * BLOCK_K,
        block * BLOCK_K, N_KV, v_sn, D, BLOCK_D, BLOCK_K, ROWS,
    )  # fmt: skip


def num_stored_blocks(T: int, settings: Settings, *, with_means: bool) -> int:
    """Blocks that have codes: the keys' T, and those of their means where these are codes too."""
    return T + (num_blocks(T, settings.block_k) if with_means and settings.qk_format is not None else 0)


def low_bit_codes(
    k: Tensor,
    v: Tensor,
    statistics: Statistics,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    *,
    with_means: bool,
    of_keys: KeyCodes | None = None,
) -> Codes:
    """Codes of k and v (B, G, N_kv, D), last stride 1, in the settings' formats; without one nothing is launched.

    with_means: of their blocks' means too, of values only where they are rounded. They are rounded once, from float32.
    of_keys: codes of keys that there are already, with room for those of their means where these are wanted.
    """
    (batch, heads, kv_len, dim), T = k.shape, statistics.n.shape[1]
    num_stored, block_k, block_d = (
        num_stored_blocks(T, settings, with_means=with_means),
        settings.block_k,
        padded_dim(dim),
    )
    v_codes = None
    if settings.qk_format is not None and of_keys is None:
        assert statistics.center is not None
        of_keys = empty_key_codes(k, num_stored, settings)
        launch_key_codes(k, statistics.center, of_keys, None, None, real, order, settings)
    value_rows = min(block_k, max(16, 4096 // block_d))
    if settings.pv_format is not None:
        v_codes = v.new_empty(batch, heads, num_stored, dim, block_k, dtype=CODE_TYPES[settings.pv_format])
        unit, strides = token_strides(v)
        launch(
            _value_codes_kernel, (batch * heads * T,),
            v, real, order, statistics.v_scale, v_codes, *strides, 0 if real is None else real.stride(0), heads, kv_len,
            T, num_stored,
            D=dim, BLOCK_D=block_d, BLOCK_K=block_k, ROWS=value_rows, UNIT=unit, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    has_means_values = num_stored > T and settings.rounds_means_values
    if num_stored > T:
        assert of_keys is not None
        is_fp8 = settings.qk_format == "fp8"
        launch(
            _means_codes_kernel, (batch * heads * (num_stored - T),),
            statistics.k_mean, statistics.v_bar if has_means_values else None, statistics.n, statistics.center,
            statistics.v_scale, of_keys.codes, of_keys.scale, v_codes if has_means_values else None, heads, T,
            num_stored,
            D=dim, BLOCK_D=block_d, BLOCK_K=block_k, ROWS=key_rows(block_d, settings), VALUE_ROWS=value_rows,
            FP8_KEYS=is_fp8, LIMIT=FP8_MAX if is_fp8 else INT8_MAX, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    k_codes, k_scale = (None, None) if of_keys is None else (of_keys.codes, of_keys.scale)
    return Codes(statistics.q_scale, k_codes, k_scale, v_codes, statistics.v_scale, num_stored, has_means_values)
