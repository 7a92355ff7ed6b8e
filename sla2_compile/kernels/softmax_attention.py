"""Softmax attention over a batch of small dense problems, with its log-sum-exp: the inner step of `blocked.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from sla2_compile.kernels.reference import masked_softmax, quantize_blocks
from sla2_compile.kernels.settings import Settings
from sla2_compile.quant.formats import quantize_dequantize_probabilities, statistics_dtype


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v.

    Args:
        q: (R, M, D).
        k, v: (R, K, D), strides may be 0 along R.
        bias: (R or 1, M or 1, K) in the statistics' dtype, finite or -inf; None is 0.
        scale: of the scores.
        fused: use PyTorch's kernel where there is one, and not the operations that it is made of.

    Returns:
        out (R, M, D) in q's dtype and lse (R, M), float32 or float64. A row with nothing to see gives 0 and -inf.
    """
    if fused and q.device.type == "cpu":
        mask = None if bias is None else bias[:, None].expand(q.shape[0], 1, q.shape[1], k.shape[1])
        # Without asking, the operator reads head dims as if they were adjacent.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale
        )
        return out[:, 0], lse[:, 0]
    out, lse = _explicit(q, k, v, bias, scale, None)
    return out.to(q.dtype), lse


def sparse_branch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, settings: Settings, *, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """`softmax_attention` at the precision the settings ask for; with formats out is at least float32.

    q and v come already rounded to theirs, since other keys are attended to with the same ones; k is rounded here.
    """
    if settings.qk_format is None and settings.pv_format is None:
        return softmax_attention(q, k, v, bias, settings.scale, fused=fused)
    return _explicit(q, k, v, bias, settings.scale, settings)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, low_bit: Settings | None
) -> tuple[Tensor, Tensor]:
    statistics = statistics_dtype(q.dtype)
    q, k, v = (x.to(statistics) for x in (q, k, v))
    if low_bit is not None and low_bit.qk_format is not None:
        k = quantize_blocks(k, low_bit.block_k, low_bit.qk_format)
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias
    probs, lse = masked_softmax(scores, scores > -torch.inf)
    if low_bit is not None and low_bit.pv_format is not None:
        probs = quantize_dequantize_probabilities(probs, scores.amax(-1), lse)
    return probs @ v, lse
