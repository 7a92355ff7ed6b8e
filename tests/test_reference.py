"""The reference is the paper's formulas: compared with loops, with dense attention, and with what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BLOCKS, BOTH_TAILS_AND_MIXINGS, MIXINGS, TAILS, Case, make_case
from tolerances import FLOAT64, relative_error
from torch import Tensor

from sla2_compile import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.kernels.blocks import num_kept_blocks

KEPT = 3  # of 9 blocks of 16 keys, at the sparsity of `make_case`


# What it computes


def phi(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum()


def paper_attention(case: Case, block_mask: Tensor) -> Tensor:
    """The paper's SLA2 (section 3) for one head, row by row and key by key: linear tail, a weight per query block."""
    q, k, v = case.q[0, 0], case.k[0, 0], case.v[0, 0]
    k = k - k.mean(0)
    assert case.alpha_logit is not None
    rows = []
    for i, query in enumerate(q):
        block = i // case.config.block_q
        sparse, linear = torch.zeros(2, q.shape[1] + 1, dtype=q.dtype)
        for j, (key, value) in enumerate(zip(k, v, strict=True)):
            value_and_one = torch.cat([value, torch.ones(1, dtype=q.dtype)])
            if block_mask[block, j // case.config.block_k]:
                sparse = sparse + torch.exp(query @ key / math.sqrt(len(query))) * value_and_one
            else:
                linear = linear + phi(query) @ phi(key) * value_and_one
        a = torch.sigmoid(case.alpha_logit[0, block])
        rows.append(a * sparse[:-1] / sparse[-1] + (1 - a) * linear[:-1] / linear[-1])
    return torch.stack(rows)


def test_linear_tail_with_block_mixing_is_the_papers_formula() -> None:
    case = make_case(batch=1, heads=1, q_len=70, kv_len=90, tail="linear", mixing="block")
    with torch.no_grad():
        assert relative_error(case.reference()[0, 0], paper_attention(case, case.block_mask()[0, 0])) < FLOAT64


def test_pooled_tail_with_row_mixing_is_one_softmax_over_kept_keys_and_pooled_rest() -> None:
    case = make_case(batch=1, heads=1, q_len=70, kv_len=90, learned=False)
    q, k, v = (x.detach()[0, 0] for x in (case.q, case.k, case.v))
    mask = case.block_mask()[0, 0]
    expected = []
    for i, query in enumerate(q):
        scores, values = [], []
        for j in range(6):
            keys, block_values = k[16 * j : 16 * j + 16], v[16 * j : 16 * j + 16]
            if mask[i // 32, j]:
                scores += [query @ key / 4 for key in keys]
                values += list(block_values)
            else:
                scores += [query @ keys.mean(0) / 4 + math.log(len(keys))]
                values += [block_values.mean(0)]
        expected.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    assert relative_error(case.reference()[0, 0], torch.stack(expected)) < FLOAT64


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_sparsity_0_is_dense_attention(tail: str, mixing: str, masked: bool) -> None:
    case = make_case(kv_heads=1, kv_len=201, masked=masked, sparsity=0.0, tail=tail, mixing=mixing)
    dense = F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=case.attn_mask, enable_gqa=True)
    assert relative_error(case.reference(), dense) < FLOAT64


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_every_row_is_a_weighted_mean_of_the_values(tail: str, mixing: str, masked: bool, feature_map: str) -> None:
    case = make_case(masked=masked, tail=tail, mixing=mixing, feature_map=feature_map)
    # Values that are unit vectors make the output the map itself.
    weights = replace(case, v=torch.eye(129).double().expand(2, 2, 129, 129)).reference()
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 129, dtype=torch.float64), rtol=1e-12, atol=0)
    if case.attn_mask is not None:
        assert not weights.masked_select(~case.attn_mask).any()


@pytest.mark.parametrize("tail", TAILS)
def test_with_block_mixing_the_kept_keys_have_the_learned_share_of_the_weight(tail: str) -> None:
    case = make_case(tail=tail, mixing="block")
    assert case.alpha_logit is not None
    weights = replace(case, v=torch.eye(129).double().expand(2, 2, 129, 129)).reference()
    kept = case.block_mask().repeat_interleave(32, 2)[:, :, :129].repeat_interleave(16, 3)[..., :129]
    expected = case.alpha_logit.sigmoid().repeat_interleave(32, -1)[:, :129]
    torch.testing.assert_close((weights * kept).sum(-1), expected.expand(2, -1, -1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tail", TAILS)
def test_with_row_mixing_gain_and_logit_act_on_the_log_ratio_of_the_branches_mass(tail: str) -> None:
    case = make_case(tail=tail)
    assert case.alpha_logit is not None
    assert case.alpha_gain is not None
    values = torch.eye(129).double().expand(2, 2, 129, 129)
    kept = case.block_mask().repeat_interleave(32, 2)[:, :, :129].repeat_interleave(16, 3)[..., :129]

    def log_ratio(case: Case) -> Tensor:
        share = (replace(case, v=values).reference() * kept).sum(-1)
        return share.logit()

    plain = log_ratio(replace(case, alpha_logit=None, alpha_gain=None))
    expected = case.alpha_gain[:, None] * plain + case.alpha_logit.repeat_interleave(32, -1)[:, :129]
    torch.testing.assert_close(log_ratio(case), expected, rtol=1e-9, atol=1e-9)


# What does not matter


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_adding_a_constant_to_every_key_changes_nothing(tail: str, mixing: str) -> None:
    case = make_case(masked=True, tail=tail, mixing=mixing, learned=False)
    shift = torch.linspace(-3, 3, 16, dtype=torch.float64)
    assert relative_error(replace(case, k=case.k + shift).reference(), case.reference()) < FLOAT64


@pytest.mark.parametrize("mixing", MIXINGS)
def test_k_smoothing_does_not_change_the_pooled_tail_but_is_part_of_the_linear_one(
    mixing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {tail: make_case(mixing=mixing, tail=tail) for tail in TAILS}
    smooth = {tail: case.reference() for tail, case in cases.items()}
    monkeypatch.setattr(reference, "smooth_keys", lambda k, real: k)
    rough = {tail: case.reference() for tail, case in cases.items()}
    assert relative_error(rough["pooled"], smooth["pooled"]) < FLOAT64
    assert relative_error(rough["linear"], smooth["linear"]) > 1e-6


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_the_order_of_keys_in_a_block_and_of_queries_in_a_block_does_not_matter(tail: str, mixing: str) -> None:
    case = make_case(q_len=64, kv_len=80, tail=tail, mixing=mixing)
    queries = torch.cat([torch.randperm(32), 32 + torch.randperm(32)])
    keys = torch.cat([16 * j + torch.randperm(16) for j in range(5)])
    shuffled = replace(case, q=case.q[:, :, queries], k=case.k[:, :, keys], v=case.v[:, :, keys])
    assert relative_error(shuffled.reference(), case.reference()[:, :, queries]) < FLOAT64


@pytest.mark.parametrize("tail", TAILS)
def test_grouped_heads_are_repeated_heads(tail: str) -> None:
    case = make_case(heads=4, kv_heads=2, tail=tail)
    repeated = replace(case, k=case.k.repeat_interleave(2, 1), v=case.v.repeat_interleave(2, 1))
    assert torch.equal(case.reference(), repeated.reference())


# Which blocks it keeps


def block_mask(q: Tensor, k: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    config = SLA2Config(**{"sparsity": 0.7, **BLOCKS, **settings})
    return reference.block_mask(q, k, attn_mask=mask, config=config)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.9, 0.97])
def test_every_query_block_keeps_the_blocks_of_the_highest_scores(sparsity: float) -> None:
    case = make_case(q_len=129, sparsity=sparsity)
    assert case.router is not None
    q_bar = torch.stack([block.mean(2) for block in case.q.split(32, 2)], 2) @ case.router[0].T
    k_bar = torch.stack([block.mean(2) for block in case.k.split(16, 2)], 2) @ case.router[1].T
    scores = q_bar @ k_bar.mT
    mask = case.block_mask()
    num_kept = num_kept_blocks(9, case.config.sparsity_units)
    assert mask.sum(-1).eq(num_kept).all()
    worst_kept = scores.masked_fill(~mask, torch.inf).amin(-1)
    best_left = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert (worst_kept > best_left).all()


def test_ties_go_to_the_lower_block() -> None:
    case = make_case()
    mask = block_mask(torch.zeros_like(case.q), case.k)
    assert mask[..., :KEPT].all()
    assert not mask[..., KEPT:].any()


def test_the_choice_is_made_in_float32_even_for_16_bit_inputs() -> None:
    # Two blocks whose means differ by less than bfloat16 can tell apart from 1.
    k = torch.ones(1, 1, 32, 16, dtype=torch.bfloat16)
    k[:, :, 16:17] += 2**-7
    mask = block_mask(torch.ones(1, 1, 32, 16, dtype=torch.bfloat16), k, sparsity=0.5)
    assert mask.flatten().tolist() == [False, True]


@pytest.mark.parametrize("prefix, suffix", [(1, 0), (16, 0), (17, 9), (0, 1), (40, 40)])
def test_exact_tokens_keep_and_are_kept_by_everyone(prefix: int, suffix: int) -> None:
    case = make_case(q_len=129)
    mask = block_mask(case.q, case.k, exact_prefix=prefix, exact_suffix=suffix)
    tokens = [*range(prefix), *range(129 - suffix, 129)]
    rows, columns = ({token // size for token in tokens} for size in (32, 16))
    for row in range(5):
        for column in range(9):
            if row in rows or column in columns:
                assert mask[:, :, row, column].all()
    others = [row for row in range(5) if row not in rows]
    # The router chooses as many as it would without exact blocks, among the others.
    assert mask[:, :, others].sum(-1).eq(min(9, len(columns) + KEPT)).all()


def test_exact_tokens_are_keys_alone_where_queries_and_keys_differ_in_number() -> None:
    case = make_case(q_len=128, kv_len=129)
    mask = block_mask(case.q, case.k, exact_prefix=16)
    assert mask[..., 0].all()
    assert mask.sum(-1).eq(1 + KEPT).all()


def test_blocks_without_a_real_key_are_never_kept() -> None:
    case = make_case(q_len=129, masked=True)
    assert case.attn_mask is not None
    for exact in (0, 129):
        mask = block_mask(case.q, case.k, case.attn_mask, exact_prefix=exact)
        real = F.pad(case.attn_mask.view(2, -1), (0, 15)).view(2, 9, 16).any(-1)
        assert not real.all()
        assert not (mask & ~real[:, None, None]).any()
        if exact:
            assert torch.equal(mask, real[:, None, None].expand_as(mask))


def test_means_are_over_real_tokens_alone() -> None:
    case = make_case(masked=True)
    assert case.attn_mask is not None
    poisoned = case.k.detach().masked_fill(~case.attn_mask.mT, 1e3)
    assert torch.equal(block_mask(case.q, poisoned, case.attn_mask), block_mask(case.q, case.k, case.attn_mask))


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_with_every_key_masked_nothing_is_kept_and_the_output_is_0(tail: str, mixing: str) -> None:
    case = replace(make_case(tail=tail, mixing=mixing), attn_mask=torch.zeros(1, 1, 1, 129, dtype=torch.bool))
    assert not case.block_mask().any()
    out = case.reference()
    assert not out.any()
    gradients = torch.autograd.grad(out.sum(), (case.q, case.k, case.v))
    assert not any(x.any() for x in gradients)


def test_a_given_block_mask_replaces_the_routers_choice() -> None:
    case = make_case()
    assert torch.equal(case.reference(case.block_mask()), case.reference())
    everything = torch.ones_like(case.block_mask())
    dense = F.scaled_dot_product_attention(case.q, case.k, case.v)
    assert relative_error(case.reference(everything), dense) < FLOAT64


# Small parts


def test_an_empty_row_of_a_masked_softmax_is_0_and_its_log_sum_exp_minus_infinity() -> None:
    probs, lse = reference.masked_softmax(
        torch.tensor([[1e4, 0.0], [3.0, 4.0]]), torch.tensor([[True, True], [False] * 2])
    )
    assert probs.tolist() == [[1, 0], [0, 0]]
    assert lse.tolist() == [1e4, -math.inf]


def test_every_feature_map_is_at_least_0() -> None:
    x = torch.linspace(-50, 50, 101).view(1, -1)
    for name in ("softmax", "elu", "relu"):
        assert reference.feature_map(x, name).min() >= 0
    torch.testing.assert_close(reference.feature_map(x, "softmax").sum(), torch.tensor(1.0))


def test_logits_are_read_at_equally_spaced_places() -> None:
    logit = torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert reference.interpolate_logit(logit, 2).tolist() == logit.tolist()
    assert reference.interpolate_logit(logit, 4).tolist() == [[0, 1, 3, 4], [1, 1, 1, 1]]
    assert reference.interpolate_logit(logit, 1).tolist() == [[2], [1]]
    assert reference.interpolate_logit(logit[:, :1], 3).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert reference.interpolate_logit(logit, 0).shape == (2, 0)
