"""Codes and means by one pass over keys and values on Hopper, for the emulator and for a GPU.

The same codes come of Triton's kernels by the center and the scales that were found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import torch
from tolerances import relative_error
from torch import Tensor

from sla2_compile.kernels import reference, triton_one_pass
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_key_codes import key_codes
from sla2_compile.kernels.triton_low_bit import num_stored_blocks
from sla2_compile.kernels.triton_value_codes import value_codes

BLOCK_K = 64


@dataclass(frozen=True)
class Case:
    """Keys with a mean of their own and values, of which one channel of the first head may be unlike its samples."""

    batch: int = 1
    heads: int = 2
    kv_len: int = 200
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    qk_format: str | None = "fp8"
    pv_format: str | None = "fp8"
    heads_apart: bool = False  # (B, H, N, D) in memory
    outlier: float = 0.0  # one value that is no sample
    fading: bool = False  # in one channel samples are larger than all others, in another they alone are 0
    samples: int = 1024
    device: str = "cpu"

    @property
    def settings(self) -> Settings:
        return Settings(
            scale=self.dim**-0.5, sparsity_units=900_000, block_q=128, block_k=BLOCK_K, feature_map="softmax",
            qk_format=self.qk_format, pv_format=self.pv_format, tail="pooled", mixing="row", token_grid=None,
            exact_prefix=0, exact_suffix=0,
        )  # fmt: skip

    @property
    def step(self) -> int:
        return 1 if self.kv_len <= self.samples else num_blocks(self.kv_len, self.samples) | 1


# For the emulator.
SMALL = {
    "short block": Case(),
    "head dim 64": Case(dim=64, qk_format="int8"),
    "batch, heads apart, whole blocks": Case(batch=2, kv_len=192, heads_apart=True),
    "fewer than a block": Case(heads=1, kv_len=5),
    "keys alone": Case(pv_format=None),
    "values alone": Case(qk_format=None),
    "samples": Case(kv_len=300, samples=64),
    "samples, one value too large": Case(kv_len=300, samples=64, outlier=50.0),
    "samples, values smaller than they": Case(kv_len=300, samples=64, fading=True),
}
VIDEO = Case(heads=12, kv_len=32760, device="cuda")
LARGE = {
    "480p": VIDEO,
    "480p, int8, one value too large": replace(VIDEO, qk_format="int8", outlier=50.0),
    "480p, values smaller than samples": replace(VIDEO, fading=True),
    "head dim 64, batch": replace(VIDEO, batch=2, dim=64, kv_len=5000),
    "720p": replace(VIDEO, heads=40, kv_len=75600),
}


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """k and v (B, H, N, D)."""
    generator = torch.Generator(case.device).manual_seed(0)
    size = (case.batch, case.kv_len, case.heads, case.dim)
    k, v = (torch.randn(size, generator=generator, device=case.device) for _ in range(2))
    k += 4 * torch.randn(case.dim, generator=generator, device=case.device)
    is_sample = torch.arange(case.kv_len, device=case.device) % case.step == 0
    if case.outlier:
        v[0, int((~is_sample).nonzero()[-1]), 0, 3] = case.outlier
    if case.fading:
        v[:, :, 0, 3] *= torch.where(is_sample, 1e-3, 1e-6)
        # What only samples that are 0 could say of others: nothing.
        v[:, :, -1, 5] *= torch.where(is_sample, 0.0, 1e-5)
    k, v = (x.to(case.dtype).transpose(1, 2) for x in (k, v))
    return (k.contiguous(), v.contiguous()) if case.heads_apart else (k, v)


def errors_of(case: Case) -> dict[str, float]:
    """Relative errors of means, and the share of codes that are others; scales of keys agree, those of values suit."""
    k, v = inputs(case)
    settings, T = case.settings, num_blocks(case.kv_len, BLOCK_K)
    num_stored, errors = num_stored_blocks(T, settings, with_means=True), {}
    assert triton_one_pass.suits(k, None, None, settings)
    with mock.patch.object(triton_one_pass, "SAMPLES", case.samples):
        keys, values = triton_one_pass.one_pass(k, v, num_stored, settings)
    everyone = torch.ones(1, 1, case.kv_len, dtype=torch.bool, device=case.device)
    assert (keys is None, values is None) == (case.qk_format is None, case.pv_format is None)
    if keys is not None:
        expected = key_codes(k, keys.center, num_stored, None, None, settings)
        assert torch.equal(keys.codes.scale[:, :, :T], expected.scale[:, :, :T])
        errors["codes of keys"] = share_of_others(keys.codes.codes[:, :, :T], expected.codes[:, :, :T])
        errors["center"] = relative_error(keys.center, k.double()[:, :, :: case.step].mean(2))
        errors["means of keys"] = relative_error(keys.mean, reference.block_means(k.double(), everyone, BLOCK_K))
        sizes = reference.block_sums(everyone[..., None].double(), BLOCK_K)[0, 0, :, 0]
        assert torch.equal(keys.n.double(), sizes.expand(keys.n.shape))
    if values is not None:
        expected = value_codes(v, values.scale, num_stored, None, None, settings)
        errors["codes of values"] = share_of_others(values.codes[:, :, :T], expected[:, :, :T])
        check_scales(case, v, values.scale)
        errors["means of values"] = relative_error(values.mean, reference.block_means(v.double(), everyone, BLOCK_K))
    return errors


def share_of_others(found: Tensor, expected: Tensor) -> float:
    """How many codes are not the expected ones; those must be neighbours of them."""
    found, expected = (x.contiguous().view(torch.int8).int() for x in (found, expected))
    assert ((found - expected).abs() <= 1).all()
    return (found != expected).double().mean().item()


def check_scales(case: Case, v: Tensor, scale: Tensor) -> None:
    """Scales reach all values, few of whose digits they waste; exactly where samples tell nothing."""
    peak = v.float().abs().amax(2)
    exact = torch.where(peak > 0, peak / torch.full_like(peak, 448.0), 1)
    assert (scale >= exact).all()
    assert (scale <= exact * triton_one_pass.SLACK).all()
    if case.step == 1:
        assert torch.equal(scale, exact)
        return
    assert (scale > exact).float().mean() > 0.9
    if case.outlier:
        assert scale[0, 0, 3] == exact[0, 0, 3]
    if case.fading:
        assert torch.equal(scale[:, -1, 5], exact[:, -1, 5])
