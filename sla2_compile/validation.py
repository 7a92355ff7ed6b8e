"""Checks of the op's arguments. Every error names the argument, what was expected, what came and what to do."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sla2_compile.config import SPARSITY_UNIT, SLA2Config
from sla2_compile.kernels.dispatch import missing_for_format

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


def check_types(
    q: Any,
    k: Any,
    v: Any,
    *,
    attn_mask: Any,
    scale: Any,
    enable_gqa: Any,
    router: Any,
    alpha_logit: Any,
    alpha_gain: Any,
    config: Any,
) -> None:
    """Raise TypeError if an argument of `sla2_compile.attention` is of a kind that the operator does not take."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}; torch.as_tensor makes one")
    for name, x in (("attn_mask", attn_mask), ("alpha_logit", alpha_logit), ("alpha_gain", alpha_gain)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(x).__name__}; torch.as_tensor makes one")
    is_pair = isinstance(router, (tuple, list)) and len(router) == 2
    if router is not None and not (is_pair and all(x is None or isinstance(x, Tensor) for x in router)):
        raise TypeError(
            f"router: expected a pair of tensors (proj_q, proj_k) or None, got {type(router).__name__}; "
            "an identity is torch.eye(D)"
        )
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}; float(scale) makes one")
    if config is not None and not isinstance(config, SLA2Config):
        raise TypeError(f"config: expected an SLA2Config or None, got {type(config).__name__}; see SLA2Config")
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"enable_gqa: expected a bool, got {type(enable_gqa).__name__}; True lets heads share k and v")


def check_settings(
    *,
    sparsity_units: int,
    token_grid: Sequence[int] | None,
    exact_prefix: int,
    exact_suffix: int,
    **choices: Any,
) -> None:
    """Raise ValueError or TypeError if a setting of `sla2::attention` is not one that `SLA2Config` takes.

    Lengths may be symbolic, so they are checked here; `choices` are fields of the config.
    """
    _check_choices(**choices)
    if not 0 <= sparsity_units <= SPARSITY_UNIT:
        raise ValueError(
            f"sparsity_units: expected millionths from 0 to {SPARSITY_UNIT}, got {sparsity_units}; "
            "970000 skips 97 % of the blocks"
        )
    for name, tokens in (("exact_prefix", exact_prefix), ("exact_suffix", exact_suffix)):
        if tokens < 0:
            raise ValueError(f"{name}: expected an integer >= 0, got {tokens}; 0 keeps no token exact")
    if token_grid is not None and (len(token_grid) != 3 or any(size <= 0 for size in token_grid)):
        raise ValueError(
            f"token_grid: expected three positive integers (frames, height, width), got {tuple(token_grid)}; "
            "None keeps the model's order"
        )


@functools.cache
def _check_choices(**choices: Any) -> None:
    SLA2Config(**choices)


def check_attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    *,
    enable_gqa: bool,
    mixing: str,
    token_grid: Sequence[int] | None,
    exact_prefix: int,
    exact_suffix: int,
    number_formats: tuple[str | None, str | None],
) -> None:
    """Raise ValueError or TypeError if the arguments of `sla2::attention` do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (B, H, N, D), got shape {tuple(x.shape)}; reshape it")
    _check_dtypes(q, k, v)
    _check_shapes(q, k, v, enable_gqa)
    _check_mask(q, k, attn_mask)
    _check_learned(q, proj_q, proj_k, alpha_logit, alpha_gain, mixing)
    _check_exact_tokens(q, k, token_grid, exact_prefix, exact_suffix)
    _check_formats(q, *number_formats)


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, bfloat16, float16 or (on a CPU) float64, got {q.dtype}; convert it")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}; convert it")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}; move it")
    if q.dtype == torch.float64 and q.device.type not in ("cpu", "meta"):
        raise TypeError(
            f"q: expected float32, bfloat16 or float16 on {q.device.type}, got float64; convert it to float32"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    if k.shape != v.shape:
        raise ValueError(
            f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}; "
            "use F.scaled_dot_product_attention where the head dims of k and v differ"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: expected q's batch {q.shape[0]} and head dim {q.shape[3]}, got shape {tuple(k.shape)}; "
            "the layout is (B, H, N, D)"
        )
    if not MIN_HEAD_DIM <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"q: expected a head dim from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {q.shape[3]}; "
            "use F.scaled_dot_product_attention for this one"
        )
    if enable_gqa:
        if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
            raise ValueError(
                f"k: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}; "
                "the layout is (B, H, N, D)"
            )
    elif k.shape[1] != q.shape[1]:
        raise ValueError(f"k: expected q's {q.shape[1]} heads, got {k.shape[1]}; pass enable_gqa=True if that is meant")


def _check_mask(q: Tensor, k: Tensor, attn_mask: Tensor | None) -> None:
    if attn_mask is None:
        return
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask: expected q's device {q.device}, got {attn_mask.device}; move it")
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask: expected bool, True where the key is real, got {attn_mask.dtype}; "
            "additive masks and biases need F.scaled_dot_product_attention"
        )
    shape = tuple(attn_mask.shape)
    if len(shape) != 4 or shape[0] not in (1, q.shape[0]) or shape[1:3] != (1, 1) or shape[3] != k.shape[2]:
        raise ValueError(
            f"attn_mask: expected a key-padding mask ({q.shape[0]} or 1, 1, 1, {k.shape[2]}), got shape {shape}; "
            "masks that differ between queries or heads need F.scaled_dot_product_attention"
        )


def _check_learned(
    q: Tensor,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    mixing: str,
) -> None:
    heads, dim = q.shape[1], q.shape[3]
    for name, x in (
        ("router", proj_q),
        ("router", proj_k),
        ("alpha_logit", alpha_logit),
        ("alpha_gain", alpha_gain),
    ):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}; float32 is best")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}; move it")
    if (proj_q is None) != (proj_k is None):
        raise ValueError("router: expected both of (proj_q, proj_k) or None, got one; an identity is torch.eye(D)")
    for name, x in (("proj_q", proj_q), ("proj_k", proj_k)):
        if x is not None and tuple(x.shape) != (dim, dim):
            raise ValueError(
                f"router: expected {name} of shape {(dim, dim)}, got {tuple(x.shape)}; all heads share one"
            )
    if alpha_logit is not None and (
        alpha_logit.dim() != 2 or alpha_logit.shape[0] != heads or alpha_logit.shape[1] < 1
    ):
        raise ValueError(
            f"alpha_logit: expected ({heads}, M) with M >= 1 query blocks, got {tuple(alpha_logit.shape)}; "
            "(H, 1) is one value per head"
        )
    if alpha_gain is not None and tuple(alpha_gain.shape) != (heads,):
        raise ValueError(
            f"alpha_gain: expected ({heads},), one per head, got {tuple(alpha_gain.shape)}; expand({heads}) shares one"
        )
    if alpha_gain is not None and mixing == "block":
        raise ValueError('alpha_gain: expected None with mixing="block", got a tensor; use mixing="row" or drop it')


def _check_exact_tokens(
    q: Tensor, k: Tensor, token_grid: Sequence[int] | None, exact_prefix: int, exact_suffix: int
) -> None:
    kv_len = k.shape[2]
    if exact_prefix + exact_suffix > kv_len:
        raise ValueError(
            f"exact_prefix and exact_suffix: expected at most {kv_len} tokens together, the number of keys, "
            f"got {exact_prefix} + {exact_suffix}; lower them or use F.scaled_dot_product_attention"
        )
    if token_grid is None:
        return
    grid_size = token_grid[0] * token_grid[1] * token_grid[2]
    if q.shape[2] != kv_len or grid_size + exact_prefix + exact_suffix != kv_len:
        raise ValueError(
            f"token_grid: expected t * h * w + exact_prefix + exact_suffix to be the number of queries and of keys, "
            f"got {tuple(token_grid)} ({grid_size} tokens) + {exact_prefix} + {exact_suffix} for {q.shape[2]} queries "
            f"and {kv_len} keys; pass the grid of this sequence or None"
        )


def _check_formats(q: Tensor, qk_format: str | None, pv_format: str | None) -> None:
    for name, number_format, choices in (("qk_format", qk_format, ("int8", "fp8")), ("pv_format", pv_format, ("fp8",))):
        if number_format is None:
            continue
        problem = missing_for_format(number_format, q.device)
        if problem is not None:
            possible = [
                str(choice) for choice in (None, *choices) if missing_for_format(choice or "", q.device) is None
            ]
            raise ValueError(
                f"{name}: expected one of {', '.join(possible)} on {q.device}, got {number_format!r}: {problem}"
            )
