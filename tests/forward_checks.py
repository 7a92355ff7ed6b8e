"""The whole CUDA forward of a case against the reference, on a GPU or in the interpreter."""

from __future__ import annotations

import dataclasses
from functools import partial
from unittest import mock

import kernel_cases as cases
import torch
from tolerances import relative_error
from torch import Tensor

from sla2_compile.kernels import blocked, cuda_forward, reference, triton_one_pass
from sla2_compile.kernels.blocked_routing import kept_block_mask
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.quant.formats import format_scale, quantized_by, round_to_format

# Of the distance of two codes.
TIE = 1e-4
NAMES = ("out", "sparse_out", "sparse_lse", "tail_lse")


def forward_errors(
    case: cases.Case, p: cases.Problem, *, repeat: bool, sums_codes: bool = False
) -> dict[str, dict[str, float]]:
    """Relative L2 errors of out, sparse_out and the log-sum-exps.

    Asserts shapes, strides and dtypes, that nothing is left NaN or infinite where it must not be, and with `repeat`
    that two runs give the same bits. With `sums_codes` what runs where nothing is saved divides by the sum of a row's
    rounded weights, not of the weights.

    Returns:
        "exact": the output, where something is saved for a backward and where nothing is, against the reference in
            float64 without formats, for the kernels' own choice of blocks.
        "rounded": the same with the formats emulated; all outputs, where the choice of blocks is the float64 one.
        "eager": the reference in the case's dtype against the reference in float64, both without formats.
        "unsaved": the output where nothing is saved for a backward, against the one where something is.
        "ties": in float32, by how much saved outputs may be off for codes that lie between two; see `_tie_errors`.
    """
    found = cuda_forward.forward(*p.forward_arguments, True, case.settings)
    if repeat:
        again = cuda_forward.forward(*p.forward_arguments, True, case.settings)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    unsaved = cuda_forward.forward(*p.forward_arguments, False, case.settings)
    if repeat:
        again = cuda_forward.forward(*p.forward_arguments, False, case.settings)
        assert all(torch.equal(x, y) for x, y in zip(unsaved, again, strict=True))
    assert torch.equal(unsaved[4], found[4])
    assert unsaved[1].numel() == 0
    assert not unsaved[2].any()
    assert not unsaved[3].any()
    twin = blocked.forward(*p.to(torch.float64).forward_arguments, True, case.settings)
    for got, want in zip(found, twin, strict=True):
        assert (got.shape, got.stride()) == (want.shape, want.stride())
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()
    assert unsaved[0].isfinite().all()
    kept = found[4]
    exact, rounded, eager = (
        _reference(case, p, kept, torch.float64, formats=False),
        _reference(case, p, kept, torch.float64, formats=True),
        _reference(case, p, kept, case.dtype, formats=False),
    )
    similar = _over_codes(case, p, found[0], kept) if sums_codes else found[0]
    alike = unsaved
    if case.kv_len > triton_one_pass.SAMPLES:
        # With the codes that are made where something is saved, which know of all tokens.
        with mock.patch.object(triton_one_pass, "SAMPLES", case.kv_len):
            alike = cuda_forward.forward(*p.forward_arguments, False, case.settings)
    errors = {
        "exact": {"out": relative_error(found[0], exact), "unsaved": relative_error(unsaved[0], exact)},
        "rounded": {"out": relative_error(found[0], rounded)},
        "eager": {"out": relative_error(eager, exact)},
        # With nothing to save another kernel may serve, which rounds elsewhere.
        "unsaved": {"out": relative_error(alike[0], similar)},
    }
    if torch.equal(kept, twin[4]):
        errors["rounded"] |= _saved_errors(p, found, twin)
        if case.qk_format is not None and case.dtype == torch.float32:
            errors["ties"] = _tie_errors(case, p)
    return errors


def _over_codes(case: cases.Case, p: cases.Problem, out: Tensor, kept: Tensor) -> Tensor:
    """An output divided by the sums of the rounded weights of its rows in place of those of the weights.

    The ratio of both sums is what comes of values that are all 1, of which the codes are exact.
    """
    ones = dataclasses.replace(p, v=torch.ones_like(p.v))
    return out.double() / _reference(case, ones, kept, torch.float64, formats=True)


def _tie_errors(case: cases.Case, p: cases.Problem) -> dict[str, float]:
    """The errors of saved outputs if every code that is nearly between two is the upper one, and not the lower.

    In float32 smoothed means have lost digits and are off by up to half of TIE codes.
    """
    wide = p.to(torch.float64)

    def leaning(x: Tensor, number_format: str, dims: tuple[int, ...], by: float) -> Tensor:
        scale = format_scale(x, number_format, dims)
        return round_to_format(x / scale + by, number_format) * scale

    found = []
    for by in (TIE, -TIE):
        with quantized_by(partial(leaning, by=by)):
            found.append(blocked.forward(*wide.forward_arguments, True, case.settings))
    return _saved_errors(p, *found)


def _saved_errors(p: cases.Problem, found: tuple[Tensor, ...], twin: tuple[Tensor, ...]) -> dict[str, float]:
    # Where a batch element has no real key, nobody reads its log-sum-exps, and the twin's are not infinite.
    seen = slice(None) if p.attn_mask is None else p.attn_mask.expand(len(p.q), -1, -1, -1).any(-1)[:, 0, 0]
    pairs = {
        name: (got[seen].double(), want[seen]) for name, got, want in zip(NAMES[1:], found[1:4], twin[1:4], strict=True)
    }
    # A tail that weighs nothing beside the kept keys, exp(-80), is told from none, but not how little it weighs.
    tails = zip(pairs["tail_lse"], pairs["sparse_lse"], strict=True)
    got, want = (torch.where(tail.isinf(), tail, tail.clamp(min=sparse - 80)) for tail, sparse in tails)
    pairs["tail_lse"] = got, want
    return {name: _finite_error(*pair) for name, pair in pairs.items()}


def _reference(case: cases.Case, p: cases.Problem, kept: Tensor, dtype: torch.dtype, *, formats: bool) -> Tensor:
    wide = p.to(dtype)
    config = case.config if formats else dataclasses.replace(case.config, qk_format=None, pv_format=None)
    return reference.attention(
        wide.q,
        wide.k,
        wide.v,
        attn_mask=wide.attn_mask,
        alpha_logit=wide.alpha_logit,
        alpha_gain=wide.alpha_gain,
        config=config,
        block_mask=kept_block_mask(kept, num_blocks(case.kv_len, case.block_k)),
    )


def _finite_error(found: Tensor, expected: Tensor) -> float:
    """Relative error of log-sum-exps or outputs, to at least 1; infinite ones must be infinite in both."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    assert torch.equal(found[~finite].double(), expected[~finite])
    difference = torch.where(finite, found.double() - expected, 0)
    return (difference.norm() / max(1.0, torch.where(finite, expected, 0).norm().item())).item()
