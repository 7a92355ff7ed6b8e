"""The op on a CPU does what the reference says, forward and in gradients, however its inputs are laid out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BLOCKS, BOTH_TAILS_AND_MIXINGS, MIXINGS, TAILS, Case, make_case, output_and_gradients
from tolerances import DENSE, FLOAT64, relative_error
from torch import Tensor

from sla2_compile import SLA2Config, attention
from sla2_compile.functional import config_arguments
from sla2_compile.kernels import blocked
from sla2_compile.kernels.blocked_routing import kept_block_mask


def assert_equals_reference(case: Case) -> None:
    results = output_and_gradients(case, case.op)
    for name, expected in output_and_gradients(case, case.reference).items():
        assert relative_error(results[name], expected) < FLOAT64, name


def run_forward_op(case: Case) -> tuple[Tensor, ...]:
    """out, sparse_out, sparse_lse, tail_lse, kept of the inner operator."""
    settings = config_arguments(case.config)
    router = case.router or (None, None)
    gain = None
    if case.config.mixing == "row":
        gain = torch.ones(case.q.shape[1], dtype=torch.promote_types(case.q.dtype, torch.float32))
    with torch.no_grad():
        results: tuple[Tensor, ...] = torch.ops.sla2.attention_forward(
            case.q, case.k, case.v, case.attn_mask, *router, None, gain, True, case.q.shape[-1] ** -0.5, **settings
        )
    return results


# Equality with the reference


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("kv_heads, masked", list(itertools.product((4, 2), (False, True))))
@pytest.mark.parametrize("exact", [(0, 0), (20, 9)])
@pytest.mark.parametrize("lengths", [(200, 200), (129, 333)])
def test_the_op_equals_the_reference_forward_and_in_every_gradient(
    tail: str, mixing: str, kv_heads: int, masked: bool, exact: tuple[int, int], lengths: tuple[int, int]
) -> None:
    q_len, kv_len = lengths
    assert_equals_reference(
        make_case(
            heads=4,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            masked=masked,
            tail=tail,
            mixing=mixing,
            exact_prefix=exact[0],
            exact_suffix=exact[1],
        )
    )


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_of_a_grid_are_visited_in_tiles_and_answered_in_the_models_order(
    tail: str, mixing: str, masked: bool
) -> None:
    settings = {"token_grid": (5, 6, 7), "exact_prefix": 11, "exact_suffix": 3}
    assert_equals_reference(
        make_case(kv_heads=1, q_len=5 * 6 * 7 + 14, masked=masked, tail=tail, mixing=mixing, **settings)
    )


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_feature_map_of_the_linear_tail_equals_the_reference(feature_map: str, mixing: str) -> None:
    assert_equals_reference(make_case(masked=True, tail="linear", mixing=mixing, feature_map=feature_map))


@pytest.mark.parametrize("dim", [16, 40, 72, 128, 256])
@pytest.mark.parametrize("tail", TAILS)
def test_head_dims_need_not_be_powers_of_two(dim: int, tail: str) -> None:
    assert_equals_reference(make_case(batch=1, q_len=70, kv_len=90, dim=dim, tail=tail))


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_without_learned_state_the_router_is_the_identity_the_logit_0_and_the_gain_1(tail: str, mixing: str) -> None:
    case = make_case(learned=False, tail=tail, mixing=mixing)
    learned = replace(
        case,
        router=(torch.eye(16).double(), torch.eye(16).double()),
        alpha_logit=torch.zeros(2, 1, dtype=torch.float64),
        alpha_gain=torch.ones(2, dtype=torch.float64) if mixing == "row" else None,
    )
    assert torch.equal(case.op(), learned.op())
    assert_equals_reference(case)


@pytest.mark.parametrize("block_q, block_k", [(16, 64), (64, 16), (128, 64), (256, 256)])
def test_any_pair_of_block_sizes_equals_the_reference(block_q: int, block_k: int) -> None:
    assert_equals_reference(make_case(batch=1, q_len=300, block_q=block_q, block_k=block_k))


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_an_explicit_scale_replaces_the_default(tail: str, mixing: str) -> None:
    case = make_case(tail=tail, mixing=mixing)

    def run(scale: float | None, factor: float = 1.0) -> Tensor:
        return attention(case.q * factor, case.k, case.v, scale=scale, config=case.config)

    assert torch.equal(run(16**-0.5), run(None))
    if tail == "pooled":
        # The linear tail's phi(q) does not see the scale, so only here is it the same as scaling q.
        assert relative_error(run(0.7), run(None, 0.7 * 16**0.5)) < FLOAT64
    assert relative_error(run(0.7), run(None)) > 1e-2


def test_logits_of_another_number_of_blocks_are_interpolated_linearly() -> None:
    case = make_case(q_len=128, mixing="block")  # 4 query blocks
    two = torch.tensor([[0.0, 4.0], [2.0, -2.0]], dtype=torch.float64)
    # Centres of 4 equal parts, read on a line through the centres of 2: 0 and 1 are beyond the ends by a quarter.
    four = torch.tensor([[0.0, 1.0, 3.0, 4.0], [2.0, 1.0, -1.0, -2.0]], dtype=torch.float64)
    assert relative_error(replace(case, alpha_logit=two).op(), replace(case, alpha_logit=four).op()) < FLOAT64
    assert_equals_reference(replace(case, alpha_logit=two.requires_grad_()))


# The router


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_op_keeps_the_blocks_that_the_reference_keeps(dtype: torch.dtype, masked: bool) -> None:
    for exact_prefix, exact_suffix in ((0, 0), (20, 9)):
        case = make_case(
            q_len=200, kv_len=200, masked=masked, dtype=dtype, exact_prefix=exact_prefix, exact_suffix=exact_suffix
        )
        kept = kept_block_mask(run_forward_op(case)[-1], 13)
        expected = case.to(torch.float64).block_mask()
        real = expected.any(2, keepdim=True)  # a row that keeps everything counts empty blocks too
        assert torch.equal(kept & real, expected)


def test_kept_blocks_are_listed_in_ascending_order_and_counted() -> None:
    kept = run_forward_op(make_case(q_len=200, masked=True, exact_prefix=20))[-1]
    for *_, count, listed in ((row, row[0].item(), row[1:]) for row in kept.flatten(0, 2)):
        if count != 13:
            assert listed[:count].diff().gt(0).all()
            assert listed[count:].eq(0).all()


def test_ties_go_to_the_lower_block() -> None:
    case = make_case(learned=False)
    kept = run_forward_op(replace(case, q=torch.zeros_like(case.q)))[-1]
    assert kept[..., 0].eq(3).all()
    assert kept[..., 1:].eq(torch.arange(3)).all()


def test_the_routers_choice_has_no_gradient() -> None:
    case = make_case()
    assert case.router is not None
    proj_q, proj_k = (x.clone().requires_grad_() for x in case.router)
    replace(case, router=(proj_q, proj_k)).op().sum().backward()
    assert proj_q.grad is None
    assert proj_k.grad is None


# Dense attention


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_sparsity_0_is_dense_attention_and_so_are_its_gradients(tail: str, mixing: str, masked: bool) -> None:
    case = make_case(kv_heads=1, kv_len=201, masked=masked, sparsity=0.0, tail=tail, mixing=mixing)
    case = replace(case, alpha_logit=None, alpha_gain=None)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=case.attn_mask, enable_gqa=True)

    results = output_and_gradients(case, case.op)
    for name, expected in output_and_gradients(case, dense).items():
        assert relative_error(results[name], expected) < FLOAT64, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsity_0_is_dense_attention_to_the_precision_of_the_dtype(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, sparsity=0.0, dim=64)
    golden = F.scaled_dot_product_attention(case.q.double(), case.k.double(), case.v.double())
    assert relative_error(case.op(), golden) < DENSE[dtype]


def test_where_every_block_is_kept_the_learned_weight_does_not_matter() -> None:
    case = make_case(sparsity=0.0)
    out = case.op()
    assert torch.equal(out, replace(case, alpha_logit=None, alpha_gain=None).op())
    assert case.alpha_logit is not None
    assert case.alpha_gain is not None
    gradients = torch.autograd.grad(out.sum(), (case.alpha_logit, case.alpha_gain))
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_exact_tokens_see_and_are_seen_as_in_dense_attention(tail: str, mixing: str) -> None:
    case = make_case(tail=tail, mixing=mixing, q_len=200, exact_prefix=32, exact_suffix=8)
    dense = F.scaled_dot_product_attention(case.q, case.k, case.v)
    out = case.op()
    for rows in (slice(0, 32), slice(192, 200)):
        assert relative_error(out[:, :, rows], dense[:, :, rows]) < FLOAT64
    assert relative_error(out[:, :, 32:192], dense[:, :, 32:192]) > 1e-3


# Layout, determinism and side effects


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("token_grid", [None, (2, 8, 8)])
def test_strided_inputs_give_what_contiguous_ones_give(
    tail: str, mixing: str, token_grid: tuple[int, int, int] | None
) -> None:
    case = make_case(q_len=128, tail=tail, mixing=mixing, token_grid=token_grid)

    def as_models_store_it(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    def head_dim_first(x: Tensor) -> Tensor:
        return x.detach().mT.contiguous().mT.requires_grad_()

    expected = output_and_gradients(case, case.op)
    for layout in (as_models_store_it, head_dim_first):
        strided = replace(case, q=layout(case.q), k=layout(case.k), v=layout(case.v))
        assert not strided.q.is_contiguous()
        for name, x in output_and_gradients(strided, strided.op).items():
            assert relative_error(x, expected[name]) < FLOAT64, name


@pytest.mark.parametrize("tail", TAILS)
def test_expanded_inputs_give_what_contiguous_ones_give(tail: str) -> None:
    case = make_case(tail=tail, batch=1, heads=1, learned=False)
    shape = (2, 3, -1, -1)
    out = attention(*(x.expand(shape) for x in (case.q, case.k, case.v)), config=case.config)
    assert relative_error(out, case.op().expand(shape)) < FLOAT64
    tokens = case.k[:, :, :1].expand(1, 1, 129, 16)  # every key and value the same one
    assert relative_error(attention(case.q, tokens, tokens, config=case.config), tokens) < FLOAT64


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("formats", [(None, None), ("int8", "fp8")])
def test_two_runs_are_bit_identical_forward_and_backward(
    tail: str, mixing: str, formats: tuple[str | None, str | None]
) -> None:
    settings = {"tail": tail, "mixing": mixing, "qk_format": formats[0], "pv_format": formats[1]}
    case = make_case(q_len=300, dim=64, kv_heads=1, masked=True, dtype=torch.bfloat16, **settings)
    first, second = (output_and_gradients(case, case.op) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("q_len", [129, 1, 0])
def test_the_output_is_stored_tokens_first(q_len: int) -> None:
    out = make_case(q_len=q_len, kv_len=129).op()
    assert out.transpose(1, 2).is_contiguous()


def test_inputs_are_not_modified() -> None:
    case = make_case(masked=True, qk_format="int8", pv_format="fp8", tail="linear")
    tensors = [*case.differentiable().values(), case.attn_mask, *(case.router or ())]
    copies = [x.detach().clone() for x in tensors if x is not None]
    case.op().sum().backward()
    assert all(torch.equal(x.detach(), copy) for x, copy in zip(tensors, copies, strict=True) if x is not None)


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_how_many_rows_are_handled_at_once_does_not_matter(
    tail: str, mixing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(q_len=300, masked=True, exact_prefix=20, tail=tail, mixing=mixing)
    expected = output_and_gradients(case, case.op)
    monkeypatch.setattr(blocked, "CHUNK_SCORES", 1)
    for name, x in output_and_gradients(case, case.op).items():
        assert relative_error(x, expected[name]) < FLOAT64, name


@pytest.mark.parametrize("tail", TAILS)
def test_no_result_is_left_unwritten(tail: str) -> None:
    case = make_case(q_len=200, masked=True, tail=tail, exact_prefix=20)
    expected = output_and_gradients(case, case.op)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # new memory now holds NaN
    try:
        saved = run_forward_op(case)
        poisoned = output_and_gradients(case, case.op)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in saved)
    assert saved[-1].le(13).all()  # new integers are huge; the 13 key blocks are counted and numbered
    for name, x in poisoned.items():
        assert relative_error(x, expected[name]) < FLOAT64, name


# Which gradients are asked for


@pytest.mark.parametrize("name", ["q", "k", "v", "alpha_logit", "alpha_gain"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(name: str, tail: str) -> None:
    case = make_case(tail=tail)
    expected = output_and_gradients(case, case.op)[name]
    alone: dict[str, Any] = {
        other: x.detach().requires_grad_(other == name) for other, x in case.differentiable().items()
    }
    case = replace(case, **alone)
    out = case.op()
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    gradients = {other: x.grad for other, x in case.differentiable().items()}
    assert torch.equal(gradients.pop(name), expected)
    assert all(x is None for x in gradients.values())


def test_no_gradient_is_recorded_where_none_is_asked_for() -> None:
    case = make_case()
    with torch.no_grad():
        assert not case.op().requires_grad
    with torch.inference_mode():
        assert torch.equal(case.op(), case.to(torch.float64).op().detach())


def test_inference_and_training_give_the_same_output() -> None:
    case = make_case(dtype=torch.bfloat16)
    with torch.no_grad():
        out = case.op()
    assert torch.equal(out, case.op().detach())


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_output_has_autocasts_dtype_and_gradients_the_parameters(dtype: torch.dtype) -> None:
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        results = output_and_gradients(case, case.op)
        expected_dtype = F.scaled_dot_product_attention(case.q, case.k, case.v).dtype
    assert results.pop("out").dtype == expected_dtype == dtype
    assert all(x.dtype == torch.float32 for x in results.values())


def test_autocast_is_the_same_as_converting_q_k_and_v() -> None:
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.op()
    q, k, v = (x.bfloat16() for x in (case.q, case.k, case.v))
    assert torch.equal(out, replace(case, q=q, k=k, v=v).op())


def test_autocast_leaves_float64_alone() -> None:
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        assert case.op().dtype == torch.float64


def test_the_config_defaults_to_a_cautious_one() -> None:
    q = make_case(batch=1, q_len=520).q
    assert torch.equal(attention(q, q, q), attention(q, q, q, config=SLA2Config()))
    assert not torch.equal(attention(q, q, q), attention(q, q, q, config=SLA2Config(**BLOCKS)))
