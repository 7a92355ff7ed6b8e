"""Models that the tests of the passes and the backend share: written as third parties write them, and small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from sla2_compile.config import SLA2Config
from sla2_compile.kernels import reference

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM

# Small blocks and no minimal length, so that short sequences are worth converting.
SMALL = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=0)
SMALL_OPTIONS = {"sparsity": 0.5, "block_q": 16, "block_k": 16, "min_seq_len": 0}


class Attention(nn.Module):
    """Self-attention over (B, N, C), or cross-attention to `context`, with any extra arguments of the call."""

    def __init__(self, **call: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.call = call

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, **self.call)
        return out.transpose(1, 2).flatten(2)


class Blocks(nn.Module):
    """Two residual attentions, found as `blocks.0` and `blocks.1`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def tokens(num_tokens: int = 64, **kwargs: Any) -> Tensor:
    """(1, num_tokens, WIDTH) of a fixed seed."""
    return torch.randn(1, num_tokens, WIDTH, generator=torch.Generator().manual_seed(num_tokens)).requires_grad_(
        kwargs.get("requires_grad", False)
    )


def with_reference(model: nn.Module, config: SLA2Config, *args: Any) -> Tensor:
    """What the model gives, eager, with its attention replaced by the reference."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        return reference.attention(query, key, value, attn_mask=attn_mask, config=config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        return model(*args)


class KeepGraphs:
    """A Dynamo backend that runs graphs as they are and keeps them."""

    def __init__(self, change: Callable[[GraphModule], Any] | None = None) -> None:
        self.graphs: list[GraphModule] = []
        self.results: list[Any] = []
        self.change = change

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
        if self.change is not None:
            self.results.append(self.change(gm))
        self.graphs.append(gm)
        return gm


def count_calls(gm: GraphModule, target: Any) -> int:
    """How many nodes of `gm` and its nested graphs call a function or (by name) a method."""
    graphs = (module for module in gm.modules() if isinstance(module, GraphModule))
    return sum(node.target == target for graph in graphs for node in graph.graph.nodes)
