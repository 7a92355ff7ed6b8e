"""Inputs at the edge: nothing to attend to, one token, padding that holds NaN, scores that overflow an exponential."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BOTH_TAILS_AND_MIXINGS, Case, make_case, output_and_gradients
from tolerances import FLOAT64, relative_error

FORMATS = [(None, None), ("int8", None), ("fp8", "fp8")]


def finite_results(case: Case) -> dict[str, torch.Tensor]:
    results = output_and_gradients(case, case.op)
    for name, x in results.items():
        assert x.isfinite().all(), name
    return results


# Sizes


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize(
    "shape",
    [
        {"q_len": 0},
        {"q_len": 0, "kv_len": 40},
        {"q_len": 40, "kv_len": 0},
        {"batch": 0, "q_len": 40},
        {"heads": 0, "q_len": 40},
    ],
)
def test_empty_inputs_give_empty_or_zero_results(tail: str, mixing: str, shape: dict[str, int]) -> None:
    case = make_case(tail=tail, mixing=mixing, **shape)
    results = finite_results(case)
    assert results["out"].shape == case.q.shape
    for name, x in case.differentiable().items():
        assert results[name].shape == x.shape
        assert not results[name].any()


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("formats", FORMATS)
def test_one_token_attends_to_itself(tail: str, mixing: str, formats: tuple[str | None, str | None]) -> None:
    case = make_case(q_len=1, tail=tail, mixing=mixing, qk_format=formats[0], pv_format=formats[1])
    results = finite_results(case)
    assert relative_error(results["out"], case.v) < 1e-12  # one token's v is its channel's largest: no rounding
    assert results["q"].abs().max() < 1e-12


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("lengths", [(1, 200), (200, 1), (33, 15), (16, 16)])
def test_single_rows_keys_and_blocks_equal_the_reference(tail: str, mixing: str, lengths: tuple[int, int]) -> None:
    case = make_case(q_len=lengths[0], kv_len=lengths[1], tail=tail, mixing=mixing)
    results = finite_results(case)
    for name, expected in output_and_gradients(case, case.reference).items():
        if expected.abs().max() < 1e-12:  # a single block leaves nothing to mix: the gradient is 0 but for rounding
            assert results[name].abs().max() < 1e-12, name
        else:
            assert relative_error(results[name], expected) < FLOAT64, name


def test_one_block_is_dense_attention() -> None:
    case = make_case(q_len=16, sparsity=0.97)
    assert relative_error(case.op(), F.scaled_dot_product_attention(case.q, case.k, case.v)) < FLOAT64


# Masks


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_queries_without_a_real_key_give_0_and_have_no_gradient(
    tail: str, mixing: str, formats: tuple[str | None, str | None], dtype: torch.dtype
) -> None:
    case = make_case(tail=tail, mixing=mixing, qk_format=formats[0], pv_format=formats[1], exact_prefix=20, dtype=dtype)
    nothing = torch.zeros(1, 1, 1, 129, dtype=torch.bool)
    for x in finite_results(replace(case, attn_mask=nothing)).values():
        assert not x.any()
    # One element with keys and one without: the first does not notice the second.
    half = torch.ones(2, 1, 1, 129, dtype=torch.bool)
    half[1] = False
    results, alone = finite_results(replace(case, attn_mask=half)), output_and_gradients(case, case.op)
    for name in ("out", "q", "k", "v"):
        assert torch.equal(results[name][0], alone[name][0]) or relative_error(results[name][0], alone[name][0]) < 1e-2
        assert not results[name][1].any()


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_a_mask_of_all_real_keys_changes_nothing(tail: str, mixing: str) -> None:
    case = make_case(tail=tail, mixing=mixing)
    expected = output_and_gradients(case, case.op)
    everything = torch.ones(1, 1, 1, 129, dtype=torch.bool)
    case = replace(case, attn_mask=everything)
    for name, x in output_and_gradients(case, case.op).items():
        assert relative_error(x, expected[name]) < FLOAT64, name


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_masked_keys_and_values_hold_never_shows(
    tail: str, mixing: str, formats: tuple[str | None, str | None], poison: float
) -> None:
    case = make_case(masked=True, kv_heads=1, tail=tail, mixing=mixing, qk_format=formats[0], pv_format=formats[1])
    assert case.attn_mask is not None
    hidden = ~case.attn_mask.mT
    poisoned = replace(
        case,
        k=case.k.detach().masked_fill(hidden, poison).requires_grad_(),
        v=case.v.detach().masked_fill(hidden, poison).requires_grad_(),
    )
    expected, results = output_and_gradients(case, case.op), finite_results(poisoned)
    for name in expected:
        assert torch.equal(results[name], expected[name]), name
    for name in ("k", "v"):
        assert not results[name][hidden.expand_as(results[name])].any()
    assert relative_error(poisoned.reference(), case.reference()) == 0


def test_masked_keys_can_be_cut_off_when_they_are_whole_blocks_at_the_end() -> None:
    case = make_case(q_len=128, kv_len=200)
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    mask[..., 144:] = False
    settings: dict[str, Any] = {"sparsity": 0.0}  # the number of kept blocks counts those of all keys
    masked = replace(case, attn_mask=mask, config=replace(case.config, **settings))
    cut = replace(masked, k=case.k[:, :, :144], v=case.v[:, :, :144], attn_mask=None)
    assert relative_error(masked.op(), cut.op()) < FLOAT64


# Values


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-6, 300.0])
def test_results_are_finite_for_tiny_and_for_huge_scores(
    tail: str, mixing: str, formats: tuple[str | None, str | None], dtype: torch.dtype, size: float
) -> None:
    settings = {"tail": tail, "mixing": mixing, "qk_format": formats[0], "pv_format": formats[1]}
    case = make_case(q_len=100, dtype=dtype, masked=True, **settings)
    # Scores of size 1e5, whose exponentials overflow.
    finite_results(
        replace(case, q=(case.q * size).detach().requires_grad_(), k=(case.k * size).detach().requires_grad_())
    )


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("formats", FORMATS)
def test_equal_tokens_all_give_their_value(tail: str, mixing: str, formats: tuple[str | None, str | None]) -> None:
    case = make_case(tail=tail, mixing=mixing, qk_format=formats[0], pv_format=formats[1])
    same = {name: getattr(case, name)[:, :, :1].detach().expand(-1, -1, 129, -1) for name in ("q", "k", "v")}
    case = replace(case, **{name: x.clone().requires_grad_() for name, x in same.items()})
    assert relative_error(finite_results(case)["out"], same["v"]) < 1e-12


@pytest.mark.parametrize("gain", [-3.0, 0.0, 50.0])
@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_extreme_learned_weights_choose_one_branch(gain: float, logit: float) -> None:
    case = make_case(dtype=torch.float32)
    learned = {
        "alpha_logit": torch.full((2, 1), logit).requires_grad_(),
        "alpha_gain": torch.full((2,), gain).requires_grad_(),
    }
    finite_results(replace(case, **learned))
