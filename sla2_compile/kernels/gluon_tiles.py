"""Tensors as tiles for Hopper's copy engine, and rings of them in shared memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sla2_compile.kernels.hardware import capability
from sla2_compile.kernels.launch import MAX_LAUNCHES, descriptor_like
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_shape, matrix_steps
from sla2_compile.kernels.triton_backward_rows import FIELDS, Rows

BLOCK_Q, BLOCK_K = 128, 64
# Of a thread before the warps of a program divide them, where two programs share a multiprocessor's 65,536.
HALF_REGISTERS = 128
ELEMENTS = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32, torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5, torch.int16: gl.int16, torch.int32: gl.int32,
}  # fmt: skip


@gluon.constexpr_function
def log2(power):
    """The exponent of a power of two."""
    return power.bit_length() - 1


@gluon.jit
def slot_of(step, STAGES: gl.constexpr):
    """Where in a ring of a power of two slots the tile number `step` is."""
    return step & (STAGES - 1)


@gluon.jit
def phase_of(step, STAGES: gl.constexpr):
    """Parity of the round of the ring in which tile `step` comes."""
    return (step >> log2(STAGES)) & 1


@gluon.jit
def channels(ptr, D: gl.constexpr):
    """A vector (D,), one element a thread: it waits for its use in few registers."""
    return gl.load(ptr + gl.arange(0, D, layout=gl.BlockedLayout([1], [32], [4], [0])))


@gluon.constexpr_function
def row_layout(dim):
    """Layout of (64, dim) tokens over four warps, 16 bytes a thread and all of a row in neighbouring threads."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def visited_tokens(order_ptr, first, length, layout: gl.constexpr):
    """The model's tokens (64,) at the visited positions from `first` on; past the end any token."""
    position = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    return gl.load(order_ptr + gl.minimum(position, length - 1))


@gluon.jit
def write_rows(tiles, ptr, order_ptr, x, smem, row, column, first, N, pitch):
    """Write (64, D) to the tokens visited from `first` on that exist, by way of `smem`, busy until `tma.store_wait`."""
    D: gl.constexpr = x.shape[1]
    smem.store(x)
    fence_async_shared()
    if order_ptr is None and first + 64 <= N:
        tma.async_copy_shared_to_global(tiles, [row + first, column], smem)
    else:
        layout: gl.constexpr = row_layout(D)
        position = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        token = position
        if order_ptr is not None:
            token = visited_tokens(order_ptr, first, N, layout)
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        pointers = ptr + (row + token).to(gl.int64)[:, None] * pitch + (column + channel)[None, :]
        gl.store(pointers, smem.load(layout), mask=(position < N)[:, None])


def keys_suit_hopper(k: Tensor, settings: Settings) -> bool:
    """Whether the kernels for Hopper that read no queries take this device, dtype, head dim and these key blocks."""
    on_hopper = capability(k.device)[0] == 9
    fits = k.dtype in (torch.bfloat16, torch.float16) and k.shape[3] in (64, 128)
    return on_hopper and fits and settings.block_k == BLOCK_K


def suits_hopper(q: Tensor, settings: Settings) -> bool:
    """Whether the kernels for Hopper take this device, dtype, head dim and these blocks."""
    return keys_suit_hopper(q, settings) and settings.block_q == BLOCK_Q


def is_eligible(q: Tensor, real: Tensor | None, order: Tensor | None, kv_len: int, settings: Settings) -> bool:
    """Whether the backward's kernels for Hopper take such inputs, but for strides."""
    return suits_hopper(q, settings) and real is None and order is None and kv_len > 1


def half_stages(dim: int) -> int:
    """Slots of rings of two tensors' tiles, of programs that take half of the shared memory and hold two tiles more."""
    return 2 if dim == 128 else 4


def token_tiles(x: Tensor) -> TensorDescriptor | None:
    """A descriptor for tiles of 64 tokens of `x` (B, H, N, D); None where its layout forbids it.

    Tiles reach past a head's last token. What lies there has weight 0, but must be finite: other tokens or nothing.
    """
    shape = matrix_shape(x)
    if shape is None or (x.shape[2] % BLOCK_Q and _has_gaps(x)):
        return None
    return descriptor_like(_tiles(x.dtype, *shape, BLOCK_K, x.shape[3]), x)


def _has_gaps(x: Tensor) -> bool:
    """Whether memory that is not part of `x` (B, H, N, D) lies between the tokens of two heads or batch elements."""
    batch, heads, length, _ = x.shape
    batch_rows, head_rows, _ = matrix_steps(x)
    if head_rows:
        return head_rows != length or (batch > 1 and batch_rows != heads * length)
    return batch > 1 and batch_rows != length


def matrix_tiles(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A descriptor for tiles of `rows` rows of contiguous `x` (..., pitch), whole ones or so many columns of them."""
    pitch = x.shape[-1]
    return descriptor_like(_tiles(x.dtype, x.numel() // pitch, pitch, rows, columns or pitch), x)


def statistics_tiles(rows: Rows) -> TensorDescriptor:
    """A descriptor for tiles of two neighbouring fields of 64 rows; the fields lie in memory one behind the other."""
    x = rows.sparse_lse
    return descriptor_like(_tiles(x.dtype, len(FIELDS), x.numel(), 2, 64), x)


@functools.lru_cache(MAX_LAUNCHES)
def _tiles(dtype: torch.dtype, length: int, pitch: int, rows: int, columns: int) -> TensorDescriptor:
    base, layout = torch.empty(0, dtype=dtype), shared_layout(rows, columns, dtype)
    return TensorDescriptor(base, [length, pitch], [pitch, 1], [rows, columns], layout)


@functools.cache
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How such a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENTS[dtype])
