"""The visiting order of a video's tokens as one kernel; its twin, `token_order.tile_order`, sorts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.settings import Settings


@triton.jit
def _order_kernel(order_ptr, frames, height, width, prefix, length, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (length / BLOCK,): where each token is visited, in closed form, and the token written there."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = token - prefix
    in_video = (place >= 0) & (place < frames * height * width)
    t, h, w = place // (height * width), place // width % height, place % width
    # First corner of the token's tile, and the tile's extent, smaller at the far edges.
    t0, h0, w0 = t // SIDE * SIDE, h // SIDE * SIDE, w // SIDE * SIDE
    depth, rows, columns = tl.minimum(frames - t0, SIDE), tl.minimum(height - h0, SIDE), tl.minimum(width - w0, SIDE)
    before = t0 * height * width + h0 * width * depth + w0 * rows * depth
    rank = before + ((t - t0) * rows + h - h0) * columns + w - w0
    rank = tl.where(in_video, rank + prefix, token)
    tl.store(order_ptr + rank, token, mask=token < length)


def visiting_order(settings: Settings, num_tokens: int, device: torch.device) -> Tensor | None:
    """(num_tokens,) int32, the model's token at each visited position; None where no grid is set."""
    if settings.token_grid is None:
        return None
    order = torch.empty(num_tokens, dtype=torch.int32, device=device)
    launch(
        _order_kernel, (num_blocks(num_tokens, 1024),), order, *settings.token_grid, settings.exact_prefix, num_tokens,
        SIDE=4, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return order
