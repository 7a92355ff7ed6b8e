"""Low-bit codes and block means of keys and values in one pass over each, on Hopper, where nothing is saved.

What codes need to know of all tokens, here some 1,000 of them tell, read beforehand. Of keys that is the center that
smoothing subtracts. A softmax does not see which one it is, since it shifts all scores of a row alike; so this is for
keys that meet nothing else. Of values it is the scale of each channel. Codes in FP8 are floats and do not mind a scale
that is a few times too large. But none may be too small, so the pass finds the true peaks too. A head with a channel
whose scale does not suit it is written again, with that channel's as `triton_statistics.py` has it.

For shape (1, 40, 75600, 128) that leaves out reading 1.5 GB, 0.36 ms at 4.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_one_pass import write_key_blocks, write_value_blocks
from sla2_compile.kernels.gluon_tiles import keys_suit_hopper
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import in_elements
from sla2_compile.kernels.triton_key_codes import KeyCodes, empty_key_codes
from sla2_compile.kernels.triton_value_codes import empty_value_codes, value_rows, write_value_codes
from sla2_compile.quant.formats import FP8_MAX

# Tokens that tell of all, at most. The mean of so many is by chance off by 1/32 of their standard deviation, which adds
# 1/1024 to what codes have to cover.
SAMPLES = 1024
# How much larger than these tokens' the largest values of all may be, and how much smaller than that leaves a scale as
# good: of the 15 powers of two of FP8's normal numbers it takes the lowest four.
HEADROOM, SLACK = 2.0, 16.0
# Channels of a program, and tokens or blocks of one of its steps.
CHANNELS, STEP = 16, 512
# Programs that write a head again.
WRITERS = 32


@dataclass(frozen=True)
class KeyPass:
    codes: KeyCodes
    center: Tensor  # (B, G, D) float32
    mean: Tensor  # (B, G, T, D) float32, of the keys without smoothing
    n: Tensor  # (B, T) float32


@dataclass(frozen=True)
class ValuePass:
    codes: Tensor  # (B, G, T or more, D, block_k) FP8
    scale: Tensor  # (B, G, D) float32
    mean: Tensor  # (B, G, T, D), float32 where codes are made of it, else in v's dtype


@triton.jit
def _sample_kernel(
    k_ptr, v_ptr, center_ptr, guess_ptr, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, G, N_KV, step, headroom,
    D: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr, LIMIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G, D / CHANNELS, 2): of every `step`-th token the mean of keys, and scales from the largest values.

    k_ptr or v_ptr may be None.
    """
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    head = tl.program_id(0).to(tl.int64)
    b, g = head // G, head % G
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    found = tl.zeros([CHANNELS], tl.float32)
    if tl.program_id(2) == 0:
        if k_ptr is not None:
            for first in range(0, N_KV, STEP * step):
                token = first + tl.arange(0, STEP).to(tl.int64) * step
                ptrs = k_ptr + b * k_sb + g * k_sh + token[:, None] * k_sn + d[None, :]
                found += tl.sum(tl.load(ptrs, mask=(token < N_KV)[:, None], other=0.0).to(tl.float32), 0)
            tl.store(center_ptr + head * D + d, found / ((N_KV + step - 1) // step))
    else:
        if v_ptr is not None:
            for first in range(0, N_KV, STEP * step):
                token = first + tl.arange(0, STEP).to(tl.int64) * step
                ptrs = v_ptr + b * v_sb + g * v_sh + token[:, None] * v_sn + d[None, :]
                v = tl.load(ptrs, mask=(token < N_KV)[:, None], other=0.0).to(tl.float32)
                found = tl.maximum(found, tl.max(tl.abs(v), 0))
            scale = tl.div_rn(found * headroom, LIMIT)
            tl.store(guess_ptr + head * D + d, tl.where(found > 0, scale, 1.0))


@triton.jit
def _check_kernel(
    guess_ptr, peak_ptr, scale_ptr, T,
    D: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr, LIMIT: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """Grid (B G, D / CHANNELS): the scales that were guessed, or in place of those that do not suit, the exact ones."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    peak = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, T, STEP):
        j = first + tl.arange(0, STEP)
        ptrs = peak_ptr + (head * T + j)[:, None] * D + d[None, :]
        peak = tl.maximum(peak, tl.max(tl.load(ptrs, mask=(j < T)[:, None], other=0.0), 0))
    guess = tl.load(guess_ptr + head * D + d)
    exact = tl.where(peak > 0, tl.div_rn(peak, LIMIT), 1.0)
    suits = (exact <= guess) & (exact * SLACK >= guess)
    tl.store(scale_ptr + head * D + d, tl.where(suits, guess, exact))


@triton.jit
def _again_kernel(
    v_ptr, guess_ptr, scale_ptr, codes_ptr, v_sb, v_sh, v_sn, G, N_KV, T, num_stored,
    D: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G, WRITERS): codes of the values of a head, if any of its scales is not the one that was guessed."""
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    head = tl.program_id(0).to(tl.int64)
    b, g = head // G, head % G
    d = tl.arange(0, D)
    scale = tl.load(scale_ptr + head * D + d)
    if tl.max((scale != tl.load(guess_ptr + head * D + d)).to(tl.int32), 0) > 0:
        for block in range(tl.program_id(1), T, tl.num_programs(1)):
            write_value_codes(
                v_ptr + b * v_sb + g * v_sh, None, None, scale, codes_ptr + (head * num_stored + block) * D * BLOCK_K,
                block * BLOCK_K, N_KV, v_sn, D, D, BLOCK_K, ROWS,
            )  # fmt: skip


def suits(k: Tensor, real: Tensor | None, order: Tensor | None, settings: Settings) -> bool:
    """Whether the kernels take this device, dtype and head dim, these blocks, and all keys real and in order."""
    return keys_suit_hopper(k, settings) and real is None and order is None


def one_pass(k: Tensor, v: Tensor, num_stored: int, settings: Settings) -> tuple[KeyPass | None, ValuePass | None]:
    """Codes and means of k and v (B, G, N_kv, D), last stride 1, of those that get codes and whose layout allows it.

    num_stored: blocks that codes have room for, at least those of k.
    """
    (batch, heads, kv_len, dim), float32 = k.shape, torch.float32
    T, (unit, strides) = num_blocks(kv_len, settings.block_k), token_strides(k, v)
    center, guess = (k.new_empty(batch, heads, dim, dtype=float32) for _ in range(2))
    # An odd step, since rows of images rarely have an odd number of tokens: it comes to all of their places.
    step = 1 if kv_len <= SAMPLES else num_blocks(kv_len, SAMPLES) | 1
    launch(
        _sample_kernel, (batch * heads, dim // CHANNELS, 2),
        None if settings.qk_format is None else k, None if settings.pv_format is None else v, center, guess, *strides,
        heads, kv_len, step, 1.0 if step == 1 else HEADROOM,
        D=dim, CHANNELS=CHANNELS, STEP=STEP, LIMIT=FP8_MAX, UNIT=unit, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    keys = values = None
    if settings.qk_format is not None:
        coded, mean = empty_key_codes(k, num_stored, settings), k.new_empty(batch, heads, T, dim, dtype=float32)
        n = k.new_empty(batch, T, dtype=float32)
        if write_key_blocks(k, center, coded.codes, coded.scale, mean, n, settings):
            keys = KeyPass(coded, center, mean, n)
    if settings.pv_format is not None:
        mean = v.new_empty(batch, heads, T, dim, dtype=float32 if settings.rounds_means_values else v.dtype)
        codes, peak = empty_value_codes(v, num_stored, settings), torch.empty_like(mean, dtype=float32)
        if write_value_blocks(v, guess, codes, mean, peak):
            values = ValuePass(codes, _checked(v, guess, peak, codes, settings), mean)
    return keys, values


def _checked(v: Tensor, guess: Tensor, peak: Tensor, codes: Tensor, settings: Settings) -> Tensor:
    """Scales (B, G, D) that suit the values, with which all codes now are written."""
    (batch, heads, kv_len, dim), (unit, strides), scale = v.shape, token_strides(v), torch.empty_like(guess)
    T, num_stored = peak.shape[2], codes.shape[2]
    launch(
        _check_kernel, (batch * heads, dim // CHANNELS), guess, peak, scale, T,
        D=dim, CHANNELS=CHANNELS, STEP=STEP, LIMIT=FP8_MAX, SLACK=SLACK, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    launch(
        _again_kernel, (batch * heads, min(WRITERS, T)),
        v, guess, scale, codes, *strides, heads, kv_len, T, num_stored,
        D=dim, BLOCK_K=settings.block_k, ROWS=value_rows(padded_dim(dim), settings), UNIT=unit, num_warps=4,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return scale
