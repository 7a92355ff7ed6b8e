"""The dense window: the same compiled model run with its own attention, at the cost of one compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import SMALL, SMALL_OPTIONS, Blocks, count_calls, tokens
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from sla2_compile import dense
from sla2_compile.backend import build_backend


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def counting() -> tuple[Callable[..., Any], list[bool]]:
    """Our backend, and for every compilation whether it was a dense one."""
    compiled: list[bool] = []

    def compile_graph(gm: Any, inputs: Any) -> Any:
        compiled.append(count_calls(gm, torch.ops.sla2.attention.default) == 0)
        return aot_eager(gm, inputs)

    return build_backend(SMALL, compile_graph), compiled


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "each block"])
def test_the_window_costs_one_compilation_and_none_after(way: str) -> None:
    model, x = Blocks(), tokens()
    expected = model(x)
    backend, compiled = counting()
    run = torch.compile(model, backend=backend) if way == "torch.compile" else model
    if way == "model.compile":
        model.compile(backend=backend)
    for block in model.blocks if way == "each block" else ():
        block.compile(backend=backend)
    sparse = run(x)
    for _ in range(3):
        with dense(), dense():
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(run(x), sparse)
    assert not torch.allclose(sparse, expected, rtol=1e-3)
    # The second block's input needs a gradient, the first one's does not: two graphs.
    num_graphs = 2 if way == "each block" else 1
    assert sorted(compiled) == [False] * num_graphs + [True] * num_graphs


def test_a_sampler_may_begin_inside_the_window() -> None:
    model, x = Blocks(), tokens()
    backend, compiled = counting()
    run = torch.compile(model, backend=backend)
    with dense():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(x), model(x), rtol=1e-3)
    assert sorted(compiled) == [False, True]


def test_other_lengths_inside_the_window_compile_no_more_than_outside() -> None:
    model = Blocks()
    backend, compiled = counting()
    run = torch.compile(model, backend=backend, dynamic=True)
    for num_tokens in (64, 96, 128, 80):
        x = tokens(num_tokens)
        run(x)
        with dense():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert sorted(compiled) == [False, True]


def test_attention_in_checkpointed_blocks_has_a_dense_twin_too() -> None:
    model = Blocks()

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    x = tokens(requires_grad=True)
    backend, compiled = counting()
    run = torch.compile(call, backend=backend)
    sparse = run(x)
    with dense():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(run(x), sparse)
    assert sorted(compiled) == [False, True]


def test_inside_the_window_the_output_is_inductor_s_bit_for_bit() -> None:
    model, x = Blocks(), tokens()
    with torch.no_grad():
        plain = torch.compile(model)(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="sla2", options=SMALL_OPTIONS, fullgraph=True)
        with dense():
            assert torch.equal(compiled(x), plain)
        assert not torch.allclose(compiled(x), plain, rtol=1e-3)


def test_the_window_closes_after_an_error() -> None:
    model, x = Blocks(), tokens()
    run = torch.compile(model, backend=counting()[0])
    sparse = run(x)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), dense():
        model(x[..., :3])
    assert torch.equal(run(x), sparse)


def test_training_inside_the_window_has_dense_gradients() -> None:
    model, x = Blocks(), tokens()
    run = torch.compile(model, backend=counting()[0])
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with dense():
        got = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
    for grad, expected_grad in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)
