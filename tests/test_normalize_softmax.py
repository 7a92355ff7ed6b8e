"""Attention spelled as products and a softmax: every one is found, rewritten without copies, and exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_spellings import HEAD_DIM, HEADS, SCALE, SPELLINGS, WIDTH, Spelled, bhnd, bnc
from small_models import SMALL, KeepGraphs, count_calls
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from sla2_compile.backend import build_backend
from sla2_compile.config import SLA2Config
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

SLA2_OP = torch.ops.sla2.attention.default
EXACT = SLA2Config(sparsity=0, block_q=16, block_k=16, min_seq_len=0)
COPIES = {"contiguous", "clone", "reshape", "flatten", "to"}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def convert_model(model: Any, *args: Any, config: SLA2Config = SMALL, **kwargs: Any) -> tuple[list[Site], GraphModule]:
    backend = KeepGraphs(lambda gm: convert(gm, config))
    torch.compile(model, backend=backend, fullgraph=True, **kwargs)(*args)
    (sites,), (gm,) = backend.results, backend.graphs
    return sites, gm


def original_graph(model: Any, *args: Any) -> GraphModule:
    backend = KeepGraphs()
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    torch._dynamo.reset()
    return backend.graphs[0]


def copies(gm: GraphModule) -> Counter[str]:
    names = (str(node.target) for node in gm.graph.nodes if node.op == "call_method")
    return Counter(name for name in names if name in COPIES)


def tokens(num_tokens: int = 48, batch: int = 2) -> Tensor:
    return torch.randn(batch, num_tokens, WIDTH, generator=torch.Generator().manual_seed(num_tokens))


def gradients(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(run(x).square().sum(), [*model.parameters()]))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_one_op_and_adds_no_copy(name: str) -> None:
    model = Spelled(SPELLINGS[name])
    before = copies(original_graph(model, tokens()))
    (site,), gm = convert_model(model, tokens())
    assert (site.verdict, site.name) == ("sla2", "root"), site.reason
    assert count_calls(gm, SLA2_OP) == 1
    assert not any("softmax" in str(node.target) for node in gm.graph.nodes)
    after = copies(gm)
    assert after <= before, f"{before} -> {after}"


@pytest.mark.parametrize("name", SPELLINGS)
def test_at_sparsity_0_output_and_gradients_are_the_model_s_own(name: str) -> None:
    model, x = Spelled(SPELLINGS[name]), tokens()
    compiled = torch.compile(model, backend=build_backend(EXACT, aot_eager), fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    for got, expected in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_that_stays_dense_keeps_its_graph(name: str) -> None:
    model = Spelled(SPELLINGS[name])
    before = original_graph(model, tokens())
    (site,), gm = convert_model(model, tokens(), config=SLA2Config())
    assert site.verdict == "dense"
    assert [str(node.format_node()) for node in gm.graph.nodes] == [
        str(node.format_node()) for node in before.graph.nodes
    ]


@pytest.mark.parametrize("name", SPELLINGS)
def test_lengths_and_batches_stay_symbolic(name: str) -> None:
    model, graphs = Spelled(SPELLINGS[name]), []
    backend = build_backend(EXACT, lambda gm, inputs: graphs.append(gm) or gm)  # type: ignore[func-returns-value]
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for num_tokens, batch in ((48, 2), (37, 3), (65, 4)):
        x = tokens(num_tokens, batch)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert count_calls(graphs[0], SLA2_OP) == 1


@pytest.mark.parametrize("name", ["upcast_softmax", "upcast_scores", "matmul", "baddbmm"])
def test_low_precision_gives_its_own_dtype(name: str) -> None:
    model, x = Spelled(SPELLINGS[name]).bfloat16(), tokens().bfloat16()
    (site,), gm = convert_model(model, x, config=EXACT)
    assert site.verdict == "sla2", site.reason
    node = next(node for node in gm.graph.nodes if node.target is SLA2_OP)
    assert node.args[0].meta["example_value"].dtype == torch.bfloat16
    compiled = torch.compile(model, backend=build_backend(EXACT, aot_eager))
    out, expected = compiled(x), model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_autocast_converts_and_keeps_the_dtype() -> None:
    model, x = Spelled(SPELLINGS["matmul"]), tokens()
    compiled = torch.compile(model, backend=build_backend(EXACT, aot_eager))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(x), model(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


# Masks


def hidden(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, float("-inf"))


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": hidden,
    "masked_fill in place": lambda scores, mask: (scores + 0).masked_fill_(~mask, float("-inf")),
    "lowest number": lambda scores, mask: scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min),
    "where": lambda scores, mask: torch.where(mask, scores, float("-inf")),
    "where the other way": lambda scores, mask: torch.where(~mask, float("-inf"), scores),
    "expanded": lambda scores, mask: hidden(scores, mask.expand(scores.shape)),
    "added": lambda scores, mask: scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf),
    "added where": lambda scores, mask: scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min),
    "added complement": lambda scores, mask: scores + (1 - mask.to(scores.dtype)) * torch.finfo(scores.dtype).min,
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_the_keys_are_folded_into_the_op(name: str) -> None:
    def attend(x: Tensor, real: Tensor) -> Tensor:
        q = bhnd(x)
        scores = MASKED[name](q @ q.transpose(-1, -2) * SCALE, real[:, None, None, :])
        return bnc(scores.softmax(-1) @ q)

    x, real = tokens(), torch.arange(48).expand(2, 48) < torch.tensor([[30], [41]])
    (site,), gm = convert_model(attend, x, real)
    assert site.verdict == "sla2", site.reason
    node = next(node for node in gm.graph.nodes if node.target is SLA2_OP)
    assert tuple(node.args[3].meta["example_value"].shape) == (2, 1, 1, 48)
    compiled = torch.compile(attend, backend=build_backend(EXACT, aot_eager))
    torch.testing.assert_close(compiled(x, real), attend(x, real), rtol=1e-4, atol=1e-5)


def test_a_change_of_the_scores_that_is_not_taken_up_counts() -> None:
    def attend(x: Tensor, real: Tensor) -> Tensor:
        q = bhnd(x)
        scores = q @ q.transpose(-1, -2) * SCALE
        scores.masked_fill_(~real[:, None, None, :], float("-inf"))
        return bnc(scores.softmax(-1) @ q)

    x, real = tokens(), (torch.arange(48) < 30).expand(2, 48)
    compiled = torch.compile(attend, backend=build_backend(EXACT, aot_eager))
    torch.testing.assert_close(compiled(x, real), attend(x, real), rtol=1e-4, atol=1e-5)
    (site,), _ = convert_model(attend, x, real)
    assert site.verdict == "sla2"


# What is left alone


def spelled_reason(attend: Callable[..., Any], *args: Tensor) -> str:
    before = original_graph(attend, *args)
    (site,), gm = convert_model(attend, *args)
    assert site.verdict == "dense"
    assert str(gm.graph) == str(before.graph)
    return site.reason


def scores_of(x: Tensor) -> tuple[Tensor, Tensor]:
    q = bhnd(x)
    return q, q @ q.transpose(-1, -2) * SCALE


def test_chains_that_are_not_plain_attention_stay_with_the_reason() -> None:
    def returned(x: Tensor) -> tuple[Tensor, Tensor]:
        q, scores = scores_of(x)
        probs = scores.softmax(-1)
        return bnc(probs @ q), probs

    def scores_returned(x: Tensor) -> tuple[Tensor, Tensor]:
        q, scores = scores_of(x)
        return bnc(scores.softmax(-1) @ q), scores

    def biased(x: Tensor, bias: Tensor) -> Tensor:
        q, scores = scores_of(x)
        return bnc((scores + bias).softmax(-1) @ q)

    def capped(x: Tensor) -> Tensor:
        q, scores = scores_of(x)
        return bnc((torch.tanh(scores / 50) * 50).softmax(-1) @ q)

    def causal(x: Tensor) -> Tensor:
        q, scores = scores_of(x)
        future = torch.ones(48, 48, dtype=torch.bool).triu(1)
        return bnc(scores.masked_fill(future, float("-inf")).softmax(-1) @ q)

    def dropped(x: Tensor) -> Tensor:
        q, scores = scores_of(x)
        return bnc(F.dropout(scores.softmax(-1), 0.1) @ q)

    def softly_hidden(x: Tensor, real: Tensor) -> Tensor:
        q, scores = scores_of(x)
        return bnc(scores.masked_fill(~real, -5.0).softmax(-1) @ q)

    def learned_scale(x: Tensor, scale: Tensor) -> Tensor:
        q, scores = scores_of(x)
        return bnc((scores * scale).softmax(-1) @ q)

    def written_between(x: Tensor) -> Tensor:
        q, scores = scores_of(x)
        v = q + 0
        probs = scores.softmax(-1)
        x.add_(1)
        return bnc(probs @ v)

    x = tokens()
    assert spelled_reason(returned, x) == "its probabilities are used elsewhere"
    assert spelled_reason(scores_returned, x) == "its scores are used elsewhere"
    assert spelled_reason(biased, x, torch.zeros(HEADS, 48, 48)) == "an additive mask or bias of shape (2, 48, 48)"
    assert spelled_reason(capped, x) == "its scores pass through tanh"
    assert "a mask of shape (48, 48)" in spelled_reason(causal, x)
    assert spelled_reason(dropped, x) == "dropout in training"
    assert "filled with -5.0" in spelled_reason(softly_hidden, x, torch.ones(48, dtype=torch.bool))
    assert "computed at run time" in spelled_reason(learned_scale, x, torch.ones(HEADS, 1, 1))
    assert "changed in place" in spelled_reason(written_between, x)


def test_probabilities_that_nobody_reads_do_not_stand_in_the_way() -> None:
    def attend(x: Tensor) -> Tensor:
        q, scores = scores_of(x)
        probs = scores.softmax(-1)
        probs.mean(1)
        return bnc(probs @ q)

    (site,), _ = convert_model(attend, tokens())
    assert site.verdict == "sla2"


def test_a_softmax_that_is_not_attention_is_no_site() -> None:
    def classify(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).softmax(-1)

    def linear_attention(x: Tensor) -> Tensor:
        q = bhnd(x)
        return bnc(q.softmax(-1) @ (q.softmax(-2).transpose(-1, -2) @ q))

    def over_heads(x: Tensor) -> Tensor:
        q, scores = scores_of(x)
        return bnc(scores.softmax(1) @ q)

    for function, args in (
        (classify, (tokens(), torch.randn(2, WIDTH, 8))),
        (linear_attention, (tokens(),)),
        (over_heads, (tokens(),)),
    ):
        sites, _ = convert_model(function, *args)
        assert [site for site in sites if site.verdict == "sla2"] == [], function.__name__
        torch._dynamo.reset()


def test_changes_in_place_elsewhere_survive_a_conversion() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.attention = Spelled(SPELLINGS["matmul"])

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return self.attention(x)

    model = Counting()
    compiled = torch.compile(model, backend=build_backend(SMALL, aot_eager), fullgraph=True)
    compiled(tokens())
    compiled(tokens())
    assert model.seen == 2


def test_head_dim_is_what_the_model_has() -> None:
    (site,), _ = convert_model(Spelled(SPELLINGS["baddbmm"]), tokens())
    assert site.q_shape == (2, HEADS, 48, HEAD_DIM)
