"""Low-bit number formats of the sparse branch: codes, scales, and the values they stand for.

Scales follow SageAttention2++ (arXiv 2505.21136): q and k per block of tokens, v per channel. Probabilities are scaled
by a power of two for each row, and not by what fills the range: an online softmax then rounds to the same codes,
whichever maximum it has when a tile comes by. Rounding is to nearest even; scales divide, as the kernels do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8_MAX = 448.0
INT8_MAX = 127.0
# The code of a row's largest probability, rounded up to a power of two.
TOP_CODE = 256.0


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
    limit = INT8_MAX if number_format == "int8" else FP8_MAX
    with torch.no_grad():
        # In 16 bits the scale itself would be rounded.
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = values.abs().amax(dims, keepdim=True) / limit
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        rounded = (round_to_format(values / scale, number_format) * scale).to(x.dtype)
    return x + (rounded - x).detach()


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
