"""The visiting order of a video's tokens: cubes of 4 x 4 x 4, text left where it is, nothing lost."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import BLOCKS
from tolerances import FLOAT64, relative_error

from sla2_compile import SLA2Config, attention
from sla2_compile.kernels.token_order import inverse_order, tile_order

GRIDS = [(4, 4, 4), (8, 8, 8), (5, 6, 7), (1, 9, 16), (21, 30, 52), (3, 1, 1)]


@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_is_visited_once_in_the_order_of_tiles_and_then_of_positions_in_them(
    grid: tuple[int, int, int],
) -> None:
    coordinates = list(itertools.product(*map(range, grid)))
    expected = sorted(
        range(len(coordinates)),
        key=lambda token: ([x // 4 for x in coordinates[token]], [x % 4 for x in coordinates[token]]),
    )
    assert tile_order(grid, len(coordinates), 0).tolist() == expected


def test_a_block_of_64_keys_is_a_cube_and_128_queries_are_two_along_the_width() -> None:
    order = tile_order((8, 12, 16), 8 * 12 * 16, 0)
    coordinates = torch.stack([order // (12 * 16), order // 16 % 12, order % 16], 1)
    for block in coordinates.split(64):
        assert (block.amax(0) - block.amin(0)).tolist() == [3, 3, 3]
        assert len(block.unique(dim=0)) == 64
    for block in coordinates.split(128):
        assert (block.amax(0) - block.amin(0)).tolist() == [3, 3, 7]


def test_text_before_and_after_the_video_keeps_its_place() -> None:
    order = tile_order((5, 6, 7), 210 + 11 + 3, 11)
    assert order[:11].tolist() == list(range(11))
    assert order[-3:].tolist() == list(range(221, 224))
    assert torch.equal(order[11:-3], 11 + tile_order((5, 6, 7), 210, 0))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_inverse_order_undoes_the_order(grid: tuple[int, int, int]) -> None:
    num_tokens = grid[0] * grid[1] * grid[2] + 9
    order, x = tile_order(grid, num_tokens, 5), torch.randn(num_tokens)
    assert torch.equal(x[order][inverse_order(order)], x)
    assert torch.equal(order.sort().values, torch.arange(num_tokens))


@pytest.mark.parametrize("tail", ["pooled", "linear"])
def test_attention_with_a_grid_is_attention_over_reordered_tokens(tail: str) -> None:
    grid, num_tokens = (5, 6, 7), 210
    config = SLA2Config(**BLOCKS, tail=tail)
    q, k, v = torch.randn(3, 1, 2, num_tokens, 16, dtype=torch.float64)
    order = tile_order(grid, num_tokens, 0)
    reordered = attention(q[:, :, order], k[:, :, order], v[:, :, order], config=config)
    in_tiles = attention(q, k, v, config=SLA2Config(**BLOCKS, tail=tail, token_grid=grid))
    assert relative_error(in_tiles, reordered[:, :, inverse_order(order)]) < FLOAT64
    assert relative_error(in_tiles, attention(q, k, v, config=config)) > 1e-2
