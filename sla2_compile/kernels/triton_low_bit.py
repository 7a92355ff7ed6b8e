"""Low-bit codes of k and v, written once in visiting order for the attention kernel to read many times.

See `triton_key_codes.py` and `triton_value_codes.py`; scales are those of `quant/formats.py`. The means that a pooled
tail attends to follow as if they were more blocks of keys and values: kept keys and means then are one stretch of tiles
to a kernel. Means of values are FP8 only where keys are too (`quant/formats.py`), with the values' scales, so that both
add up in one sum.

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
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import heads_fastest
from sla2_compile.kernels.triton_key_codes import KeyCodes, key_codes, key_rows, write_key_codes
from sla2_compile.kernels.triton_statistics import Statistics
from sla2_compile.kernels.triton_value_codes import value_codes, value_rows, write_value_codes
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
        write_value_codes(
            v_bar_ptr + head * T * D, None, None, v_scale, v_codes_ptr + row * D * BLOCK_K, block * BLOCK_K, T, D, D,
            BLOCK_D, BLOCK_K, VALUE_ROWS,
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
    of_values: Tensor | None = None,
) -> Codes:
    """Codes of k and v (B, G, N_kv, D), last stride 1, in the settings' formats; without one nothing is launched.

    with_means: of their blocks' means too, of values only where they are rounded. They are rounded once, from float32.
    of_keys, of_values: codes that there are already, with room for those of means where these are wanted.
    """
    (batch, heads, _, dim), T = k.shape, statistics.n.shape[1]
    num_stored = num_stored_blocks(T, settings, with_means=with_means)
    if settings.qk_format is not None and of_keys is None:
        assert statistics.center is not None
        of_keys = key_codes(k, statistics.center, num_stored, real, order, settings)
    if settings.pv_format is not None and of_values is None:
        assert statistics.v_scale is not None
        of_values = value_codes(v, statistics.v_scale, num_stored, real, order, settings)
    has_means_values = num_stored > T and settings.rounds_means_values
    if num_stored > T:
        assert of_keys is not None
        block_d, is_fp8 = padded_dim(dim), settings.qk_format == "fp8"
        launch(
            _means_codes_kernel, (batch * heads * (num_stored - T),),
            statistics.k_mean, statistics.v_bar if has_means_values else None, statistics.n, statistics.center,
            statistics.v_scale, of_keys.codes, of_keys.scale, of_values if has_means_values else None, heads, T,
            num_stored,
            D=dim, BLOCK_D=block_d, BLOCK_K=settings.block_k, ROWS=key_rows(block_d, settings),
            VALUE_ROWS=value_rows(block_d, settings), FP8_KEYS=is_fp8, LIMIT=FP8_MAX if is_fp8 else INT8_MAX,
            num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    k_codes, k_scale = (None, None) if of_keys is None else (of_keys.codes, of_keys.scale)
    return Codes(statistics.q_scale, k_codes, k_scale, of_values, statistics.v_scale, num_stored, has_means_values)
