"""The linear tail on the side of the keys: h_j, z_j of each key block, and dk, dv from their gradients.

h_j = phi(k_j)^T v_j,  z_j = sum phi(k_j),  one matrix of D + 1 rows,    dphi(k) = v dh^T + dz,  dv = phi(k) dh
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels import gluon_states
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import max_registers, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_feature_map import feature_map, feature_map_gradient
from sla2_compile.kernels.triton_backward_loads import (
    heads_fastest,
    in_elements,
    is_real,
    load_tile,
    store_tile,
    token_of,
)


@dataclass(frozen=True)
class LinearConfig:
    """Tiles of the linear tail's kernels, on the side of the keys and of the queries."""

    rows: int  # query rows or keys of a step
    values: int  # channels of v that go together
    num_warps: int


def linear_config(dim: int, itemsize: int, shared_memory: int) -> LinearConfig:
    """For a head dim and a GPU with so many bytes of shared memory per program."""
    large = shared_memory >= 200 * 1024
    if itemsize == 4:
        return LinearConfig(16, 32, 8) if dim <= 128 else LinearConfig(16, 16, 8)
    if dim <= 128:
        return LinearConfig(64 if large else 32, 64, 8)
    return LinearConfig(64, 32, 8) if large else LinearConfig(16, 128, 8)


def states_config(dim: int, itemsize: int, shared_memory: int) -> LinearConfig:
    """For the kernel that makes the key blocks' states, as above."""
    if dim == 128 and itemsize == 2 and shared_memory >= 200 * 1024:
        # All of v at once measures fastest: phi is made once.
        return LinearConfig(64, 128, 8)
    return linear_config(dim, itemsize, shared_memory)


def padded_key_blocks(T: int) -> int:
    """How many key blocks a sum over T of them runs over, the last ones empty.

    The library's fastest matmuls, which the copy engine feeds, want rows and sums of multiples of 16 bytes; without
    them a sum took three times as long at 720p.
    """
    return num_blocks(T, 16) * 16


def linear_constants(x: Tensor, config: LinearConfig, settings: Settings) -> dict[str, Any]:
    """What all of the linear tail's kernels are compiled for; `x` is one of the inputs."""
    block_d = padded_dim(x.shape[3])
    return {
        "D": x.shape[3],
        "BLOCK_D": block_d,
        "VALUES": min(config.values, block_d),
        "MAP": settings.feature_map,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "maxnreg": max_registers(config.num_warps),
    }


@triton.jit
def _smoothed_keys(k_ptr, k_mean_ptr, token, real, k_sn, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    k_mean = tl.load(k_mean_ptr + d, mask=d < D, other=0.0)
    return load_tile(k_ptr, token, real, k_sn, D, BLOCK_D).to(tl.float32) - k_mean[None, :]


@triton.jit
def _state_kernel(
    k_ptr, v_ptr, k_mean_ptr, real_ptr, order_ptr, states_ptr, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, real_sb,
    G, N_KV, T, T_PADDED, factor, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B T G, D / VALUES): h_j (D, VALUES) and, once, z_j below it, both times `factor`."""
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    b, g, j = heads_fastest(tl.program_id(0).to(tl.int64), G, T)
    kv_head = b * G + g
    if real_ptr is not None:
        real_ptr += b * real_sb
    d, e = tl.arange(0, BLOCK_D), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    state = tl.zeros([BLOCK_D, VALUES], tl.float32)
    normalizer = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, BLOCK_K, KEYS, num_stages=1):
        position = j * BLOCK_K + first + tl.arange(0, KEYS)
        token = token_of(order_ptr, position, N_KV)
        real = is_real(real_ptr, token, position, N_KV)
        k = _smoothed_keys(k_ptr + b * k_sb + g * k_sh, k_mean_ptr + kv_head * D, token, real, k_sn, D, BLOCK_D)
        phi = tl.where(real[:, None], feature_map(k, D, BLOCK_D, MAP), 0.0)
        v_ptrs = v_ptr + b * v_sb + g * v_sh + token[:, None] * v_sn + e[None, :]
        v = tl.load(v_ptrs, mask=real[:, None] & (e < D)[None, :], other=0.0)
        state = tl.dot(tl.trans(phi.to(v.dtype)), v, state, input_precision=PRECISION)
        normalizer += tl.sum(phi, 0)
    states_ptr += (kv_head * T_PADDED + j) * (D + 1) * D
    element: tl.constexpr = states_ptr.dtype.element_ty
    ptrs = states_ptr + d[:, None] * D + e[None, :]
    tl.store(ptrs, (state * factor).to(element), mask=(d < D)[:, None] & (e < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(states_ptr + D * D + d, (normalizer * factor).to(element), mask=d < D)


@triton.jit
def _gradient_kernel(
    k_ptr, v_ptr, k_mean_ptr, real_ptr, order_ptr, dh_ptr, dz_ptr, dk_ptr, dv_ptr, dk_sum_ptr,
    k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, real_sb, G, N_KV, T, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B T G,): dk, dv and the sum of dk over the block; dh, dz come divided by `factor`."""
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    b, g, j = heads_fastest(tl.program_id(0).to(tl.int64), G, T)
    kv_head = b * G + g
    row = kv_head * T + j
    if real_ptr is not None:
        real_ptr += b * real_sb
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, VALUES)
    dz = tl.load(dz_ptr + row * D + d, mask=d < D, other=0.0)
    dk_sum = tl.zeros([BLOCK_D], tl.float32)
    for first_key in tl.range(0, BLOCK_K, KEYS, num_stages=1):
        position = j * BLOCK_K + first_key + tl.arange(0, KEYS)
        exists = position < N_KV
        token = token_of(order_ptr, position, N_KV)
        real = is_real(real_ptr, token, position, N_KV)
        k = _smoothed_keys(k_ptr + b * k_sb + g * k_sh, k_mean_ptr + kv_head * D, token, real, k_sn, D, BLOCK_D)
        phi = tl.where(real[:, None], feature_map(k, D, BLOCK_D, MAP), 0.0)
        d_phi = tl.zeros([KEYS, BLOCK_D], tl.float32) + dz[None, :]
        for first in tl.range(0, D, VALUES, num_stages=1):
            inside = (first + e < D)[None, :]
            v_ptrs = v_ptr + b * v_sb + g * v_sh + token[:, None] * v_sn + (first + e)[None, :]
            v = tl.load(v_ptrs, mask=real[:, None] & inside, other=0.0)
            dh_ptrs = dh_ptr + row * D * D + d[:, None] * D + (first + e)[None, :]
            dh = tl.load(dh_ptrs, mask=(d < D)[:, None] & inside, other=0.0)
            d_phi = tl.dot(v, tl.trans(dh), d_phi, input_precision=PRECISION)
            dv = tl.dot(phi.to(dh.dtype), dh, input_precision=PRECISION) * factor
            dv_ptrs = dv_ptr + ((b * N_KV * G + g) + token[:, None] * G) * D + (first + e)[None, :]
            tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=exists[:, None] & inside)
        if MAP != "softmax":
            # Read again rather than held.
            k = _smoothed_keys(k_ptr + b * k_sb + g * k_sh, k_mean_ptr + kv_head * D, token, real, k_sn, D, BLOCK_D)
        dk = feature_map_gradient(k, phi, d_phi * factor, MAP)
        dk = tl.where(real[:, None], dk, 0.0)
        dk_sum += tl.sum(dk, 0)
        store_tile(dk_ptr + (b * N_KV * G + g) * D, token, exists, G * D, dk, D, BLOCK_D)
    tl.store(dk_sum_ptr + row * D + d, dk_sum, mask=d < D)


def key_block_states(
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    factor: float,
    settings: Settings,
    config: LinearConfig,
    *,
    copy_engine: bool = True,
) -> Tensor:
    """h_j and below it z_j, both times `factor`, then zeros: (B G, `padded_key_blocks` of T, D + 1, D) in k's dtype.

    copy_engine: whether tensor descriptors may be used.
    """
    (batch, heads, kv_len, dim), T = k.shape, num_blocks(k.shape[2], settings.block_k)
    states = k.new_empty(batch * heads, padded_key_blocks(T), dim + 1, dim)
    if states.shape[1] > T:
        states[:, T:] = 0
    if copy_engine and (tiles := gluon_states.tiles_of(k, v, real, order, settings)):
        gluon_states.stream_states(states, tiles, k, v, k_mean, factor, settings)
        return states
    constants, (unit, strides) = linear_constants(k, config, settings), token_strides(k, v)
    launch(
        _state_kernel, (batch * heads * T, num_blocks(dim, constants["VALUES"])),
        k, v, k_mean, real, order, states, *strides, 0 if real is None else real.stride(0),
        heads, kv_len, T, states.shape[1], factor, BLOCK_K=settings.block_k,
        KEYS=min(config.rows, settings.block_k), UNIT=unit, **constants,
    )  # fmt: skip
    return states


def linear_key_gradients(
    dk: Tensor,
    dv: Tensor,
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    dh: Tensor,
    dz: Tensor,
    factor: float,
    settings: Settings,
    config: LinearConfig,
) -> Tensor:
    """Write dk, dv (B, G, N_kv, D), contiguous, before K smoothing; return the sum of dk over tokens (B, G, D).

    dh (B G, T, D, D) and dz (B G, T, D) come divided by `factor`.
    """
    (batch, heads, kv_len, dim), T = k.shape, dh.shape[1]
    dk_sum, (unit, strides) = k.new_empty(batch, heads, T, dim, dtype=torch.float32), token_strides(k, v)
    launch(
        _gradient_kernel, (batch * heads * T,),
        k, v, k_mean, real, order, dh, dz, dk, dv, dk_sum, *strides,
        0 if real is None else real.stride(0), heads, kv_len, T, factor, BLOCK_K=settings.block_k,
        KEYS=min(config.rows, settings.block_k), UNIT=unit, **linear_constants(k, config, settings),
    )  # fmt: skip
    return dk_sum.sum(2)
