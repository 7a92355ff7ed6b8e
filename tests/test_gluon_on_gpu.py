"""At a video's length the kernels for Hopper agree with Triton's, which tests hold against float64 at small ones."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gluon_cases import FP8_CASES, MIN_TILES
from kernel_cases import poisoned_memory, problem
from test_triton_forward import check
from tolerances import relative_error
from torch import Tensor

from sla2_compile import SLA2Config, attention

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(
    not on_hopper or importlib.util.find_spec("triton") is None, reason="needs a Hopper GPU and Triton"
)
HEADS, LENGTH, DIM = 12, 32760, 128
LINEAR = {"tail": "linear", "mixing": "block"}
GRID = {"token_grid": (21, 30, 52)}
FP8 = {"qk_format": "fp8", "pv_format": "fp8"}
# Options, and what is learned.
FORWARD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pooled": ({}, ()),
    "pooled, gain": ({}, ("logit", "gain")),
    "pooled, block": ({"mixing": "block"}, ("logit",)),
    "linear": (LINEAR, ("logit",)),
    "tiles": (GRID, ()),
    "tiles, gain": (GRID, ("logit", "gain")),
    "tiles, linear": ({**GRID, **LINEAR}, ("logit",)),
    "int8": ({"qk_format": "int8"}, ()),
    "fp8": (FP8, ()),
    "fp8, logit": (FP8, ("logit",)),
    "fp8 keys": ({"qk_format": "fp8"}, ()),
    "fp8 keys, linear": ({"qk_format": "fp8", **LINEAR}, ("logit",)),
    "int8, fp8": ({"qk_format": "int8", "pv_format": "fp8"}, ()),
    "fp8, linear": ({**FP8, **LINEAR}, ("logit",)),
    "exact ends": ({"exact_prefix": 300, "exact_suffix": 60}, ()),
    "exact ends, fp8": ({"exact_prefix": 300, **FP8}, ()),
}
TRAINING = ("pooled", "pooled, gain", "linear", "tiles", "linear row")
LIMIT = 5e-3


def run(name: str, *, training: bool) -> tuple[Tensor, ...]:
    """The output, and for training dq, dk and dv."""
    options, learned = (LINEAR | {"mixing": "row"}, ()) if name == "linear row" else FORWARD[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def tokens() -> Tensor:
        x = torch.randn(1, LENGTH, HEADS, DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
        return x.transpose(1, 2)

    q, k, v, grad_out = (tokens() for _ in range(4))
    k += torch.randn(DIM, device="cuda", generator=generator).to(k)
    state: dict[str, Tensor] = {}
    if "logit" in learned:
        state["alpha_logit"] = torch.randn(HEADS, -(-LENGTH // 128), device="cuda", generator=generator)
    if "gain" in learned:
        state["alpha_gain"] = torch.rand(HEADS, device="cuda", generator=generator) + 0.5
    config = SLA2Config(sparsity=0.97, **options)
    if not training:
        return (attention(q, k, v, config=config, **state),)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, config=config, **state)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad_out))


@pytest.fixture
def without_gluon(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Leaves the forward, or the backward, to Triton."""

    def switch_off(backward: bool) -> None:
        from sla2_compile.kernels import (
            gluon_attention,
            gluon_backward_keys,
            gluon_backward_queries,
            gluon_backward_tail,
            gluon_fp8_attention,
        )

        of_backward = (
            (gluon_backward_keys, "key_gradients"), (gluon_backward_queries, "query_gradient"),
            (gluon_backward_tail, "tail_gradient"),
        )  # fmt: skip
        of_forward = ((gluon_attention, "attend"), (gluon_fp8_attention, "attend"))
        for module, launcher in of_backward if backward else of_forward:
            monkeypatch.setattr(module, launcher, lambda *_: None)

    return switch_off


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name, training", [*((name, False) for name in FORWARD), *((name, True) for name in TRAINING)])
def test_at_a_video_s_length_hopper_s_kernels_agree_with_triton_s(
    name: str, training: bool, without_gluon: Callable[[bool], None]
) -> None:
    found, again = run(name, training=training), run(name, training=training)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    # Forwards round independently, so that gradients are compared for one and the same.
    without_gluon(training)
    for x, y in zip(found, run(name, training=training), strict=True):
        assert x.isfinite().all()
        assert relative_error(x, y) < LIMIT


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FP8_CASES)
def test_two_programs_a_multiprocessor_attend_in_fp8_as_float64_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forward_checks import forward_errors

    from sla2_compile.kernels import gluon_fp8_attention

    monkeypatch.setattr(gluon_fp8_attention, "MIN_TILES", MIN_TILES)
    case = dataclasses.replace(FP8_CASES[name], dtype=dtype)
    with poisoned_memory():
        errors = forward_errors(case, problem(case, "cuda"), repeat=True, sums_codes=case.tail == "pooled")
    # What is saved for a backward comes from another kernel.
    del errors["rounded"]
    check(case, errors, name)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("magnitude", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", ["FP8, head dim 128, 2 of 12 kept", "FP8, head dim 128, linear, softmax"])
def test_in_fp8_no_scores_make_an_output_infinite(name: str, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sla2_compile.kernels import cuda_forward, gluon_fp8_attention

    monkeypatch.setattr(gluon_fp8_attention, "MIN_TILES", MIN_TILES)
    case = dataclasses.replace(FP8_CASES[name], magnitude=magnitude, dtype=torch.bfloat16)
    with poisoned_memory():
        out = cuda_forward.forward(*problem(case, "cuda").forward_arguments, False, case.settings)[0]
    assert out.isfinite().all()
