"""Attention in one call: nn.MultiheadAttention, the encoder's fast path, FlexAttention, other packages' kernels."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import HEADS, SMALL, WIDTH, KeepGraphs, count_calls, tokens
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sla2_compile.backend import build_backend
from sla2_compile.config import SLA2Config
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

SLA2_OP = torch.ops.sla2.attention.default
EXACT = SLA2Config(sparsity=0, block_q=16, block_k=16, min_seq_len=0)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def convert_model(model: Any, *args: Any, config: SLA2Config = SMALL, **kwargs: Any) -> tuple[Site, GraphModule]:
    backend = KeepGraphs(lambda gm: convert(gm, config))
    torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    ((site,),), (gm,) = backend.results, backend.graphs
    torch._dynamo.reset()
    return site, gm


def dense_reason(model: Any, *args: Any, **kwargs: Any) -> str:
    """The reason why a model's only site stays dense; checks that its graph is what Dynamo made."""
    backend = KeepGraphs()
    torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    torch._dynamo.reset()
    site, gm = convert_model(model, *args, **kwargs)
    assert site.verdict == "dense"
    assert str(gm.graph) == str(backend.graphs[0].graph)
    return site.reason


def check_equal(model: Any, *args: Any, **kwargs: Any) -> None:
    """At sparsity 0 the compiled model gives what the model gives."""
    compiled = torch.compile(model, backend=build_backend(EXACT, aot_eager), fullgraph=True)
    out, expected = compiled(*args, **kwargs), model(*args, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# nn.MultiheadAttention


class Multi(nn.Module):
    def __init__(self, need_weights: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
        self.need_weights = need_weights

    def forward(self, x: Tensor, context: Tensor | None = None, **kwargs: Any) -> Tensor:
        context = x if context is None else context
        return self.attn(x, context, context, need_weights=self.need_weights, **kwargs)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_converts(batch_first: bool, need_weights: bool, bias: bool) -> None:
    model = Multi(need_weights, batch_first=batch_first, bias=bias)
    x = torch.randn(2, 48, WIDTH) if batch_first else torch.randn(48, 2, WIDTH)
    site, gm = convert_model(model, x)
    assert (site.name, site.verdict, site.q_shape) == ("attn", "sla2", (2, HEADS, 48, WIDTH // HEADS))
    assert count_calls(gm, SLA2_OP) == 1
    assert count_calls(gm, F.multi_head_attention_forward) == 0
    check_equal(model, x)
    compiled = torch.compile(model, backend=build_backend(EXACT, aot_eager))
    got, expected = (torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (compiled, model))
    for grad, expected_grad in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


def test_multi_head_cross_attention_and_separate_widths_convert() -> None:
    check_equal(Multi(batch_first=True), tokens(48), tokens(80))
    other = Multi(batch_first=True, kdim=20, vdim=20)
    context = torch.randn(1, 80, 20)
    assert convert_model(other, tokens(48), context)[0].verdict == "sla2"
    check_equal(other, tokens(48), context)


@pytest.mark.parametrize("training", [True, False])
def test_a_padding_mask_of_multi_head_attention_is_folded(training: bool) -> None:
    model, x = Multi(batch_first=True).train(training), torch.randn(2, 48, WIDTH)
    hidden = torch.arange(48).expand(2, 48) >= torch.tensor([[40], [33]])
    site, _ = convert_model(model, x, key_padding_mask=hidden)
    assert site.verdict == "sla2", site.reason
    check_equal(model, x, key_padding_mask=hidden)


def test_multi_head_attention_that_the_op_cannot_take_stays_one_call() -> None:
    x = tokens(48)
    causal = torch.ones(48, 48, dtype=torch.bool).triu(1)
    assert "a mask of shape (1, 1, 48, 48)" in dense_reason(Multi(batch_first=True), x, attn_mask=causal)
    bias = torch.randn(48, 48)
    assert dense_reason(Multi(batch_first=True), x, attn_mask=bias) == "an additive mask or bias of shape (48, 48)"
    assert dense_reason(Multi(batch_first=True, dropout=0.1), x) == "dropout in training"
    assert "keys of its own" in dense_reason(Multi(batch_first=True, add_bias_kv=True), x)
    assert "no batch dimension" in dense_reason(Multi(batch_first=True), x[0])
    attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert dense_reason(lambda x: attn(x, x, x), x) == "its probabilities are used elsewhere"


# The fast path of nn.TransformerEncoderLayer


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_encoder_fast_path_converts(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 48, batch_first=True, norm_first=norm_first, activation=activation
    ).eval()
    hidden = torch.arange(48).expand(2, 48) >= torch.tensor([[40], [33]])
    x = torch.randn(2, 48, WIDTH)
    with torch.no_grad():
        site, gm = convert_model(layer, x)
        assert site.verdict == "sla2", site.reason
        assert count_calls(gm, torch._transformer_encoder_layer_fwd) == 0
        check_equal(layer, x)
        assert convert_model(layer, x, src_key_padding_mask=hidden)[0].verdict == "sla2"
        compiled = torch.compile(layer, backend=build_backend(EXACT, aot_eager))
        out, expected = (f(x, src_key_padding_mask=hidden) for f in (compiled, layer))
        torch.testing.assert_close(out[~hidden], expected[~hidden], rtol=1e-4, atol=1e-5)


def test_the_encoder_fast_path_that_stays_dense_stays_one_call() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True).eval()
    causal = torch.ones(48, 48, dtype=torch.bool).triu(1)
    with torch.no_grad():
        assert "mask of shape" in dense_reason(layer, tokens(48), src_mask=causal)


def test_an_encoder_in_training_converts() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True), 2)
    backend = KeepGraphs(lambda gm: convert(gm, SMALL))
    torch.compile(model, backend=backend)(tokens(48))
    assert [site.verdict for sites in backend.results for site in sites] == ["sla2", "sla2"]


# FlexAttention


def test_flex_attention_without_changes_converts() -> None:
    q, k = torch.randn(2, 4, 48, 16), torch.randn(2, 4, 80, 16)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return flex_attention(q, k, k, scale=0.3)

    site, gm = convert_model(plain, q, k)
    assert site.verdict == "sla2", site.reason
    assert count_calls(gm, SLA2_OP) == 1
    check_equal(plain, q, k)
    grouped = convert_model(lambda q, k: flex_attention(q, k, k, enable_gqa=True), q, k[:, :2])[0]
    assert grouped.verdict == "sla2"


def test_flex_attention_with_changes_stays_dense() -> None:
    q = torch.randn(1, 2, 128, 16)

    def doubled(score: Tensor, *_: Tensor) -> Tensor:
        return score * 2

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def sparse_blocks(q: Tensor) -> Tensor:
        # As Kandinsky 6 does: the blocks are listed, and the function that masks inside them keeps all.
        first = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(torch.ones(1, 1, 2, dtype=torch.int32), first, BLOCK_SIZE=64)
        return flex_attention(q, q, q, block_mask=mask)

    block_mask = create_block_mask(causal, None, None, 128, 128, device="cpu")
    assert (
        dense_reason(lambda q: flex_attention(q, q, q, score_mod=doubled), q) == "its scores are changed by a score_mod"
    )
    assert dense_reason(lambda q: flex_attention(q, q, q, block_mask=block_mask), q) == "a block mask"
    assert dense_reason(sparse_blocks, q) == "a block mask"
    assert "log-sum-exp" in dense_reason(lambda q: flex_attention(q, q, q, return_lse=True), q)


# Kernels of other packages, which need a GPU: functions of their names and signatures stand in for them.


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal).transpose(1, 2)


@pytest.fixture
def in_package() -> Iterator[Callable[[Callable[..., Tensor], str], Callable[..., Tensor]]]:
    """Makes a function one of a package, opaque to Dynamo as a kernel is."""
    made: list[str] = []

    def place(function: Callable[..., Tensor], package: str) -> Callable[..., Tensor]:
        copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
        copy.__module__ = package
        module = types.ModuleType(package)
        setattr(module, function.__name__, copy)
        sys.modules[package] = module
        made.append(package)
        return torch.compiler.allow_in_graph(copy)

    yield place
    for package in made:
        del sys.modules[package]


def test_kernels_of_other_packages_convert(in_package: Any) -> None:
    efficient = in_package(memory_efficient_attention, "xformers.ops")
    flash = in_package(flash_attn_func, "flash_attn.interface")
    q, k = torch.randn(2, 48, 4, 16), torch.randn(2, 80, 4, 16)
    for call in (
        lambda q, k: efficient(q, k, k, scale=0.3),
        lambda q, k: flash(q, k, k, 0.0, 0.3),
        lambda q, k: flash(q, k, k, softmax_scale=0.3, causal=False),
    ):
        site, gm = convert_model(call, q, k)
        assert site.verdict == "sla2", site.reason
        assert count_calls(gm, SLA2_OP) == 1
        check_equal(call, q, k)


def test_kernels_of_other_packages_with_more_than_attention_stay(in_package: Any) -> None:
    efficient = in_package(memory_efficient_attention, "xformers.ops")
    flash = in_package(flash_attn_func, "flash_attn.interface")
    q = torch.randn(2, 48, 4, 16)
    assert dense_reason(lambda q: flash(q, q, q, causal=True), q) == "causal"
    assert dense_reason(lambda q, b: efficient(q, q, q, attn_bias=b), q, torch.zeros(48, 48)).startswith("attn_bias")


def test_an_operator_that_returns_more_than_its_output_converts() -> None:
    library = torch.library.Library("flash_attn_stand_in", "DEF")
    library.define(
        "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float p, float scale, bool causal) -> (Tensor, Tensor)"
    )

    def forward(q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, p, scale, causal).contiguous(), q.new_zeros(q.shape[:3])

    library.impl("_flash_attn_forward", forward, "CompositeExplicitAutograd")
    library._register_fake("_flash_attn_forward", forward)
    q = torch.randn(2, 48, 4, 16)

    def call(q: Tensor) -> Tensor:
        return torch.ops.flash_attn_stand_in._flash_attn_forward(q, q, q, 0.0, 0.3, False)[0]

    assert convert_model(call, q)[0].verdict == "sla2"
    check_equal(call, q)

    def with_statistics(q: Tensor) -> Any:
        return torch.ops.flash_attn_stand_in._flash_attn_forward(q, q, q, 0.0, 0.3, False)

    assert "log-sum-exp" in dense_reason(with_statistics, q)
    library._destroy()
