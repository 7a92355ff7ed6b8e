"""Gradients of k and v: each key block over the query blocks that keep it, and what its mean hands on to its tokens.

The inverse index splits long lists into parts. Parts write float32 sums, which a second kernel adds up in order; all
other key blocks are finished in one go. Shape (1, 12, 32760, 128) at 97 %: 0.39 TFLOP (4 matmuls per pair of tiles),
and 3 GB of query tiles from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.hardware import capability, shared_memory
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import (
    MAX_REGISTERS,
    max_registers,
    next_power_of_two,
    padded_dim,
    token_strides,
)
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import in_elements, is_real, load_rows, load_tile, store_tile, token_of
from sla2_compile.kernels.triton_backward_rows import LOG2_E, Rows
from sla2_compile.kernels.triton_inverse_index import InverseIndex


@dataclass(frozen=True)
class KeysConfig:
    keys: int  # keys of a program
    rows: int  # query rows of a step
    num_warps: int
    num_stages: int


def keys_config(dim: int, itemsize: int, device: torch.device) -> KeysConfig:
    """For a head dim on a GPU: the largest tiles that no variant of the kernel spills with."""
    large = shared_memory(device) >= 200 * 1024
    hopper = large and capability(device)[0] < 10
    # Only Hopper's matmuls leave the registers that four warps need.
    warps = 4 if hopper else 8
    if itemsize == 4:
        return KeysConfig(32, 32 if dim <= 64 else 16, 8, 1) if dim <= 128 else KeysConfig(16, 16, 8, 1)
    if dim <= 64:
        return KeysConfig(64, 64, 4, 2)
    if dim == 128 and large:
        return KeysConfig(64, 64, warps, 2)
    if dim <= 128:
        return KeysConfig(64, 32, warps, 3 if large else 2)
    if large:
        return KeysConfig(64 if hopper else 32, 32, 8, 2)
    return KeysConfig(32, 32, 4, 1)


@triton.jit
def _finish(
    grad, scale, grad_ptr, mean_ptr, correction_ptr, kv_head, kv_row, token, real, exists, n, G, N_KV,
    mean_split_stride, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Add what a token gets from its block's mean and from a linear tail, and write (K, D) of one key head.

    0 for tokens that are not real. mean_ptr, correction_ptr may be None.
    """
    d = tl.arange(0, BLOCK_D)
    grad_ptr += (kv_head // G * N_KV * G + kv_head % G) * D
    if mean_ptr is not None:
        split = tl.arange(0, SPLITS)
        ptrs = mean_ptr + split.to(tl.int64)[:, None] * mean_split_stride + (kv_row * D + d)[None, :]
        mean_grad = tl.sum(tl.load(ptrs, mask=(split < splits)[:, None] & (d < D)[None, :], other=0.0), 0)
        grad += (mean_grad / tl.maximum(n, 1.0))[None, :]
    grad *= scale
    if ACCUMULATE:
        grad += load_tile(grad_ptr, token, real, G * D, D, BLOCK_D).to(tl.float32)
    if correction_ptr is not None:
        grad -= tl.load(correction_ptr + kv_head * D + d, mask=d < D, other=0.0)[None, :]
    grad = tl.where(real[:, None], grad, 0.0)
    store_tile(grad_ptr, token, exists, G * D, grad, D, BLOCK_D)


@triton.jit
def _finish_block(
    dk, dv, kv_row, first, real_ptr, order_ptr, n_ptr, dk_bar_ptr, dv_bar_ptr, correction_ptr, dk_ptr, dv_ptr, real_sb,
    mean_split_stride, G, N_KV, T, splits, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Finish dk and dv (KEYS, D) of the keys from the `first` on of key block number `kv_row`, int64."""
    kv_head, j = kv_row // T, (kv_row % T).to(tl.int32)
    b = kv_head // G
    if real_ptr is not None:
        real_ptr += b * real_sb
    position = j * BLOCK_K + first + tl.arange(0, KEYS)
    token = token_of(order_ptr, position, N_KV)
    real = is_real(real_ptr, token, position, N_KV)
    n = tl.load(n_ptr + b * T + j)
    exists = position < N_KV
    _finish(
        dv, 1.0, dv_ptr, dv_bar_ptr, None, kv_head, kv_row, token, real, exists, n, G, N_KV,
        mean_split_stride, splits, D, BLOCK_D, SPLITS, ACCUMULATE,
    )  # fmt: skip
    _finish(
        dk, scale, dk_ptr, dk_bar_ptr, correction_ptr, kv_head, kv_row, token, real, exists, n, G, N_KV,
        mean_split_stride, splits, D, BLOCK_D, SPLITS, ACCUMULATE,
    )  # fmt: skip


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, real_ptr, order_ptr, lse_ptr, offset_ptr, cap_ptr, n_ptr, dk_bar_ptr, dv_bar_ptr,
    count_ptr, start_ptr, lists_ptr, first_part_ptr, part_key_ptr, correction_ptr, partial_ptr, dk_ptr, dv_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, grad_sb, grad_sh, grad_sn, real_sb, mean_split_stride,
    partial_size, H, N, N_KV, M, T, key_heads, capacity, max_parts, part_length, splits, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, ACCUMULATE: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G (max_parts + T) BLOCK_K / KEYS,), parts of long lists first.

    Scores and their gradients are (KEYS, ROWS), so that neither goes through memory on its way into the next matmul.
    dk_bar_ptr, dv_bar_ptr, correction_ptr may be None.
    """
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    grad_sb, grad_sh, grad_sn = in_elements((grad_sb, grad_sh, grad_sn), UNIT)
    ROW_PARTS: tl.constexpr = BLOCK_Q // ROWS
    KEY_PARTS: tl.constexpr = BLOCK_K // KEYS
    item = tl.program_id(0) // KEY_PARTS
    is_part = item < key_heads * max_parts
    part = item % max_parts
    if is_part:
        kv_head = (item // max_parts).to(tl.int64)
        j = tl.load(part_key_ptr + item)
    else:
        kv_head = ((item - key_heads * max_parts) // T).to(tl.int64)
        j = (item - key_heads * max_parts) % T
    kv_row = kv_head * T + tl.maximum(j, 0)
    length = tl.load(count_ptr + kv_row)
    is_split = length >= 2 * part_length
    if (j < 0) | (is_split != is_part):
        return
    num_parts = tl.where(is_part, length // part_length, 1)
    chunk = tl.where(is_part, part - tl.load(first_part_ptr + kv_row), 0)
    count = length // num_parts + tl.where(chunk < length % num_parts, 1, 0)
    first = chunk * (length // num_parts) + tl.minimum(chunk, length % num_parts)
    first += tl.load(start_ptr + kv_row)
    G = H // GROUP
    b, g = kv_head // G, kv_head % G
    k_ptr += b * k_sb + g * k_sh
    v_ptr += b * v_sb + g * v_sh
    q_ptr += b * q_sb + g * GROUP * q_sh
    grad_ptr += b * grad_sb + g * GROUP * grad_sh
    lists_ptr += kv_head * capacity + first
    statistics = (b * H + g * GROUP) * M * BLOCK_Q
    lse_ptr += statistics
    offset_ptr += statistics
    cap_ptr += statistics

    in_block = tl.program_id(0) % KEY_PARTS * KEYS + tl.arange(0, KEYS)
    key_position = j * BLOCK_K + in_block
    key_token = token_of(order_ptr, key_position, N_KV)
    real = is_real(real_ptr if real_ptr is None else real_ptr + b * real_sb, key_token, key_position, N_KV)
    k = load_tile(k_ptr, key_token, real, k_sn, D, BLOCK_D)
    v = load_tile(v_ptr, key_token, real, v_sn, D, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    # The next step's query block is read one step ahead, since the addresses of its rows wait for it.
    entry = tl.load(lists_ptr, mask=count > 0, other=0)
    for i in tl.range(0, count * ROW_PARTS, num_stages=STAGES):
        this = entry
        in_group = (this // M).to(tl.int64) if GROUP > 1 else 0
        m = this % M if GROUP > 1 else this
        position = m * BLOCK_Q + i % ROW_PARTS * ROWS
        ahead = (i + 1) // ROW_PARTS
        entry = tl.load(lists_ptr + ahead, mask=ahead < count, other=0)
        # Rows past the last have an infinite lse, and so no probability.
        row = this * BLOCK_Q + i % ROW_PARTS * ROWS + tl.arange(0, ROWS)
        lse = tl.load(lse_ptr + row)
        q = load_rows(q_ptr + in_group * q_sh, order_ptr, position, N, q_sn, ROWS, D, BLOCK_D)
        grad = load_rows(grad_ptr + in_group * grad_sh, order_ptr, position, N, grad_sn, ROWS, D, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]
        if CAP:
            scores = tl.minimum(scores, tl.load(cap_ptr + row)[None, :])
        probs = tl.exp2(scores)
        dv = tl.dot(probs.to(q.dtype), grad, dv, input_precision=PRECISION)
        d_probs = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        # Read as late as this for want of registers.
        offset = tl.load(offset_ptr + row)
        d_scores = probs * (d_probs - offset[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)

    # Where the results go follows from the program's number alone: nothing of it is held during the loop.
    if is_part:
        d = tl.arange(0, BLOCK_D)
        ptrs = partial_ptr + (item.to(tl.int64) * BLOCK_K + in_block)[:, None] * D + d[None, :]
        tl.store(ptrs, dk, mask=(d < D)[None, :])
        tl.store(ptrs + partial_size, dv, mask=(d < D)[None, :])
    else:
        _finish_block(
            dk, dv, (item - key_heads * max_parts).to(tl.int64), tl.program_id(0) % KEY_PARTS * KEYS, real_ptr,
            order_ptr, n_ptr, dk_bar_ptr, dv_bar_ptr, correction_ptr, dk_ptr, dv_ptr, real_sb, mean_split_stride,
            G, N_KV, T, splits, scale, D, BLOCK_D, BLOCK_K, KEYS, SPLITS, ACCUMULATE,
        )  # fmt: skip


@triton.jit
def _parts_kernel(
    real_ptr, order_ptr, n_ptr, dk_bar_ptr, dv_bar_ptr, count_ptr, first_part_ptr, correction_ptr, partial_ptr,
    dk_ptr, dv_ptr, real_sb, mean_split_stride, partial_size, G, N_KV, T, max_parts, part_length, splits, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Grid (B G T, BLOCK_K / KEYS): add up the parts of a list; nothing to do for one that was not split."""
    kv_row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + kv_row)
    if count < 2 * part_length:
        return
    in_block = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    first = kv_row // T * max_parts + tl.load(first_part_ptr + kv_row)
    d = tl.arange(0, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for part in range(count // part_length):
        ptrs = partial_ptr + (((first + part) * BLOCK_K + in_block) * D)[:, None] + d[None, :]
        dk += tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
        dv += tl.load(ptrs + partial_size, mask=(d < D)[None, :], other=0.0)
    _finish_block(
        dk, dv, kv_row, tl.program_id(1) * KEYS, real_ptr, order_ptr, n_ptr, dk_bar_ptr, dv_bar_ptr, correction_ptr,
        dk_ptr, dv_ptr, real_sb, mean_split_stride, G, N_KV, T, splits, scale,
        D, BLOCK_D, BLOCK_K, KEYS, SPLITS, ACCUMULATE,
    )  # fmt: skip


def key_gradients(
    dk: Tensor,
    dv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: InverseIndex,
    rows: Rows,
    n: Tensor,
    dk_bar: Tensor | None,
    dv_bar: Tensor | None,
    correction: Tensor | None,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    config: KeysConfig,
) -> None:
    """Write dk, dv (B, G, N_kv, D), contiguous.

    With `correction` (B, G, D) they hold a linear tail's part: this adds to dk less `correction`, and to dv.
    dk_bar, dv_bar: (splits, B, G, T, D) float32 sums of the means' gradients, or None.
    """
    (_, heads, q_len, dim), (batch, key_heads, kv_len, _) = q.shape, k.shape
    T, max_parts = index.count.shape[1], index.part_key.shape[1]
    partial = empty_parts(k, index, settings)
    key_size = min(config.keys, settings.block_k)
    key_parts = settings.block_k // key_size
    splits = 1 if dk_bar is None else dk_bar.shape[0]
    unit, token = token_strides(q, k, v, grad_out)
    launch(
        _keys_kernel, (batch * key_heads * (max_parts + T) * key_parts,),
        q, k, v, grad_out, real, order, rows.sparse_lse, rows.offset, rows.sparse_cap, n, dk_bar, dv_bar,
        index.count, index.start, index.lists, index.first_part, index.part_key, correction, partial, dk, dv,
        *token, 0 if real is None else real.stride(0), 0 if dk_bar is None else dk_bar.stride(0), partial.stride(0),
        heads, q_len, kv_len, index.bits.shape[1], T, batch * key_heads, index.lists.shape[1], max_parts,
        index.part_length, splits, settings.scale,
        GROUP=heads // key_heads, D=dim, BLOCK_D=padded_dim(dim), BLOCK_Q=settings.block_q, BLOCK_K=settings.block_k,
        ROWS=min(config.rows, settings.block_q), KEYS=key_size, SPLITS=next_power_of_two(splits),
        ACCUMULATE=correction is not None, CAP=settings.qk_format is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=config.num_stages, UNIT=unit, num_warps=config.num_warps, maxnreg=max_registers(config.num_warps),
    )  # fmt: skip
    add_parts(dk, dv, q, index, n, dk_bar, dv_bar, correction, real, order, partial, min(key_size, 32), settings)


def empty_parts(k: Tensor, index: InverseIndex, settings: Settings) -> Tensor:
    """Uninitialised sums of dk and dv of all parts: (2, B G, max_parts, block_k, D) float32."""
    (batch, key_heads, _, dim), max_parts = k.shape, index.part_key.shape[1]
    return k.new_empty(2, batch * key_heads, max_parts, settings.block_k, dim, dtype=torch.float32)


def add_parts(
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    index: InverseIndex,
    n: Tensor,
    dk_bar: Tensor | None,
    dv_bar: Tensor | None,
    correction: Tensor | None,
    real: Tensor | None,
    order: Tensor | None,
    partial: Tensor,
    key_size: int,
    settings: Settings,
) -> None:
    """Write dk, dv of the key blocks whose lists were split, `key_size` keys a program."""
    (batch, key_heads, kv_len, dim), (T, max_parts) = dk.shape, (index.count.shape[1], index.part_key.shape[1])
    if q.shape[1] // key_heads * index.bits.shape[1] < 2 * index.part_length:
        return  # no list can be as long as that
    splits = 1 if dk_bar is None else dk_bar.shape[0]
    launch(
        _parts_kernel, (batch * key_heads * T, settings.block_k // key_size),
        real, order, n, dk_bar, dv_bar, index.count, index.first_part, correction, partial, dk, dv,
        0 if real is None else real.stride(0), 0 if dk_bar is None else dk_bar.stride(0), partial.stride(0),
        key_heads, kv_len, T, max_parts, index.part_length, splits, settings.scale,
        D=dim, BLOCK_D=padded_dim(dim), BLOCK_K=settings.block_k, KEYS=key_size, SPLITS=next_power_of_two(splits),
        ACCUMULATE=correction is not None, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
