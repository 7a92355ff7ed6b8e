"""Checks of the kernels that make and sum states of key blocks on Hopper, for the emulator and for a GPU."""

from __future__ import annotations

import dataclasses

import torch
from stage_checks import stored_order, words_of_mask
from states_cases import BLOCK_K, DIM, Case
from tolerances import relative_error
from torch import Tensor

from sla2_compile.kernels import gluon_states, gluon_tail_sums, reference
from sla2_compile.kernels.hardware import num_multiprocessors
from sla2_compile.kernels.triton_backward_linear_keys import padded_key_blocks
from sla2_compile.kernels.triton_low_bit import low_bit_codes
from sla2_compile.kernels.triton_statistics import block_statistics

FACTOR = 2.0**-6
# Relative, of numbers of all sizes rounded to 3 bits of mantissa.
E4M3_ERROR = 0.0265


class Problem:
    """Inputs of a case, its choice, and its states in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator(case.device).manual_seed(0)
        size = (case.batch, case.kv_len, case.heads, DIM)
        k, v = (torch.randn(size, generator=generator, device=case.device) for _ in range(2))
        k += torch.randn(DIM, generator=generator, device=case.device)
        if case.spread:
            power = torch.randint(-case.spread, case.spread + 1, (case.T,), generator=generator, device=case.device)
            v *= torch.exp2(power.float()).repeat_interleave(BLOCK_K)[: case.kv_len, None, None]
        self.k, self.v = (x.to(case.dtype).transpose(1, 2) for x in (k, v))
        shape = (case.batch, case.heads * case.group, case.q_blocks, case.T)
        self.kept = torch.rand(shape, generator=generator, device=case.device) >= case.sparsity
        self.bits = words_of_mask(self.kept)
        self.center = self.k.double().mean(2).float()
        x = self.k.double() - self.center.double()[:, :, None]
        phi, blocks_v = (
            reference.split_blocks(y, BLOCK_K) for y in (reference.feature_map(x, case.feature_map), self.v.double())
        )
        self.h, self.z = phi.mT @ blocks_v, phi.sum(3)

    def sums(self) -> Tensor:
        """(B H, M, D + 1, D) float64 H and Z."""
        states = torch.cat([self.h, self.z[..., None, :]], 3).repeat_interleave(self.case.group, 1)
        return torch.einsum("bhmt,bhtde->bhmde", (~self.kept).double(), states).flatten(0, 1)


def check_states(case: Case) -> dict[str, float]:
    """States in 16 bits."""
    p, settings = Problem(case), case.settings(qk_format=None, pv_format=None)
    tiles = gluon_states.tiles_of(p.k, p.v, None, None, settings)
    assert tiles is not None
    shape = (case.batch * case.heads, padded_key_blocks(case.T), DIM + 1, DIM)
    states = torch.full(shape, float("nan"), dtype=case.dtype, device=case.device)
    gluon_states.stream_states(states, tiles, p.k, p.v, p.center, FACTOR, settings)
    assert states[:, case.T :].isnan().all(), "past the last block"
    found = states[:, : case.T].unflatten(0, (case.batch, case.heads)).double()
    return {
        "h": relative_error(found[..., :-1, :], p.h * FACTOR),
        "z": relative_error(found[..., -1, :], p.z * FACTOR),
    }


def check_fp8_states(case: Case) -> dict[str, float]:
    """States in FP8, what comes with them, and their sums."""
    p, settings, padded = Problem(case), case.settings(), padded_key_blocks(case.T)
    tiles = gluon_states.tiles_of(p.k, p.v, None, None, settings)
    assert tiles is not None
    scales_values = case.pv_format is not None
    found = gluon_states.fp8_states(tiles, p.k, p.v, p.center, padded, FACTOR, settings, scales_values=scales_values)
    codes = found.codes[..., stored_order(DIM, p.k.device).argsort()].double()
    assert (codes[:, case.T :] == 0).all()
    states = codes[:, : case.T] * found.unit.double()[..., None, None]
    h, z = p.h.flatten(0, 1) * FACTOR, p.z.flatten(0, 1) * FACTOR
    errors = {
        "h": relative_error(states, h),
        "z": relative_error(found.z.double(), z),
    }
    # The same codes and scales as where nothing else is read with the keys.
    statistics = block_statistics(None, p.k, p.v, None, None, settings, needs_v_bar=False, smooth_k_bar=False)
    statistics = dataclasses.replace(statistics, center=p.center)
    only_keys = case.settings(pv_format=None)
    expected = low_bit_codes(p.k, p.v, statistics, None, None, only_keys, with_means=False)
    assert expected.k is not None
    assert expected.k_scale is not None
    assert torch.equal(found.key_codes.scale, expected.k_scale)
    assert torch.equal(found.key_codes.codes.view(torch.int8), expected.k.view(torch.int8))
    if scales_values:
        assert found.v_scale is not None
        largest = p.v.float().abs().amax(2)
        # By a tensor: a number's reciprocal would be multiplied with.
        assert torch.equal(found.v_scale, largest / torch.full_like(largest, 448))
    sums = gluon_tail_sums.tail_states(found, p.bits)
    assert sums.dtype == case.dtype
    wanted = p.sums() * FACTOR
    # What rounding makes of each of a sum's terms it makes of the sum, unless the next term makes up for it: everywhere
    # but where a program's stretch of blocks ends, and, for a sum without the kept ones, before and behind those.
    ends, kept = (
        min(3 * num_multiprocessors(p.k.device) / (case.batch * case.heads), case.T),
        (1 - case.sparsity) * case.T,
    )
    of_all, of_tail = (E4M3_ERROR * (x / y) ** 0.5 for x, y in ((ends, case.T), (ends + 2 * kept, case.T - kept)))
    errors["all, over what stretches' ends leave"] = relative_error(states.sum(1), h.sum(1)) / of_all
    errors["H, over what ends and kept blocks leave"] = (
        relative_error(sums[:, :, :-1].double(), wanted[:, :, :-1]) / of_tail
    )
    errors["Z"] = relative_error(sums[:, :, -1].double(), wanted[:, :, -1])
    return errors
