"""A small warp-specialised kernel, right or with a fault of each kind, for the emulator's own tests."""

from __future__ import annotations

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

from sla2_compile.kernels.gluon_stream import left_operand, out_layout


@gluon.jit
def _fetch(x_tiles, smem, full, empty, num_tiles, FAULT: gl.constexpr):
    for i in range(num_tiles):
        stage = i % 2
        parity = (i // 2) & 1
        if FAULT != "ring not waited for":
            mbarrier.wait(empty.index(stage), parity ^ 1)
        mbarrier.expect(full.index(stage), x_tiles.block_type.nbytes + (16 if FAULT == "too many bytes" else 0))
        tma.async_copy_global_to_shared(x_tiles, [i * 64, 0], full.index(stage), smem.index(stage))


@gluon.jit
def _multiply(w_ptr, out_tiles, smem, out_smem, full, empty, num_tiles, FAULT: gl.constexpr):
    layout: gl.constexpr = out_layout(64, 2)
    operand: gl.constexpr = left_operand(layout, 2)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, operand))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, operand))
    w = gl.load(w_ptr + row[:, None] * 64 + column[None, :])
    for i in range(num_tiles):
        stage = i % 2
        if FAULT != "tile not waited for":
            mbarrier.wait(full.index(stage), (i // 2) & 1)
        acc = gl.zeros([64, 64], gl.float32, layout=layout)
        token = warpgroup_mma(w, smem.index(stage), acc, use_acc=False, is_async=True)
        if FAULT == "slot handed back too early":
            mbarrier.arrive(empty.index(stage), count=1)
        product = warpgroup_mma_wait(1 if FAULT == "product not waited for" else 0, deps=[token])
        if FAULT != "slot handed back too early" and FAULT != "slot never handed back":
            mbarrier.arrive(empty.index(stage), count=1)
        if FAULT == "arrives twice":
            mbarrier.arrive(empty.index(stage), count=1)
        result = product.to(gl.float16)
        if i > 0 and FAULT != "output overwritten":
            tma.store_wait(0)
        out_smem.store(result)
        if FAULT != "no fence":
            fence_async_shared()
        tma.async_copy_shared_to_global(out_tiles, [i * 64, 0], out_smem)
    tma.store_wait(0)


@gluon.jit
def toy_kernel(w_ptr, x_tiles, out_tiles, num_tiles, FAULT: gl.constexpr):
    """w (64, 64) times each of some tiles (64, 64) of x."""
    smem = gl.allocate_shared_memory(x_tiles.dtype, [2, 64, 64], x_tiles.layout)
    out_smem = gl.allocate_shared_memory(x_tiles.dtype, x_tiles.block_type.shape, x_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (w_ptr, out_tiles, smem, out_smem, full, empty, num_tiles, FAULT)),
            (_fetch, (x_tiles, smem, full, empty, num_tiles, FAULT)),
        ],
        [1],
        [24],
    )  # fmt: skip


def multiply(w: Tensor, x: Tensor, fault: str) -> Tensor:
    """w (64, 64) times the tiles of x (tiles * 64, 64), float16."""
    out = torch.full_like(x, torch.nan)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    tiles = [TensorDescriptor(y, list(y.shape), [64, 1], [64, 64], layout) for y in (x, out)]
    toy_kernel[1,](w, *tiles, len(x) // 64, FAULT=fault, num_warps=4)
    return out
