"""Numbers of low-bit training: codes are torchao's, and gradients those of the rounded function's expectation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, make_case, output_and_gradients
from tolerances import EXPECTED_GRADIENT, FAKE_QUANT, LOW_BIT_GRADIENT, relative_error
from torch import Tensor

from sla2_compile.kernels import blocked
from sla2_compile.kernels.dispatch import missing_for_format
from sla2_compile.kernels.reference import quantize_blocks
from sla2_compile.quant.formats import (
    INT8_MAX,
    format_scale,
    quantize_dequantize,
    quantize_dequantize_probabilities,
    round_to_format,
)

BLOCK, DIM = 128, 64


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# torchao's primitives


def torchao_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales per block of tokens, and the fake-quantised x (N, D), all by torchao."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    block, kind, limits = (BLOCK, DIM), torch.int8, (-127, 127)
    scale, zero_point = primitives.choose_qparams_affine(
        x, primitives.MappingType.SYMMETRIC, block, kind, *limits, scale_dtype=torch.float32
    )
    codes = primitives.quantize_affine(x, block, scale, zero_point, kind, *limits)
    fake = primitives._fake_quantize_affine(
        x, block, scale, None, kind, *limits, zero_point_domain=primitives.ZeroPointDomain.NONE
    )
    return codes, scale, fake


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_codes_and_scales_are_those_of_torchaos_primitives_except_at_rounding_ties(dtype: torch.dtype) -> None:
    # In 16 bits their scale would be rounded to 16 bits; ours never is.
    x = normal(64 * BLOCK, DIM, dtype=dtype).float()
    theirs, their_scale, _ = torchao_int8(x)
    blocks = x.unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 2), keepdim=True) / INT8_MAX
    assert torch.equal(scale.flatten(), their_scale.flatten())
    exact = (blocks / scale).flatten(0, 1)
    codes = round_to_format(exact, "int8")
    # They multiply by 1 / scale where we divide: that moves a value by a few units in its last place.
    differs = codes != theirs.float()
    distance_to_tie = (exact.abs() % 1 - 0.5).abs()
    assert (distance_to_tie[differs] < 1e-4).all()
    assert (codes - theirs.float()).abs().max() <= 1
    assert differs.float().mean() < 1e-3


def test_int8_values_are_those_of_torchaos_fake_quantisation() -> None:
    x = normal(64 * BLOCK, DIM)
    codes, _, theirs = torchao_int8(x)
    ours = quantize_blocks(x, BLOCK, "int8")
    scale = x.unflatten(0, (-1, BLOCK)).abs().amax((1, 2)).repeat_interleave(BLOCK)[:, None] / INT8_MAX
    same = round_to_format(x / scale, "int8") == codes.float()
    torch.testing.assert_close(ours[same], theirs[same], rtol=1e-6, atol=1e-7)


# The gradient


@pytest.mark.parametrize("qk_format, pv_format", [("int8", None), ("int8", "fp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_linear_in_the_incoming_one_however_small_it_is(
    qk_format: str, pv_format: str | None, dtype: torch.dtype
) -> None:
    case = make_case(q_len=300, dim=64, dtype=dtype, qk_format=qk_format, pv_format=pv_format, fake_quant=True)
    out, inputs = case.op(), tuple(case.differentiable().values())
    grad = normal(*out.shape, dtype=dtype)
    large = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for power in (10, 20, 40):
        small = torch.autograd.grad(out, inputs, grad * 2.0**-power, retain_graph=True)
        for x, y in zip(small, large, strict=True):
            assert torch.equal(x * 2.0**power, y)


@pytest.mark.parametrize("qk_format, pv_format", [("int8", "fp8"), ("fp8", "fp8")])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_gradients_stay_those_without_formats_where_inputs_and_gradients_are_small(
    qk_format: str, pv_format: str, size: float
) -> None:
    case = make_case(q_len=300, dim=64, qk_format=qk_format, pv_format=pv_format, mixing="block", learned=False)
    case = replace(case, v=(size * case.v).detach().requires_grad_())
    exact = replace(case, config=replace(case.config, qk_format=None, pv_format=None))
    results = output_and_gradients(case, case.op)
    for name, expected in output_and_gradients(exact, exact.op).items():
        assert relative_error(results[name], expected) < LOW_BIT_GRADIENT[name], name
        assert (results[name] == 0).float().mean() <= (expected == 0).float().mean()


def directional(case: Case, run: Callable[[Case], Tensor], grad: Tensor, name: str, direction: Tensor) -> float:
    out = run(case)
    (slope,) = torch.autograd.grad(out, (getattr(case, name),), grad)
    return (slope * direction).sum().item()


@pytest.mark.parametrize("tail, mixing", [("pooled", "row"), ("linear", "block")])
def test_the_gradient_is_the_finite_difference_of_the_rounded_outputs_expectation(tail: str, mixing: str) -> None:
    # Rounding is flat almost everywhere; its expectation over inputs that jitter by about a code is smooth.
    settings: dict[str, Any] = {"tail": tail, "mixing": mixing, "qk_format": "int8", "block_q": 64, "block_k": 32}
    case = make_case(q_len=256, dim=32, heads=1, batch=1, sparsity=0.6, **settings)
    case = replace(case, router=None)
    block_mask, generator = case.block_mask(), torch.Generator().manual_seed(5)

    def like_q() -> Tensor:
        return torch.randn(case.q.shape, generator=generator, dtype=torch.float64)

    def moved(base: Case, **shifts: Tensor) -> Case:
        return replace(base, **{n: (getattr(base, n) + x).detach().requires_grad_() for n, x in shifts.items()})

    grad, slopes, differences = like_q(), [], []
    for i in range(12):
        name, direction, step = ("q", "k", "v")[i % 3], like_q(), 0.05
        slope = difference = 0.0
        for _ in range(4):
            jittered = moved(case, **{each: 0.02 * like_q() for each in ("q", "k", "v")})
            slope += directional(jittered, Case.op, grad, name, direction)
            ends = [moved(jittered, **{name: sign * step * direction}) for sign in (1, -1)]
            up, down = ((end.reference(block_mask).detach() * grad).sum().item() for end in ends)
            difference += (up - down) / (2 * step)
        slopes.append(slope)
        differences.append(difference)
    assert relative_error(torch.tensor(slopes), torch.tensor(differences)) < EXPECTED_GRADIENT


# Fake-quantisation and the low-bit kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_both_ways_of_computing_formats_are_the_same_bits(dtype: torch.dtype) -> None:
    case = make_case(q_len=300, dim=64, dtype=dtype, qk_format="int8", pv_format="fp8")
    fake = replace(case, config=replace(case.config, fake_quant=True))
    results = output_and_gradients(case, case.op)
    assert all(torch.equal(x, results[name]) for name, x in output_and_gradients(fake, fake.op).items())


def test_fake_quantisation_needs_no_low_bit_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sla2_compile.validation.missing_for_format", lambda name, device: "not here" if name else None)
    case = make_case(qk_format="int8")
    with pytest.raises(ValueError, match="qk_format: expected one of None on cpu, got 'int8': not here"):
        case.op()
    fake = replace(case, config=replace(case.config, fake_quant=True))
    assert fake.op().isfinite().all()


@pytest.mark.parametrize("formats, rounds", [({}, False), ({"qk_format": "int8"}, True), ({"pv_format": "fp8"}, True)])
def test_without_a_format_there_is_nothing_to_round_and_the_device_s_kernels_run(
    formats: dict[str, Any], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def forward_of(device: torch.device, *, only_rounds: bool) -> Callable[..., Any]:
        seen.append(only_rounds)
        return blocked.forward

    monkeypatch.setattr("sla2_compile.ops.forward_of", forward_of)
    make_case(fake_quant=True, **formats).op()
    make_case(fake_quant=False, **formats).op()
    assert seen == [rounds, False]


def fp8_sums(q: Tensor, k: Tensor, v: Tensor) -> float:
    """What tensor cores, whose sums of FP8 products lose digits, do to attention (N, D) whose probabilities are FP8.

    Two computations in plain PyTorch that differ in nothing but who adds up the scores: those that lie between two
    codes of a probability go either way.
    """
    q, k = q.float(), k.float()
    q_scale, k_scale = (format_scale(x, "fp8", (0, 1)) for x in (q, k))
    q_codes, k_codes = ((x / scale).to(torch.float8_e4m3fn) for x, scale in ((q, q_scale), (k, k_scale)))
    one = torch.ones((), device=q.device)
    of_tensor_cores = torch._scaled_mm(q_codes, k_codes.T, one, one, out_dtype=torch.float32, use_fast_accum=True)

    def attend(scores: Tensor) -> Tensor:
        scores = scores.double() * (q_scale * k_scale).double() * q.shape[-1] ** -0.5
        probs = scores.softmax(-1)
        return quantize_dequantize_probabilities(probs, scores.amax(-1), scores.logsumexp(-1)) @ v.double()

    return relative_error(attend(of_tensor_cores), attend(q_codes.double() @ k_codes.double().T))


@pytest.mark.gpu
@pytest.mark.parametrize("qk_format, pv_format", [("int8", None), ("fp8", None), ("int8", "fp8"), ("fp8", "fp8")])
@pytest.mark.parametrize("tail, mixing", [("pooled", "row"), ("linear", "block")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_fake_quantisation_agrees_with_the_low_bit_kernels(
    qk_format: str, pv_format: str | None, tail: str, mixing: str, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for name in (qk_format, pv_format or ""):
        if problem := missing_for_format(name, torch.device("cuda", 0)):
            pytest.skip(problem)
    settings: dict[str, Any] = {"tail": tail, "mixing": mixing, "qk_format": qk_format, "pv_format": pv_format}
    case = make_case(q_len=1000, dim=64, dtype=dtype, learned=False, block_q=128, block_k=64, **settings)
    case = replace(case, **{name: x.detach().cuda() for name, x in case.differentiable().items()})
    fake = replace(case, config=replace(case.config, fake_quant=True))
    # Bfloat16 itself is coarser than 1e-3: kernels and plain PyTorch then differ by as much without any format. And
    # where both formats are FP8, tensor cores differ from exact sums by more.
    limit = FAKE_QUANT
    if dtype == torch.bfloat16:
        exact = replace(case, config=replace(case.config, qk_format=None, pv_format=None))
        limit = relative_error(exact.op(), in_plain_pytorch(exact))
        assert limit > FAKE_QUANT
    if dtype != torch.float32 and (qk_format, pv_format) == ("fp8", "fp8"):
        limit = math.hypot(limit, fp8_sums(*(x[0, 0, :960] for x in (case.q, case.k, case.v))))
    assert relative_error(case.op(), fake.op()) < limit


def in_plain_pytorch(case: Case) -> Tensor:
    """The op as devices without kernels compute it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sla2_compile.ops.forward_of", lambda *_, **__: blocked.forward)
        return case.op()


def test_what_is_rounded_is_what_the_format_stores() -> None:
    x = normal(256, DIM)
    assert torch.equal(quantize_blocks(x[:BLOCK], BLOCK, "int8"), quantize_dequantize(x[:BLOCK], "int8", (0, 1)))
