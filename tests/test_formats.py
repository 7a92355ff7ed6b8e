"""The low-bit formats: which values they have, where scales come from, and a gradient that passes straight through."""

from __future__ import annotations

import pytest
import torch

from sla2_compile.kernels.reference import quantize_blocks
from sla2_compile.quant.formats import (
    FP8_MAX,
    INT8_MAX,
    TOP_CODE,
    quantize_dequantize,
    quantize_dequantize_probabilities,
    round_to_format,
)

LIMITS = {"int8": INT8_MAX, "fp8": FP8_MAX}
# Half a step of INT8 relative to the largest value; half a unit in the last of e4m3's three bits, relative to each.
HALF_STEP = {"int8": 0.5 / 127, "fp8": 2.0**-4}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_int8_codes_are_whole_numbers_from_minus_127_to_127_rounded_half_to_even() -> None:
    x = torch.tensor([-300.0, -127.5, -2.5, -0.5, 0.5, 1.5, 2.5, 126.6, 127.4, 1e9])
    assert round_to_format(x, "int8").tolist() == [-127, -127, -2, 0, 0, 2, 2, 127, 127, 127]


def test_fp8_values_are_those_of_e4m3_and_saturate() -> None:
    every_code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every_code = every_code[every_code.isfinite()]
    assert torch.equal(round_to_format(every_code, "fp8"), every_code)
    # 17 and 19 lie halfway between two values, whose last bit decides.
    x = torch.tensor([0.3, 17.0, 19.0, 449.0, -1e9])
    assert round_to_format(x, "fp8").tolist() == [0.3125, 16.0, 20.0, 448.0, -448.0]


@pytest.mark.parametrize("number_format", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_keeps_the_dtype(number_format: str, dtype: torch.dtype) -> None:
    x = normal(4, 8).to(dtype)
    assert round_to_format(x, number_format).dtype == dtype
    assert quantize_dequantize(x, number_format, (-1,)).dtype == dtype


def test_an_unknown_format_is_an_error_that_lists_the_known_ones() -> None:
    for call in (lambda x: round_to_format(x, "int4"), lambda x: quantize_dequantize(x, "int4", (0,))):
        with pytest.raises(ValueError, match="number_format: expected 'int8' or 'fp8', got 'int4'"):
            call(torch.ones(2))


@pytest.mark.parametrize("number_format", LIMITS)
def test_the_largest_element_of_a_group_survives_and_the_others_are_off_by_half_a_step(number_format: str) -> None:
    x = normal(3, 64, 16)
    rounded = quantize_dequantize(x, number_format, (-2, -1))
    peak = x.abs().amax((-2, -1), keepdim=True)
    is_peak = x.abs() == peak
    torch.testing.assert_close(rounded[is_peak], x[is_peak], rtol=1e-15, atol=0)
    # FP8's step shrinks with the value, down to subnormals of a fixed step.
    reach = peak if number_format == "int8" else torch.maximum(x.abs(), peak * 2.0**-6 / FP8_MAX)
    assert ((rounded - x).abs() <= HALF_STEP[number_format] * reach * (1 + 1e-12)).all()


@pytest.mark.parametrize("number_format", LIMITS)
def test_a_scale_belongs_to_the_dims_it_is_given_for(number_format: str) -> None:
    x = normal(4, 32, 8)
    whole = quantize_dequantize(x, number_format, (-2, -1))
    assert torch.equal(whole, torch.stack([quantize_dequantize(part, number_format, (-2, -1)) for part in x]))
    by_channel = quantize_dequantize(x, number_format, (-2,))
    parts = [quantize_dequantize(part, number_format, (-2,)) for part in x.split(1, -1)]
    assert torch.equal(by_channel, torch.cat(parts, -1))
    # An outlier costs precision only where it shares a scale.
    x[0, 0, 0] = 1e6
    outlier = quantize_dequantize(x, number_format, (-2,))
    assert torch.equal(outlier[1:], by_channel[1:])
    assert torch.equal(outlier[..., 1:], by_channel[..., 1:])
    assert not torch.equal(outlier[0, :, 0], by_channel[0, :, 0])


@pytest.mark.parametrize("number_format", LIMITS)
def test_a_scale_per_block_of_tokens_counts_a_short_last_block_by_itself(number_format: str) -> None:
    x = normal(2, 3, 70, 8)
    blocks = [quantize_dequantize(block, number_format, (-2, -1)) for block in x.split(32, 2)]
    assert torch.equal(quantize_blocks(x, 32, number_format), torch.cat(blocks, 2))


@pytest.mark.parametrize("number_format", LIMITS)
def test_scaling_by_a_power_of_two_and_flipping_the_sign_commute_with_rounding(number_format: str) -> None:
    x = normal(16, 16)
    rounded = quantize_dequantize(x, number_format, (0, 1))
    assert torch.equal(quantize_dequantize(-8 * x, number_format, (0, 1)), -8 * rounded)


@pytest.mark.parametrize("number_format", LIMITS)
def test_rounding_twice_is_rounding_once(number_format: str) -> None:
    once = quantize_dequantize(normal(16, 16), number_format, (0, 1))
    torch.testing.assert_close(quantize_dequantize(once, number_format, (0, 1)), once, rtol=1e-14, atol=0)


@pytest.mark.parametrize("number_format", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_the_smallest_and_largest_numbers_stay_finite(number_format: str, dtype: torch.dtype) -> None:
    assert not quantize_dequantize(torch.zeros(4, 4, dtype=dtype), number_format, (0, 1)).any()
    for size in (torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max / 2):
        x = torch.full((4, 4), size, dtype=dtype)
        assert quantize_dequantize(x, number_format, (0, 1)).isfinite().all()


@pytest.mark.parametrize("number_format", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_scaled_as_precisely_as_float32_ones(number_format: str, dtype: torch.dtype) -> None:
    x = normal(64, 16).to(dtype)
    expected = quantize_dequantize(x.float(), number_format, (0, 1))
    # The straight-through sum rounds twice in the dtype.
    torch.testing.assert_close(
        quantize_dequantize(x, number_format, (0, 1)).float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-9
    )


@pytest.mark.parametrize("number_format", LIMITS)
def test_the_gradient_passes_straight_through_however_small_it_is(number_format: str) -> None:
    x = normal(4, 16).requires_grad_()
    grad = torch.logspace(-30, 2, 64, dtype=torch.float64).view(4, 16)
    quantize_dequantize(x, number_format, (-1,)).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_probabilities_are_off_by_half_an_fp8_step_and_keep_their_order() -> None:
    weights = torch.linspace(0, 1, 1001, dtype=torch.float64)
    lse = weights.sum().log()
    p = (weights / weights.sum()).requires_grad_()
    rounded = quantize_dequantize_probabilities(p[None], torch.zeros(1), lse[None])[0]
    assert rounded[0] == 0
    assert rounded[-1].item() == pytest.approx(p[-1].item(), rel=1e-12)
    smallest_normal = 2.0**-6 / TOP_CODE / weights.sum()
    assert ((rounded - p).abs() <= HALF_STEP["fp8"] * p.clamp(min=smallest_normal)).all()
    assert rounded.detach().diff().ge(0).all()
    rounded.backward(grad := torch.full_like(p, 1e-20))
    assert p.grad is not None
    assert torch.equal(p.grad, grad)


def test_probabilities_of_a_row_round_alike_whatever_the_largest_score_of_the_row_is() -> None:
    """So an online softmax may round a tile before it has seen the others."""
    scores = normal(1, 64)
    higher = torch.cat([scores, torch.tensor([[scores.max() + 1.7]])], 1)
    first, second = (
        quantize_dequantize_probabilities(x.softmax(1), x.amax(1), x.logsumexp(1)) * x.logsumexp(1).exp()
        for x in (scores, higher)
    )
    assert torch.allclose(first, second[:, :64], rtol=1e-12)


def test_probabilities_of_an_empty_row_stay_0() -> None:
    empty = torch.full((1,), -torch.inf)
    assert quantize_dequantize_probabilities(torch.zeros(1, 4), empty, empty).tolist() == [[0.0] * 4]
