"""The passes: what is found, what is decided and why, and what the rewritten graph looks like."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import HEAD_DIM, HEADS, SMALL, WIDTH, Attention, Blocks, KeepGraphs, count_calls, tokens
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from sla2_compile.config import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.passes.find_attention import find_attention
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

SLA2_OP = torch.ops.sla2.attention.default


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def convert_model(model: Any, *args: Any, config: SLA2Config = SMALL, **kwargs: Any) -> tuple[list[Site], KeepGraphs]:
    """The sites of a model, and the backend that holds its rewritten graphs."""
    backend = KeepGraphs(lambda gm: convert(gm, config))
    torch.compile(model, backend=backend)(*args, **kwargs)
    return [site for sites in backend.results for site in sites], backend


def only_site(model: Any, *args: Any, config: SLA2Config = SMALL, **kwargs: Any) -> Site:
    (site,) = convert_model(model, *args, config=config, **kwargs)[0]
    return site


def heads(num_tokens: int, dim: int = HEAD_DIM, num_heads: int = HEADS, batch: int = 1) -> Tensor:
    return torch.randn(batch, num_heads, num_tokens, dim)


# What is found


def test_sites_are_named_after_the_module_that_owns_the_call() -> None:
    sites, _ = convert_model(Blocks(), tokens())
    assert [site.name for site in sites] == ["blocks.0", "blocks.1"]


def test_names_are_paths_of_named_modules_whatever_way_dynamo_reached_the_module() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleDict({"a": nn.ModuleList([Blocks()])})

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages.values():
                for part in stage:
                    x = part(x)
            return x

    model = Deep()
    names = [site.name for site in convert_model(model, tokens())[0]]
    assert names == ["stages.a.0.blocks.0", "stages.a.0.blocks.1"]
    assert set(names) <= {name for name, _ in model.named_modules()}


def test_further_calls_of_one_module_get_an_ordinal() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attn(x))

    assert [site.name for site in convert_model(Twice(), tokens())[0]] == ["attn", "attn#1"]


def test_a_site_in_a_plain_function_is_named_root() -> None:
    site = only_site(lambda q: F.scaled_dot_product_attention(q, q, q), heads(64))
    assert (site.name, site.verdict) == ("root", "sla2")


@pytest.mark.parametrize("spelling", [F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v])
def test_attention_to_what_another_attention_gave_is_rewritten_too(spelling: Any) -> None:
    def chain(q: Tensor) -> Tensor:
        y = spelling(q, q, q)
        return spelling(y, q, y)

    q = heads(64)
    sites, backend = convert_model(chain, q)
    assert [site.verdict for site in sites] == ["sla2", "sla2"]
    y = reference.attention(q, q, q, config=SMALL)
    torch.testing.assert_close(backend.graphs[0](q)[0], reference.attention(y, q, y, config=SMALL))


def test_positional_and_keyword_arguments_are_bound_alike() -> None:
    q, k, v = heads(64), heads(48), heads(48)
    mask = torch.ones(1, 1, 1, 48, dtype=torch.bool)

    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        sdpa = F.scaled_dot_product_attention
        return sdpa(q, k, v, m, 0.0, False, scale=0.3), sdpa(value=v, scale=0.3, key=k, attn_mask=m, query=q)

    sites, _ = convert_model(call, q, k, v, mask)
    first, second = ({name: getattr(value, "name", value) for name, value in site.arguments.items()} for site in sites)
    assert first == second
    assert first["scale"] == 0.3


def test_sites_in_checkpointed_blocks_are_found_and_rewritten() -> None:
    class Checkpointed(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    sites, backend = convert_model(Checkpointed(), tokens(requires_grad=True))
    assert [site.name for site in sites] == ["blocks.0", "blocks.1"]
    assert count_calls(backend.graphs[0], SLA2_OP) == 2


def test_a_graph_without_attention_has_no_sites() -> None:
    assert convert_model(nn.Linear(WIDTH, WIDTH), tokens())[0] == []


# What is decided


def reason_of(call: Any, *args: Any, config: SLA2Config = SMALL) -> str:
    site = only_site(call, *args, config=config)
    assert site.verdict == "dense"
    return site.reason


def test_a_causal_call_stays_dense() -> None:
    q = heads(64)
    assert reason_of(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q) == "causal"


def test_dropout_stays_dense_in_training_and_converts_where_it_is_off() -> None:
    q = heads(64)
    assert reason_of(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1), q) == "dropout in training"
    assert only_site(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.0), q).verdict == "sla2"


def test_a_key_padding_mask_converts_and_other_masks_stay_dense() -> None:
    q = heads(64)

    def masked(q: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=m)

    assert only_site(masked, q, torch.ones(1, 1, 1, 64, dtype=torch.bool)).verdict == "sla2"
    assert "additive" in reason_of(masked, q, torch.zeros(1, 1, 1, 64))
    assert "(1, 1, 64, 64)" in reason_of(masked, q, torch.ones(1, 1, 64, 64, dtype=torch.bool))
    assert "(64, 64)" in reason_of(masked, q, torch.ones(64, 64, dtype=torch.bool))


def test_shapes_that_the_op_does_not_take_stay_dense_with_the_reason() -> None:
    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    q = heads(64)
    assert "dimensions" in reason_of(sdpa, q[0], q[0], q[0])
    small = heads(64, dim=8)
    assert "head dim 8" in reason_of(sdpa, small, small, small)
    assert "v's head dim 32" in reason_of(sdpa, q, q, heads(64, dim=32))
    assert "batch" in reason_of(sdpa, heads(64, batch=2), q, q)
    assert "numbers of heads" in reason_of(sdpa, heads(64, num_heads=4), heads(64, num_heads=1), heads(64, num_heads=1))


def test_grouped_query_attention_converts() -> None:
    site = only_site(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), heads(64, num_heads=4), heads(64)
    )
    assert site.verdict == "sla2"


def test_short_sequences_and_cross_attention_to_short_text_stay_dense() -> None:
    config = SLA2Config(min_seq_len=64, block_q=16, block_k=16)
    assert reason_of(Attention(), tokens(48), config=config) == "48 keys, fewer than min_seq_len=64"
    reason = reason_of(Attention(), tokens(128), tokens(32), config=config)
    assert reason == "cross-attention to 32 keys, fewer than min_seq_len=64"
    assert reason_of(Attention(), tokens(32), tokens(128), config=config) == "32 queries, fewer than min_seq_len=64"


def test_queries_and_keys_of_different_length_convert_where_both_are_long() -> None:
    assert only_site(Attention(), tokens(80), tokens(64)).verdict == "sla2"


def test_include_and_exclude_choose_sites_by_pattern() -> None:
    def verdicts(**patterns: Any) -> list[str]:
        config = SLA2Config(**patterns, block_q=16, block_k=16, min_seq_len=0)
        return [site.verdict for site in convert_model(Blocks(), tokens(), config=config)[0]]

    assert verdicts(include=["blocks.0"]) == ["sla2", "dense"]
    assert verdicts(exclude="*.0") == ["dense", "sla2"]
    assert verdicts(include=["blocks.*"], exclude=["*.1"]) == ["sla2", "dense"]


def test_exact_tokens_beyond_the_keys_leave_the_site_dense() -> None:
    config = SLA2Config(exact_prefix=40, exact_suffix=40, min_seq_len=0)
    assert "80 tokens" in reason_of(Attention(), tokens(64), config=config)


def test_a_token_grid_applies_where_it_fits_and_is_dropped_with_a_note_elsewhere() -> None:
    config = SLA2Config(token_grid=(2, 4, 8), block_q=16, block_k=16, min_seq_len=0)
    fits, other = only_site(Attention(), tokens(64), config=config), only_site(Attention(), tokens(80), config=config)
    assert fits.config is not None
    assert fits.config.token_grid == (2, 4, 8)
    assert other.config is not None
    assert (other.verdict, other.config.token_grid) == ("sla2", None)
    assert "raster order" in other.reason


def test_strict_raises_for_a_site_that_was_asked_for_and_not_for_short_text() -> None:
    strict = SLA2Config(strict=True, min_seq_len=64, block_q=16, block_k=16)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1, self.attn2 = Attention(), Attention()

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.attn2(self.attn1(x), text)

    sites, _ = convert_model(Mixed(), tokens(64), tokens(16), config=strict)
    assert [site.verdict for site in sites] == ["sla2", "dense"]
    with pytest.raises(Exception, match=r"(?s)strict: expected every site.*root: causal.*exclude"):
        convert_model(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), heads(64), config=strict)


# What the rewritten graph looks like


def test_a_rewrite_replaces_the_call_and_nothing_else() -> None:
    before = KeepGraphs()
    torch.compile(Blocks(), backend=before)(tokens())
    torch._dynamo.reset()
    _, after = convert_model(Blocks(), tokens())
    old, new = before.graphs[0], after.graphs[0]
    assert count_calls(old, F.scaled_dot_product_attention) == 2
    assert count_calls(new, F.scaled_dot_product_attention) == 0
    assert count_calls(new, SLA2_OP) == 2
    assert len(new.graph.nodes) == len(old.graph.nodes)


def test_the_rewritten_graph_computes_sla2() -> None:
    q, k, v = heads(70), heads(90), heads(90)
    mask = torch.arange(90).reshape(1, 1, 1, 90) < 77
    backend = KeepGraphs(lambda gm: convert(gm, SMALL))

    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, m, scale=0.4)

    out = torch.compile(call, backend=backend)(q, k, v, mask)
    expected = reference.attention(q, k, v, attn_mask=mask, scale=0.4, config=SMALL)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, call(q, k, v, mask), rtol=1e-3)


def test_meta_of_the_new_node_is_what_the_op_returns() -> None:
    q = heads(64)
    backend = KeepGraphs(lambda gm: convert(gm, SMALL))
    torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend=backend)(q)
    (node,) = (node for node in backend.graphs[0].graph.nodes if node.target is SLA2_OP)
    value, real = node.meta["example_value"], torch.ops.sla2.attention(q, q, q, block_q=16, block_k=16)
    assert (value.shape, value.stride(), value.dtype) == (real.shape, real.stride(), real.dtype)


def test_copies_for_contiguity_are_dropped_and_copies_that_others_read_stay() -> None:
    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2).contiguous() * 1).chunk(3, -1)
        shared = v.contiguous()
        return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), shared), shared

    x = torch.randn(1, 64, HEADS, 3 * HEAD_DIM)
    _, backend = convert_model(call, x)
    # The first belongs to the multiplication, the last to `shared`.
    assert count_calls(backend.graphs[0], "contiguous") == 2


def test_a_view_of_the_output_still_works_where_the_op_has_other_strides() -> None:
    def call(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, scale=0.25).view(-1)

    q = heads(64)
    site, backend = convert_model(call, q)
    gm = backend.graphs[0]
    # As on a device whose attention returns contiguous (B, H, N, D).
    assert site[0].verdict == "sla2"
    out = gm(q)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(
        out, reference.attention(q, q, q, scale=0.25, config=SMALL).reshape(-1), rtol=1e-4, atol=1e-5
    )


def test_a_dynamic_length_converts_with_symbols_and_without_specialising() -> None:
    model, backend = Attention(), KeepGraphs(lambda gm: convert(gm, SMALL))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for num_tokens in (64, 90, 131):
        assert compiled(tokens(num_tokens)).shape == (1, num_tokens, WIDTH)
    assert len(backend.graphs) == 1


def test_passes_log_what_they_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "sla2_compile"):
        convert_model(Attention(), tokens())
    assert "rewrite_attention: 1 rewrites" in caplog.text
    assert "scaled_dot_product_attention: 1 -> 0" in caplog.text


def test_finding_changes_nothing() -> None:
    backend = KeepGraphs()
    torch.compile(Attention(), backend=backend)(tokens())
    gm: GraphModule = backend.graphs[0]
    before = str(gm.graph)
    assert len(find_attention(gm)) == 1
    assert str(gm.graph) == before


# Choosing sites


def test_sparsity_can_be_chosen_by_site() -> None:
    config = SLA2Config(site_sparsity={"blocks.0": 0.25, "blocks.*": 0.75}, block_q=16, block_k=16, min_seq_len=0)
    sites, backend = convert_model(Blocks(), tokens(), config=config)
    assert [site.requested_sparsity for site in sites] == [0.25, 0.75]
    nodes = [node for node in backend.graphs[0].graph.nodes if node.target is SLA2_OP]
    assert [node.kwargs["sparsity_units"] for node in nodes] == [250_000, 750_000]


def test_attention_that_a_graph_break_cuts_is_reported() -> None:
    def cut_after_softmax(q: Tensor) -> Tensor:
        probs = (q @ q.transpose(-1, -2)).softmax(-1)
        torch._dynamo.graph_break()
        return probs @ q

    def cut_before_softmax(q: Tensor) -> Tensor:
        scores = q @ q.transpose(-1, -2)
        torch._dynamo.graph_break()
        return (scores * 0.25).softmax(-1) @ q

    for function in (cut_after_softmax, cut_before_softmax):
        torch._dynamo.reset()
        sites, _ = convert_model(function, heads(64))
        assert [(site.verdict, site.reason) for site in sites] == [("dense", "a graph break between its two products")]
