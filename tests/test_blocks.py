"""Counting blocks: one arithmetic decides what the op keeps, what its fake allocates and what is reported."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch

from sla2_compile import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.kernels.blocks import (
    delivered_sparsity,
    exact_blocks,
    exact_query_blocks,
    max_kept_blocks,
    num_blocks,
    num_kept_blocks,
)

LENGTHS = (1, 15, 16, 17, 64, 100, 129, 200)
EXACT = ((0, 0), (1, 0), (0, 1), (16, 16), (17, 20), (5, 60))


@pytest.mark.parametrize("num_tokens, expected", [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2), (32760, 512)])
def test_the_last_block_may_be_short(num_tokens: int, expected: int) -> None:
    assert num_blocks(num_tokens, 64) == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7, 0.75, 0.9, 0.95, 0.96, 0.97, 0.999999])
def test_the_kept_blocks_are_their_share_rounded_half_up_and_at_least_one(sparsity: float) -> None:
    units = SLA2Config(sparsity=sparsity).sparsity_units
    for total in (1, 2, 3, 5, 10, 50, 512, 1182, 3125):
        share = (1 - Decimal(str(sparsity))) * total
        expected = max(1, int(share.quantize(Decimal(1), ROUND_HALF_UP)))
        assert num_kept_blocks(total, units) == expected


def test_every_block_is_kept_at_sparsity_0_and_one_at_the_highest() -> None:
    for total in range(1, 200):
        assert num_kept_blocks(total, 0) == total
        assert num_kept_blocks(total, SLA2Config(sparsity=1 - 1e-9).sparsity_units) == 1


@pytest.mark.parametrize("prefix, suffix", EXACT)
def test_exact_blocks_are_those_that_hold_an_exact_token(prefix: int, suffix: int) -> None:
    for length in LENGTHS:
        if prefix + suffix > length:
            continue
        tokens = [*range(prefix), *range(length - suffix, length)]
        exact = exact_blocks(length, 16, prefix, suffix)
        counted = {*range(exact.num_first), *range(exact.last_start, exact.num_blocks)}
        assert counted == {token // 16 for token in tokens}
        assert exact.count == len(counted)


def test_exact_tokens_are_queries_only_where_there_are_as_many_queries_as_keys() -> None:
    assert exact_query_blocks(200, 200, 32, 20, 9) == exact_blocks(200, 32, 20, 9)
    assert exact_query_blocks(199, 200, 32, 20, 9).count == 0


@pytest.mark.parametrize("prefix, suffix", EXACT)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.97])
def test_delivered_sparsity_and_the_most_kept_blocks_are_those_of_the_reference(
    prefix: int, suffix: int, sparsity: float
) -> None:
    config = SLA2Config(sparsity=sparsity, block_q=32, block_k=16, exact_prefix=prefix, exact_suffix=suffix)
    for q_len, kv_len in ((200, 200), (129, 129), (64, 200), (333, 100)):
        q, k = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, kv_len, 16)
        mask = reference.block_mask(q, k, config=config)
        assert delivered_sparsity(q_len, kv_len, config) == pytest.approx(1 - mask.double().mean().item())
        exact = exact_query_blocks(q_len, kv_len, 32, prefix, suffix)
        others = mask[:, :, exact.num_first : exact.last_start].sum(-1)
        most = max_kept_blocks(kv_len, 16, config.sparsity_units, prefix, suffix)
        assert others.eq(most).all()


def test_a_sequence_without_tokens_has_no_sparsity_to_deliver() -> None:
    assert delivered_sparsity(0, 100, SLA2Config()) == delivered_sparsity(100, 0, SLA2Config()) == 0.0


@pytest.mark.parametrize("prefix, suffix", EXACT)
def test_symbolic_lengths_stay_symbolic_and_count_as_plain_ones_do(prefix: int, suffix: int) -> None:
    class Slots(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(1 + max_kept_blocks(x.shape[0], 16, 700_000, prefix, suffix))

    length = {"x": {0: torch.export.Dim("length", min=80, max=4096)}}
    program = torch.export.export(Slots(), (torch.zeros(200),), dynamic_shapes=length)
    for num_tokens in (80, 129, 4096):
        slots = max_kept_blocks(num_tokens, 16, 700_000, prefix, suffix)
        assert len(program.module()(torch.zeros(num_tokens))) == 1 + slots
