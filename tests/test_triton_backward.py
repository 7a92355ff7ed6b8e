"""The Triton backward against float64 autograd: in the interpreter, without a GPU, and on one."""

from __future__ import annotations

import importlib.util

import kernel_cases as cases
import pytest
import torch
from interpreter import interpret
from kernel_cases import CASES, Case, gpu_case
from tolerances import EAGER_ERROR_FACTOR, EAGER_ERROR_FLOOR, LOW_BIT_GRADIENT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SLOW = {
    "long lists",
    "long lists, linear",
    "batch and groups, linear",
    "masked linear",
    "exact ends",
    "batch and groups",
}
LOW_BIT_NAMES = dict(zip(cases.NAMES, ("q", "k", "v", "alpha_logit", "alpha_gain"), strict=True))
# The interpreter rounds after every step of an exp2 or a sum, and d gain is a small sum of large terms.
INTERPRETER_FACTOR = 2 * EAGER_ERROR_FACTOR


def allowed(eager_error: float, case: Case, name: str, factor: float = EAGER_ERROR_FACTOR) -> float:
    """How far a gradient may be from float64's, relative to it."""
    if case.qk_format is not None:
        return LOW_BIT_GRADIENT[LOW_BIT_NAMES[name]]
    return max(factor * eager_error, EAGER_ERROR_FLOOR, 1e-5 if name in ("d_logit", "d_gain") else 0)


@needs_triton
@pytest.mark.parametrize(
    "names, dtype",
    [
        pytest.param([name for name in CASES if name not in SLOW], "float32", id="float32", marks=pytest.mark.slow),
        pytest.param(sorted(SLOW), "float32", id="float32, longer", marks=pytest.mark.slow),
        (["pooled row", "linear row", "pooled block", "linear block"], "float16"),
        (["ragged, lengths differ", "tiles, masked, linear", "one token"], "float32"),
    ],
)
def test_in_the_interpreter_gradients_are_those_of_float64_and_the_same_in_every_run(
    names: list[str], dtype: str
) -> None:
    for name, errors in interpret("interpret_backward.py", names, dtype).items():
        for gradient, error in errors["triton"].items():
            limit = allowed(errors["eager"][gradient], CASES[name], gradient, INTERPRETER_FACTOR)
            assert error <= limit, (name, gradient, error, limit)


def assert_gradients_are_exact_enough(case: Case) -> None:
    from sla2_compile.kernels import cuda_forward, triton_backward

    problem = cases.problem(case, "cuda")
    # Of the forward that runs before this backward: its `out` and probabilities belong together. Where all queries like
    # the same keys, dq is the small rest of terms that cancel, and another forward's roundings would not.
    saved = cuda_forward.forward(*problem.forward_arguments, True, case.settings)
    arguments = cases.backward_arguments(problem, saved)
    with cases.poisoned_memory():
        gradients = triton_backward.backward(*arguments, case.settings)
    exact = cases.reference_gradients(case, problem, saved[-1], torch.float64)
    eager = cases.relative_errors(cases.reference_gradients(case, problem, saved[-1], case.dtype), exact)
    for name, error in cases.relative_errors(cases.summed(gradients), exact).items():
        limit = allowed(eager[name], case, name)
        assert error <= limit, (name, error, limit)
    again = triton_backward.backward(*arguments, case.settings)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_gradients_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    assert_gradients_are_exact_enough(gpu_case(CASES[name], dtype, 64))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [16, 72, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("name", ["pooled row", "linear row", "masked", "tiles"])
def test_on_a_gpu_every_head_dim_works(name: str, dim: int) -> None:
    assert_gradients_are_exact_enough(gpu_case(CASES[name], torch.bfloat16, dim))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block_q, block_k", [(16, 16), (16, 256), (64, 128), (256, 16), (256, 256)])
@pytest.mark.parametrize("tail", ["pooled", "linear"])
def test_on_a_gpu_every_block_size_works(block_q: int, block_k: int, tail: str) -> None:
    case = Case(block_q=block_q, block_k=block_k, q_len=700, kv_len=1900, dim=64, tail=tail, dtype=torch.bfloat16)
    assert_gradients_are_exact_enough(case)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_gradient_expanded_from_a_scalar_is_read() -> None:
    from sla2_compile.kernels import triton_backward

    case = gpu_case(CASES["pooled row"], torch.bfloat16, 64)
    problem = cases.problem(case, "cuda")
    saved = cases.saved_tensors(case, problem)
    ones = torch.ones((), dtype=case.dtype, device="cuda").expand_as(problem.grad_out)
    results = [
        triton_backward.backward(grad, *cases.backward_arguments(problem, saved)[1:], case.settings)
        for grad in (ones, ones.contiguous())
    ]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
