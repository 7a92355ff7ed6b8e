"""The order in which tokens of a video are visited: 3D tiles of 4 x 4 x 4, so that a block of 64 keys is a cube."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_SIZE = 4


def tile_order(
    token_grid: tuple[int, int, int], num_tokens: int, exact_prefix: int, *, device: torch.device | None = None
) -> Tensor:
    """Positions of the model's tokens in visiting order.

    Tokens before and after the video part keep their places. Within it the sort key is the tile's (t, h, w), then the
    position in the tile (t, h, w); tiles at the far edges may be smaller.

    Args:
        token_grid: (frames, height, width) of the video part, in tokens.
        num_tokens: length of the whole sequence.
        exact_prefix: tokens before the video part.
        device: where to put the result.

    Returns:
        (num_tokens,) int64 `order`: the visited sequence is `x[order]`.
    """
    position = torch.arange(token_grid[0] * token_grid[1] * token_grid[2], device=device)
    _, height, width = token_grid
    coordinates = (position // (height * width), position // width % height, position % width)
    key = torch.zeros_like(position)
    for coordinate, size in zip(coordinates, token_grid, strict=True):
        key = key * (size // TILE_SIZE + 1) + coordinate // TILE_SIZE
    for coordinate in coordinates:
        key = key * TILE_SIZE + coordinate % TILE_SIZE
    order = torch.arange(num_tokens, device=device)
    end = exact_prefix + position.shape[0]
    return torch.cat([order[:exact_prefix], exact_prefix + key.argsort(), order[end:]])


def inverse_order(order: Tensor) -> Tensor:
    """The order that undoes `order`: `x[order][inverse_order(order)] == x`."""
    return torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
