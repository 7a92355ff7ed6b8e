"""SoftTop-k: its rows sum to what they must, and its gradient is the exact implicit one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sla2_compile.kernels.reference import find_shift, soft_topk


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


EXTREMES = {
    "normal": _normal(2, 3, 7, 512),
    "constant": torch.full((1, 4, 100), 3.25),
    "constant and huge": torch.full((1, 4, 100), -3e38),
    "wide": _normal(1, 8, 64) * 1e30,
    "limits of float32": torch.finfo(torch.float32).max * _normal(1, 8, 64).sign(),
    "one far above": torch.zeros(1, 2, 64).index_fill(2, torch.tensor([5]), 1e38),
    "one far below": torch.zeros(1, 2, 64).index_fill(2, torch.tensor([5]), -1e38),
    "two groups": torch.arange(64.0).remainder(2).mul(1e5).expand(1, 2, 64),
    "denormal": torch.full((1, 2, 64), 1e-42),
    "one block": _normal(1, 2, 1),
    "long": _normal(1, 1, 4096) * 5,
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("kept_ratio", [0.01, 0.03, 0.05, 0.25, 0.5, 0.97, 1.0])
def test_rows_sum_to_the_kept_share_for_any_finite_scores(name: str, kept_ratio: float) -> None:
    scores = EXTREMES[name]
    mask = soft_topk(scores, kept_ratio)
    assert mask.dtype == torch.float32
    assert mask.shape == scores.shape
    assert bool(((mask >= 0) & (mask <= 1)).all())
    expected = torch.full(mask.shape[:-1], kept_ratio * mask.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(mask.double().sum(-1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kept_ratio", [0.1, 0.25, 0.5])
def test_the_gradient_is_exact_in_float64(kept_ratio: float) -> None:
    scores = _normal(2, 3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, kept_ratio), (scores,))
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, kept_ratio, tau=1.0), (scores,))
    assert torch.autograd.gradgradcheck(lambda x: soft_topk(x, kept_ratio, tau=1.0), (scores,))


@pytest.mark.parametrize("name", EXTREMES)
def test_the_gradient_of_a_row_sums_to_zero_and_is_finite(name: str) -> None:
    scores = EXTREMES[name].clone().requires_grad_()
    weights = _normal(*scores.shape, seed=1)
    (grad,) = torch.autograd.grad((soft_topk(scores, 0.05) * weights).sum(), scores)
    assert bool(grad.isfinite().all())
    # Against the gradient itself: that of a nearly hard row is tiny, and would sum to almost 0 whatever it was.
    assert bool((grad.double().sum(-1).abs() <= 1e-6 * grad.double().abs().sum(-1)).all())


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    scores = _normal(3, 40, dtype=torch.float64)
    torch.testing.assert_close(soft_topk(scores + 1000, 0.1), soft_topk(scores, 0.1))


def test_a_low_temperature_gives_the_hard_choice() -> None:
    scores = _normal(5, 50)
    hard = torch.zeros_like(scores).scatter(-1, scores.topk(5).indices, 1.0)
    torch.testing.assert_close(soft_topk(scores, 0.1, tau=1e-5), hard, rtol=0, atol=1e-4)


def test_a_block_of_minus_infinity_is_never_kept() -> None:
    scores = _normal(5, 50).index_fill(1, torch.tensor([3, 7]), -torch.inf).requires_grad_()
    mask = soft_topk(scores, 0.1)
    assert mask[:, [3, 7]].eq(0).all()
    torch.testing.assert_close(mask.sum(-1), torch.full((5,), 5.0))
    (grad,) = torch.autograd.grad(mask.square().sum(), scores)
    assert bool(grad.isfinite().all())


def test_it_compiles_without_a_break_and_works_under_torch_func() -> None:
    scores = _normal(2, 4, 20)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: soft_topk(x, 0.2), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores), soft_topk(scores, 0.2))
    torch.testing.assert_close(torch.func.vmap(lambda x: soft_topk(x, 0.2))(scores), soft_topk(scores, 0.2))
    grad = torch.func.grad(lambda x: soft_topk(x, 0.2).square().sum())(scores)
    leaf = scores.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(soft_topk(leaf, 0.2).square().sum(), leaf)[0])


def test_arguments_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match=r"kept_ratio: expected a fraction in \(0, 1\], got 0"):
        soft_topk(torch.zeros(1, 4), 0)
    with pytest.raises(ValueError, match="tau: expected a positive number"):
        soft_topk(torch.zeros(1, 4), 0.5, tau=0)
    with pytest.raises(TypeError, match=r"scores: expected a floating tensor .*, got torch.int64 of shape \(1, 4\)"):
        soft_topk(torch.zeros(1, 4, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("spread", [0.0, 1.0, 1e3, 1e30])
def test_more_points_at_once_find_the_same_shift(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, dtype=torch.float64, generator=generator) * spread
    logits = logits - logits.sort(descending=True).values[:, 7:8]
    for target in (7.0, 7.3, 8.0):
        masks = [(logits + find_shift(logits, target, n)).sigmoid() for n in (1, 3, 15)]
        assert all((mask.sum(1) - target).abs().max() < 1e-9 for mask in masks)
        assert torch.allclose(masks[0], masks[1], atol=1e-9)
        assert torch.allclose(masks[0], masks[2], atol=1e-9)
