"""Low-bit number formats of the softmax branches: codes, scales, and the values they stand for.

Scales follow SageAttention2++ (arXiv 2505.21136): q and k per block of tokens, v per channel. Probabilities are scaled
by a power of two for each row, and not by what fills the range: an online softmax then rounds to the same codes,
whichever maximum it has when a tile comes by. Rounding is to nearest even; scales divide, as the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

FP8_MAX = 448.0
INT8_MAX = 127.0
# The code of a row's largest probability, rounded up to a power of two.
TOP_CODE = 256.0


def rounds_means_values(qk_format: str | None, pv_format: str | None) -> bool:
    """Whether a pooled tail's values and probabilities are FP8, as its keys are in the format of all keys.

    Their error would be most of the output's where scores are rounded finely; with FP8 for all it is one of many.
    """
    return qk_format == "fp8" and pv_format == "fp8"


# Values, their format and the dimensions that share a scale, to what they become.
Quantizer = Callable[[Tensor, str, tuple[int, ...]], Tensor]

_quantizer: ContextVar[Quantizer | None] = ContextVar("sla2_quantizer", default=None)


@contextmanager
def quantized_by(quantizer: Quantizer) -> Iterator[None]:
    """Inside, `quantizer` does what `quantize_dequantize` does, for graphs whose runtime has operators for it."""
    token = _quantizer.set(quantizer)
    try:
        yield
    finally:
        _quantizer.reset(token)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales, sums and softmax statistics of tensors of a floating dtype are computed in: at least float32."""
    # In plain Python, since Dynamo cannot call torch.promote_types while a graph is being exported.
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_to_format(x: Tensor, number_format: str) -> Tensor:
    """Values already scaled to the format's range, rounded to its codes; same dtype, gradient not defined."""
    if number_format == "int8":
        return x.round().clamp(-INT8_MAX, INT8_MAX)
    if number_format == "fp8":
        return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    raise ValueError(f"number_format: expected 'int8' or 'fp8', got {number_format!r}")


def quantize_dequantize(x: Tensor, number_format: str, dims: tuple[int, ...]) -> Tensor:
    """What `x` becomes when stored in the format with one scale for all elements along `dims`.

    Args:
        x: any shape, floating.
        number_format: "int8" (symmetric, -127 to 127) or "fp8" (e4m3, -448 to 448).
        dims: dimensions that share a scale.

    Returns:
        Tensor like `x`. Its gradient is the identity (straight-through).
    """
    if (quantizer := _quantizer.get()) is not None:
        return quantizer(x, number_format, dims)
    with torch.no_grad():
        rounded = round_trip(x, number_format, dims)
    return x + (rounded - x).detach()


def round_trip(x: Tensor, number_format: str, dims: tuple[int, ...]) -> Tensor:
    """`quantize_dequantize` without a gradient."""
    # In 16 bits the scale itself would be rounded.
    values = x.to(statistics_dtype(x.dtype))
    scale = format_scale(values, number_format, dims)
    return (round_to_format(values / scale, number_format) * scale).to(x.dtype)


def format_scale(values: Tensor, number_format: str, dims: tuple[int, ...]) -> Tensor:
    """What to divide values by so that they fill the format's range; 1 where all that share a scale are 0."""
    largest = values.abs().amax(dims, keepdim=True)
    # By a tensor: a number CUDA turns into its reciprocal, and another last digit of a scale makes other codes of all
    # the 16-bit values that are just between two.
    scale = largest / torch.full_like(largest, INT8_MAX if number_format == "int8" else FP8_MAX)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_dequantize_probabilities(p: Tensor, peak: Tensor, lse: Tensor) -> Tensor:
    """Probabilities rounded through FP8 e4m3, as weights relative to the row's largest, which a power of two bounds.

    Args:
        p: (..., N, K) exp(scores - lse), float32 or float64.
        peak: (..., N) largest score of each row.
        lse: (..., N) log-sum-exp of the scores; -inf where a row has none.

    Returns:
        Tensor like `p`. Its gradient is the identity (straight-through).
    """
    with torch.no_grad():
        unit = torch.exp2((peak / math.log(2)).ceil() - lse / math.log(2))
        unit = torch.where(lse > -torch.inf, unit, 1)[..., None] / TOP_CODE
        rounded = round_to_format(p / unit, "fp8") * unit
    return p + (rounded - p).detach()
