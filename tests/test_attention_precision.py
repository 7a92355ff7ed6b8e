"""How far the op's numbers may be from float64: no further than plain PyTorch's, or the low-bit formats' own error."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import BOTH_TAILS_AND_MIXINGS, TAILS, Case, make_case, output_and_gradients
from tolerances import (
    EAGER_ERROR_FACTOR,
    EAGER_ERROR_FLOOR,
    FLOAT64,
    LOW_BIT,
    LOW_BIT_GRADIENT,
    WEIGHTS_SUM,
    relative_error,
)
from torch import Tensor

from sla2_compile.kernels.reference import masked_softmax

FORMATS = list(LOW_BIT)


def with_outliers(case: Case) -> Case:
    """The case with a few channels of K far from 0 for every token, which is what K smoothing is for."""
    offset = torch.zeros(case.k.shape[-1], dtype=case.k.dtype)
    offset[::7] = 20.0
    return replace(case, k=(case.k + offset).detach().requires_grad_())


def assert_errors_are_at_most_twice_eager_ones(case: Case, without: tuple[str, ...] = ()) -> None:
    exact = case.to(torch.float64)
    block_mask = exact.block_mask()
    golden = output_and_gradients(exact, lambda: exact.reference(block_mask))
    eager = output_and_gradients(case, lambda: case.reference(block_mask))
    for name, x in output_and_gradients(case, case.op).items():
        assert x.dtype == case.q.dtype
        error, allowed = (relative_error(y, golden[name]) for y in (x, eager[name]))
        assert name in without or error <= max(EAGER_ERROR_FACTOR * allowed, EAGER_ERROR_FLOOR), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_errors_are_at_most_twice_those_of_plain_pytorch_in_the_dtype(
    dtype: torch.dtype, tail: str, mixing: str, masked: bool
) -> None:
    case = make_case(q_len=260, dim=64, kv_heads=1, masked=masked, dtype=dtype, tail=tail, mixing=mixing)
    assert_errors_are_at_most_twice_eager_ones(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_so_they_are_where_scores_are_large_and_the_backward_must_recompute_exactly_what_the_forward_used(
    dtype: torch.dtype, tail: str, mixing: str
) -> None:
    case = make_case(q_len=260, dim=64, kv_heads=1, dtype=dtype, tail=tail, mixing=mixing)
    case = replace(case, q=(8 * case.q).detach().requires_grad_())  # scores of size 30
    # Where a is nearly 1, the gradient of its logit is a small difference of outputs that are rounded to the dtype.
    assert_errors_are_at_most_twice_eager_ones(case, without=("alpha_logit", "alpha_gain"))


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rows_weights_still_sum_to_1_in_the_backward_where_scores_are_large(
    tail: str, mixing: str, dtype: torch.dtype
) -> None:
    case = make_case(q_len=260, dim=64, dtype=dtype, tail=tail, mixing=mixing)
    case = replace(case, q=(100 * case.q).detach().requires_grad_())
    (dv,) = torch.autograd.grad(case.op().sum(), case.v)
    assert relative_error(dv.double().sum(2), torch.full_like(dv[:, :, 0], 260)) < WEIGHTS_SUM[dtype]


# Low-bit formats


@pytest.mark.parametrize("qk_format, pv_format", FORMATS)
@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_low_bit_outputs_equal_the_references_fake_quantisation(
    qk_format: str | None, pv_format: str | None, tail: str, mixing: str, masked: bool
) -> None:
    case = make_case(kv_heads=1, masked=masked, qk_format=qk_format, pv_format=pv_format, tail=tail, mixing=mixing)
    assert relative_error(case.op(), case.reference()) < FLOAT64


@pytest.mark.parametrize("qk_format, pv_format", FORMATS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_bit_outputs_are_within_the_formats_error_of_full_precision(
    qk_format: str | None, pv_format: str | None, tail: str, outliers: bool, dtype: torch.dtype
) -> None:
    settings = {"block_q": 128, "block_k": 64, "qk_format": qk_format, "pv_format": pv_format, "tail": tail}
    case = make_case(q_len=700, dim=64, learned=False, **settings)
    case = (with_outliers(case) if outliers else case).to(dtype)
    exact = case.to(torch.float64)
    exact = replace(exact, config=replace(exact.config, qk_format=None, pv_format=None))
    expected = exact.reference(exact.block_mask())
    error = relative_error(case.op(), expected)
    assert error < LOW_BIT[qk_format, pv_format]
    full_precision = replace(case, config=exact.config)
    assert error > relative_error(full_precision.op(), expected)  # the format was not ignored


@pytest.mark.parametrize("qk_format", ["int8", "fp8"])
def test_smoothing_the_keys_is_what_keeps_outliers_from_costing_precision(
    qk_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = with_outliers(make_case(q_len=700, dim=64, learned=False, block_q=128, block_k=64, qk_format=qk_format))
    smooth = case.reference()
    monkeypatch.setattr("sla2_compile.kernels.reference.smooth_keys", lambda k, real: k)
    assert relative_error(case.reference(), smooth) > LOW_BIT[qk_format, None]


@pytest.mark.parametrize("qk_format, pv_format", FORMATS)
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_low_bit_attention_at_sparsity_0_is_dense_to_the_formats_precision(
    qk_format: str | None, pv_format: str | None, sparsity: float
) -> None:
    case = make_case(q_len=300, dim=64, sparsity=sparsity, learned=False, qk_format=qk_format, pv_format=pv_format)
    exact = replace(case, config=replace(case.config, qk_format=None, pv_format=None))
    assert relative_error(case.op(), exact.op()) < LOW_BIT[qk_format, pv_format]


def sixteen_bit_gradients(case: Case) -> dict[str, Tensor]:
    """Algorithm 3 in full matrices, for pooled tail and block mixing: from q, k, v and what a low-bit forward saved.

    Everything that the forward rounded comes in as a number: outputs and log-sum-exps. The probabilities do not.
    """
    (batch, heads, q_len, dim), scale = case.q.shape, case.q.shape[-1] ** -0.5
    block_q, block_k = case.config.block_q, case.config.block_k
    q, k, v = case.q.detach(), case.k.detach(), case.v.detach()
    if (case.config.qk_format, case.config.pv_format) != (None, None):
        k = k - k.mean(2, keepdim=True)  # otherwise the saved log-sum-exps are of k as it came
    kept = case.block_mask().repeat_interleave(block_q, 2)[:, :, :q_len]
    kept_keys = kept.repeat_interleave(block_k, 3)[..., :q_len]
    assert q_len % block_k == 0
    with torch.no_grad():
        low_bit = torch.ops.sla2.attention_forward(
            q, case.k, v, None, None, None, None, None, True, scale, 700_000, block_q, block_k, "softmax",
            case.config.qk_format, case.config.pv_format, "pooled", "block", None, 0, 0,
        )  # fmt: skip
    out, sparse_out, sparse_lse, tail_lse, _ = low_bit
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(batch, heads, q_len, dim, generator=generator, dtype=torch.float64)

    k_bar, v_bar = (x.unflatten(2, (-1, block_k)).mean(3) for x in (k, v))
    probs = (q @ k.mT * scale - sparse_lse[..., None]).clamp(max=0).exp() * kept_keys
    pooled_scores = q @ k_bar.mT * scale + math.log(block_k)
    if case.config.qk_format is None:
        # Only keys' formats reach the tail's log-sum-exp.
        assert relative_error(masked_softmax(pooled_scores, ~kept)[1], tail_lse) < FLOAT64
    pooled = (pooled_scores - tail_lse[..., None]).clamp(max=0).exp() * ~kept
    tail_out = 2 * out - sparse_out
    d_sparse = 0.5 * probs * (grad_out @ v.mT - (grad_out * sparse_out).sum(-1, keepdim=True)) * scale
    d_pooled = 0.5 * pooled * (grad_out @ v_bar.mT - (grad_out * tail_out).sum(-1, keepdim=True)) * scale

    def to_tokens(x: Tensor) -> Tensor:
        return x.repeat_interleave(block_k, 2) / block_k

    dk = d_sparse.mT @ q + to_tokens(d_pooled.mT @ q)
    return {
        "q": d_sparse @ k + d_pooled @ k_bar,
        "k": dk - dk.mean(2, keepdim=True),
        "v": 0.5 * (probs.mT @ grad_out + to_tokens(pooled.mT @ grad_out)),
    }


@pytest.mark.parametrize("qk_format, pv_format", FORMATS)
def test_low_bit_gradients_are_the_16_bit_formula_at_what_the_forward_saved(
    qk_format: str | None, pv_format: str | None
) -> None:
    case = make_case(q_len=144, learned=False, mixing="block", qk_format=qk_format, pv_format=pv_format)
    results = output_and_gradients(case, case.op)
    for name, expected in sixteen_bit_gradients(case).items():
        assert relative_error(results[name], expected) < FLOAT64, name


@pytest.mark.parametrize("qk_format, pv_format", FORMATS)
@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_low_bit_gradients_stay_close_to_those_without(
    qk_format: str | None, pv_format: str | None, tail: str, mixing: str
) -> None:
    case = make_case(q_len=300, dim=64, tail=tail, mixing=mixing, qk_format=qk_format, pv_format=pv_format)
    exact = replace(case, config=replace(case.config, qk_format=None, pv_format=None))
    results = output_and_gradients(case, case.op)
    for name, expected in output_and_gradients(exact, exact.op).items():
        assert relative_error(results[name], expected) < LOW_BIT_GRADIENT[name], name
