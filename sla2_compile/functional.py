"""`attention`: the op as a function, for people who edit their own model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sla2_compile.config import SLA2Config
from sla2_compile.ops import attention_implementation
from sla2_compile.validation import check_types


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    router: tuple[Tensor, Tensor] | None = None,
    alpha_logit: Tensor | None = None,
    alpha_gain: Tensor | None = None,
    config: SLA2Config | None = None,
) -> Tensor:
    """SLA2 attention, in the layout of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: (B, H, N, D) float32, bfloat16 or float16 (float64 on a CPU), any strides; D from 16 to 256.
        k, v: (B, H_kv, N_kv, D) in q's dtype. H_kv is H, or divides it with `enable_gqa`.
        attn_mask: (B or 1, 1, 1, N_kv) bool, True where the key is real.
        scale: of the scores; None is 1 / sqrt(D).
        enable_gqa: let groups of query heads share a head of k and v.
        router: learned (proj_q, proj_k), each (D, D); None is the identity, SLA's heuristic router.
        alpha_logit: (H, M) logit of the sparse branch's weight, interpolated to the number of query blocks; None is 0.
        alpha_gain: (H,) gain of `mixing="row"`; None is 1.
        config: settings; None is `SLA2Config()`. `min_seq_len`, `include`, `exclude` and `strict` are the backend's.

    Returns:
        (B, H, N, D) in q's dtype, over (B, N, H, D)-contiguous storage. Differentiable once in q, k, v, alpha_logit and
        alpha_gain; the router's choice is hard and has no gradient. A query that sees no real key gives 0.

    Raises:
        ValueError: shapes, devices or settings that do not fit each other.
        TypeError: a dtype that is not supported.

    Source: arXiv 2602.12675, equations 5 to 16; tail "pooled" and mixing "row" are this project's own.
    """
    check_types(
        q,
        k,
        v,
        attn_mask=attn_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        router=router,
        alpha_logit=alpha_logit,
        alpha_gain=alpha_gain,
        config=config,
    )
    proj_q, proj_k = (None, None) if router is None else router
    # torch.func transforms must see the autograd.Function itself; everyone else, Dynamo too, sees one operator.
    transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_dynamo_compiling()
    call = attention_implementation if transformed else torch.ops.sla2.attention
    return call(
        q,
        k,
        v,
        attn_mask,
        proj_q,
        proj_k,
        alpha_logit,
        alpha_gain,
        scale=scale,
        enable_gqa=enable_gqa,
        **config_arguments(SLA2Config() if config is None else config),
    )


def config_arguments(config: SLA2Config) -> dict[str, Any]:
    """The keyword arguments of `torch.ops.sla2.attention` that come from the config."""
    return {
        "sparsity_units": config.sparsity_units,
        "block_q": config.block_q,
        "block_k": config.block_k,
        "feature_map": config.feature_map,
        "qk_format": config.qk_format,
        "pv_format": config.pv_format,
        "tail": config.tail,
        "mixing": config.mixing,
        "token_grid": None if config.token_grid is None else list(config.token_grid),
        "exact_prefix": config.exact_prefix,
        "exact_suffix": config.exact_suffix,
        "fake_quant": config.fake_quant,
    }
