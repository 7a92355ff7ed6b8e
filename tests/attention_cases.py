"""Inputs of the op that several test files share, and the two ways to run them: the op and its float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sla2_compile import SLA2Config, attention
from sla2_compile.kernels import reference

BLOCKS = {"block_q": 32, "block_k": 16}
TAILS, MIXINGS = ("pooled", "linear"), ("row", "block")
BOTH_TAILS_AND_MIXINGS = [(tail, mixing) for tail in TAILS for mixing in MIXINGS]


@dataclass(frozen=True)
class Case:
    """Arguments of `sla2_compile.attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha_logit: Tensor | None
    alpha_gain: Tensor | None
    attn_mask: Tensor | None
    router: tuple[Tensor, Tensor] | None
    config: SLA2Config

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        names = ("q", "k", "v", "alpha_logit", "alpha_gain")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype (learned state too), as new leaves."""
        router = None if self.router is None else (self.router[0].to(dtype), self.router[1].to(dtype))
        leaves: dict[str, Any] = {
            name: x.detach().to(dtype).requires_grad_() for name, x in self.differentiable().items()
        }
        return replace(self, **leaves, router=router)

    def op(self) -> Tensor:
        return attention(
            self.q,
            self.k,
            self.v,
            attn_mask=self.attn_mask,
            enable_gqa=self.q.shape[1] != self.k.shape[1],
            router=self.router,
            alpha_logit=self.alpha_logit,
            alpha_gain=self.alpha_gain,
            config=self.config,
        )

    def reference(self, block_mask: Tensor | None = None) -> Tensor:
        return reference.attention(
            self.q,
            self.k,
            self.v,
            attn_mask=self.attn_mask,
            router=self.router,
            alpha_logit=self.alpha_logit,
            alpha_gain=self.alpha_gain,
            config=self.config,
            block_mask=block_mask,
        )

    def block_mask(self) -> Tensor:
        """The reference's choice of blocks."""
        with torch.no_grad():
            return reference.block_mask(
                self.q, self.k, attn_mask=self.attn_mask, router=self.router, config=self.config
            )


def make_case(
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 129,
    kv_len: int | None = None,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
    masked: bool = False,
    learned: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Case:
    """Normal q, k, v and a learned router, logit and gain; `masked` hides keys, in one element whole blocks of them."""
    config = SLA2Config(**{"sparsity": 0.7, **BLOCKS, **settings})
    generator = torch.Generator().manual_seed(seed)
    kv_len = q_len if kv_len is None else kv_len

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, kv_len, generator=generator) > 0.3
        mask[-1, ..., -kv_len // 3 :] = False
    num_rows = -(-q_len // config.block_q)
    return Case(
        q=normal(batch, heads, q_len, dim).requires_grad_(),
        k=normal(batch, kv_heads or heads, kv_len, dim).requires_grad_(),
        v=normal(batch, kv_heads or heads, kv_len, dim).requires_grad_(),
        alpha_logit=normal(heads, max(1, num_rows)).requires_grad_() if learned else None,
        alpha_gain=(1 + 0.3 * normal(heads)).requires_grad_() if learned and config.mixing == "row" else None,
        attn_mask=mask,
        router=(normal(dim, dim), normal(dim, dim)) if learned else None,
        config=config,
    )


def output_and_gradients(case: Case, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The output of `run` and the gradients of the case's tensors, for a fixed gradient of the output."""
    out = run()
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    inputs = case.differentiable()
    return {"out": out, **dict(zip(inputs, torch.autograd.grad(out, tuple(inputs.values()), grad_out), strict=True))}
