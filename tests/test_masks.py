"""Masks of scaled dot product attention: what is provably a mask of the keys goes to the op, everything else stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL, KeepGraphs
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from sla2_compile.backend import build_backend
from sla2_compile.config import SLA2Config
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

SLA2_OP = torch.ops.sla2.attention.default
EXACT = SLA2Config(sparsity=0, block_q=16, block_k=16, min_seq_len=0)
Q = torch.randn(2, 4, 48, 16)
LOWEST = torch.finfo(torch.float32).min
REAL = torch.arange(48).expand(2, 48) < torch.tensor([[30], [41]])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def sdpa(make_mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, real: F.scaled_dot_product_attention(q, q, q, attn_mask=make_mask(real))


def converted(call: Callable[..., Tensor], *args: Tensor, **kwargs: Any) -> tuple[Site, KeepGraphs]:
    backend = KeepGraphs(lambda gm: convert(gm, SMALL))
    torch.compile(call, backend=backend, fullgraph=True, **kwargs)(*args)
    torch._dynamo.reset()
    return backend.results[0][0], backend


def lengths_to_mask(real: Tensor) -> Tensor:
    """As some pipelines make it: positions below each length, for every query."""
    return (torch.arange(48) < real.sum(1, keepdim=True))[:, None, None, :].expand(-1, -1, 48, -1)


OF_THE_KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as the op takes it": lambda real: real[:, None, None, :],
    "expanded over queries": lambda real: real[:, None, None, :].expand(2, 1, 48, 48),
    "expanded over heads and queries": lambda real: real[:, None, None].expand(-1, 4, 48, -1),
    "repeated": lambda real: real.view(2, 1, 1, 48).repeat(1, 4, 48, 1),
    "broadcast by and": lambda real: real[:, None, None] & torch.ones(1, 1, 48, 1, dtype=torch.bool),
    "one for the batch, 2-D": lambda real: real[0].expand(48, 48),
    "one for the batch, 3-D": lambda real: real[0].expand(4, 48, 48),
    "from lengths": lengths_to_mask,
    "compared": lambda real: real.long()[:, None, None, :].expand(2, 1, 48, 48) == 1,
    "added -inf": lambda real: torch.zeros(2, 48).masked_fill(~real, float("-inf"))[:, None, None, :],
    "added lowest": lambda real: torch.where(real, 0.0, LOWEST)[:, None, None].expand(2, 4, 48, 48),
    "indexed by arange": lambda real: real[
        torch.arange(2)[:, None, None, None], torch.arange(48)[None, None, None, :]
    ].expand(2, -1, 48, 48),
}

OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": lambda real: torch.ones(48, 48, dtype=torch.bool).tril(),
    "causal and padding": lambda real: real[:, None, None, :] & torch.ones(48, 48, dtype=torch.bool).tril(),
    "per head": lambda real: real[:, None, None].expand(2, 4, 1, 48) & (torch.arange(4) > 1)[:, None, None],
    "queries and per head": lambda real: real[:, None, :, None] & (torch.arange(4) > 1)[:, None, None],
    "added for queries": lambda real: torch.zeros(2, 48).masked_fill(~real, float("-inf"))[:, None, :, None],
    "a bias": lambda real: real[:, None, None, :] * 0.5,
    "a soft mask": lambda real: torch.zeros(2, 1, 1, 48).masked_fill(~real[:, None, None], -5.0),
}


def repeated_like_hunyuan(real: Tensor) -> Tensor:
    """As HunyuanVideo-1.5 makes it: padding of the keys, and the same of the queries."""
    keys = real.view(2, 1, 1, 48).repeat(1, 1, 48, 1)
    return (keys & keys.transpose(2, 3)).bool()


HIDING_QUERIES: dict[str, Callable[[Tensor], Tensor]] = {
    "keys and queries": lambda real: real[:, None, None, :] & real[:, None, :, None],
    "joined before heads": lambda real: torch.logical_and(real[:, None, :], real[:, :, None])[:, None],
    "multiplied": lambda real: (real[:, None, :] * real[:, :, None]).unsqueeze(1),
    "repeated": repeated_like_hunyuan,
    "queries alone": lambda real: real[:, None, :, None],
    "transposed": lambda real: real[:, None, None, :].expand(2, 1, 48, 48).transpose(-1, -2),
    "keys twice": lambda real: real[:, None, None, :] & (torch.arange(48) > 3) & real[:, None, :, None],
}


def overwritten_view(real: Tensor) -> Tensor:
    mask = real[:, None, None, :].repeat(1, 1, 48, 1)
    mask[:, :, :5, 10:] = False
    return mask


def overwritten_fill(real: Tensor) -> Tensor:
    mask = torch.ones(48, 48, dtype=torch.bool)
    mask.masked_fill_(torch.ones(48, 48).triu(1).bool(), False)
    return mask


def overwritten_operand(real: Tensor) -> Tensor:
    rows = torch.ones(2, 1, 48, 48, dtype=torch.bool)
    rows.transpose(2, 3)[:, :, :, 0].logical_and_(real[:, None])
    return rows & real[:, None, None, :]


def overwritten_numbers(real: Tensor) -> Tensor:
    mask = torch.zeros(2, 48).masked_fill(~real, float("-inf"))[:, None, None, :]
    mask[..., 3] = 2.0
    return mask


OTHER |= {f.__name__: f for f in (overwritten_view, overwritten_fill, overwritten_operand, overwritten_numbers)}


@pytest.mark.parametrize("name", HIDING_QUERIES)
def test_queries_that_see_no_key_give_zero_and_the_rest_goes_to_the_op(name: str) -> None:
    call, q = sdpa(HIDING_QUERIES[name]), Q.clone().requires_grad_()
    site = converted(call, q, REAL)[0]
    assert site.verdict == "sla2", site.reason
    assert site.query_mask is not None
    compiled = torch.compile(call, backend=build_backend(EXACT, aot_eager))
    out, expected = compiled(q, REAL), call(q, REAL)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(x.square().sum(), q)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert not out.transpose(1, 2)[~REAL].any()


@pytest.mark.parametrize("name", OF_THE_KEYS)
def test_a_mask_that_only_broadcasts_one_of_the_keys_goes_to_the_op(name: str) -> None:
    call = sdpa(OF_THE_KEYS[name])
    site, backend = converted(call, Q, REAL)
    assert site.verdict == "sla2", site.reason
    node = next(node for node in backend.graphs[0].graph.nodes if node.target is SLA2_OP)
    assert tuple(node.args[3].meta["example_value"].shape) in ((2, 1, 1, 48), (1, 1, 1, 48))
    compiled = torch.compile(call, backend=build_backend(EXACT, aot_eager))
    torch.testing.assert_close(compiled(Q, REAL), call(Q, REAL), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHER)
def test_any_other_mask_stays_dense_and_untouched(name: str) -> None:
    call = sdpa(OTHER[name])
    plain = KeepGraphs()
    torch.compile(call, backend=plain)(Q, REAL)
    torch._dynamo.reset()
    site, backend = converted(call, Q, REAL)
    assert site.verdict == "dense"
    assert "mask" in site.reason
    assert str(backend.graphs[0].graph) == str(plain.graphs[0].graph)


def test_a_broadcast_mask_of_symbolic_length_goes_to_the_op() -> None:
    def call(q: Tensor, real: Tensor) -> Tensor:
        mask = real[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    backend = KeepGraphs(lambda gm: convert(gm, SMALL))
    compiled = torch.compile(call, backend=backend, dynamic=True)
    for length in (48, 37, 65):
        compiled(torch.randn(2, 4, length, 16), torch.ones(2, length, dtype=torch.bool))
    assert [[site.verdict for site in sites] for sites in backend.results] == [["sla2"]]
