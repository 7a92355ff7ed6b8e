"""Each stage of the forward alone against the reference: what differs, and by how much. On a GPU or in the interpreter.

Every check returns relative L2 errors by name; what must agree exactly is an assertion.
"""

from __future__ import annotations

import math

import torch
from kernel_cases import Case, Problem
from tolerances import relative_error
from torch import Tensor

from sla2_compile.kernels import reference
from sla2_compile.kernels.blocked_routing import kept_block_mask, route
from sla2_compile.kernels.settings import empty_saved
from sla2_compile.kernels.token_order import tile_order
from sla2_compile.kernels.triton_linear_state import linear_states
from sla2_compile.kernels.triton_low_bit import Codes, low_bit_codes
from sla2_compile.kernels.triton_router import route as triton_route
from sla2_compile.kernels.triton_statistics import Statistics, block_statistics
from sla2_compile.kernels.triton_token_order import visiting_order
from sla2_compile.quant.formats import quantize_dequantize


class Stages:
    """The stages before attention itself, run for one case, and the float64 inputs in visiting order."""

    def __init__(self, case: Case, p: Problem) -> None:
        self.case, self.settings = case, case.settings
        self.real = None if p.attn_mask is None else p.attn_mask.expand(case.batch, 1, 1, case.kv_len)[:, 0, 0]
        self.order = visiting_order(self.settings, case.kv_len, p.q.device)
        self.statistics: Statistics = block_statistics(
            p.q, p.k, p.v, self.real, self.order, self.settings, needs_v_bar=True, smooth_k_bar=True
        )
        self.codes: Codes = low_bit_codes(
            p.k, p.v, self.statistics, self.real, self.order, self.settings, with_means=True
        )
        self.inputs = p
        wide = p.to(torch.float64)
        visited = slice(None) if self.order is None else self.order.long()
        self.q, self.k, self.v = (x[:, :, visited] for x in (wide.q, wide.k, wide.v))
        real = torch.ones(case.batch, case.kv_len, dtype=torch.bool, device=p.q.device)
        self.all_real = (real if self.real is None else self.real)[:, visited][:, None]
        self.smooth_k = reference.smooth_keys(self.k, self.all_real) if self.settings.smooths_keys else self.k


def stored_order(length: int, device: torch.device) -> Tensor:
    """What is at each place of `triton_value_codes.stored_key`'s order."""
    place = torch.arange(length, device=device)
    return place // 16 * 16 + place % 16 // 4 * 2 + place % 2 + place % 4 // 2 * 8


def words_of_mask(mask: Tensor) -> Tensor:
    """Kept key blocks (..., T) bool as the router's words (..., W) int32; blocks that there are not count as kept."""
    words = 2 * -(-mask.shape[-1] // 64)
    padded = torch.nn.functional.pad(mask, (0, 32 * words - mask.shape[-1]), value=True).unflatten(-1, (words, 32))
    bits = (padded.long() << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()


def check_order(case: Case) -> None:
    """The closed form of the visiting order is the sorted one's."""
    assert case.token_grid is not None
    found = visiting_order(case.settings, case.kv_len, torch.device("cpu"))
    assert found is not None
    assert torch.equal(found.long(), tile_order(case.token_grid, case.kv_len, case.exact_prefix))


def check_statistics(stages: Stages) -> dict[str, float]:
    """Means, counts and scales of blocks."""
    case, found = stages.case, stages.statistics
    everyone = torch.ones_like(stages.all_real[:, :, :1]).expand(-1, -1, case.q_len)
    n = reference.block_sums(stages.all_real[..., None].double(), case.block_k)[:, 0, :, 0]
    assert torch.equal(found.n.double(), n)
    expected = {
        "q_mean": (found.q_mean, reference.block_means(stages.q, everyone, case.block_q)),
        "k_mean": (found.k_mean, reference.block_means(stages.k, stages.all_real, case.block_k)),
        "v_bar": (found.v_bar.double(), reference.block_means(stages.v, stages.all_real, case.block_k)),
    }
    smooth_means = reference.block_means(stages.smooth_k, stages.all_real, case.block_k)
    filled = (n > 0)[:, None, :, None]  # nothing reads an empty block's mean
    expected["k_bar"] = found.k_bar.double() * filled, smooth_means * filled
    if found.center is not None:
        count = n.sum(1).clamp(min=1)[:, None, None]
        expected["center"] = found.center, (stages.k * stages.all_real[..., None]).sum(2) / count
    if found.q_scale is not None:
        largest = reference.split_blocks(stages.q, case.block_q).abs().amax((-2, -1))
        expected["q_scale"] = found.q_scale, largest / (127 if case.qk_format == "int8" else 448)
    if found.v_scale is not None:
        largest = (stages.v * stages.all_real[..., None]).abs().amax(2)
        expected["v_scale"] = found.v_scale, torch.where(largest > 0, largest / 448, 1)
    return {name: relative_error(got, want) for name, (got, want) in expected.items()}


def check_codes(stages: Stages) -> dict[str, float]:
    """What the codes stand for, against the same values, and their means, rounded by `quant/formats.py`."""
    case, codes, errors = stages.case, stages.codes, {}
    num_keys = stages.statistics.n.shape[1]
    if codes.k is not None and codes.k_scale is not None:
        assert case.qk_format is not None
        stored = codes.k.double() * codes.k_scale[..., None, None]
        keys, means = stored.split([num_keys, codes.num_stored - num_keys], 2)
        expected = quantize_dequantize(reference.split_blocks(stages.smooth_k, case.block_k), case.qk_format, (-2, -1))
        errors["k"] = relative_error(keys, expected)
        k_bar = reference.block_means(stages.smooth_k, stages.all_real, case.block_k)
        expected = quantize_dequantize(reference.split_blocks(k_bar, case.block_k), case.qk_format, (-2, -1))
        difference = (means - expected).abs().flatten()
        # Of the few codes of a small case one that is off by its step would be all of what is allowed.
        largest = difference.argmax()
        if difference[largest] <= 1.001 * codes.k_scale.max():
            difference[largest] = 0
        errors["means of k"] = (difference.norm() / expected.norm()).item()
    if codes.v is not None and codes.v_scale is not None:
        stored = torch.empty_like(codes.v, dtype=torch.float64)
        stored[..., stored_order(case.block_k, codes.v.device)] = codes.v.double() * codes.v_scale[:, :, None, :, None]
        values, means = stored.mT.split([num_keys, codes.num_stored - num_keys], 2)
        v = stages.v * stages.all_real[..., None]
        errors["v"] = relative_error(values, reference.split_blocks(quantize_dequantize(v, "fp8", (-2,)), case.block_k))
    if codes.has_means_values:
        v_bar = reference.block_means(stages.v, stages.all_real, case.block_k)
        expected = quantize_dequantize(torch.cat([v, v_bar], 2), "fp8", (-2,))[:, :, v.shape[2] :]
        errors["means of v"] = relative_error(means, reference.split_blocks(expected, case.block_k))
    return errors


def check_router(stages: Stages) -> Tensor:
    """Counts, indices and bits are those of the blocked router; returns the choice (B, H, M, T) bool."""
    case, settings, p, statistics = stages.case, stages.settings, stages.inputs, stages.statistics
    kept = empty_saved(p.q, p.k, settings)[2]
    proj_q, proj_k = (None, None) if p.router is None else p.router
    choice = triton_route(
        statistics.q_mean, statistics.k_mean, statistics.n, proj_q, proj_k, kept, case.q_len, case.kv_len, settings,
        masked=case.masked,
    )  # fmt: skip
    k_bar = reference.block_means(stages.k, stages.all_real, case.block_k)
    expected = route(stages.q, k_bar, statistics.n, proj_q, proj_k, case.kv_len, settings)
    total = k_bar.shape[2]
    mask = kept_block_mask(kept, total)
    assert torch.equal(mask, kept_block_mask(expected, total))
    assert torch.equal(kept, expected)
    block = torch.arange(total, device=kept.device)
    assert torch.equal(choice.bits[..., block // 32] >> (block % 32) & 1 == 1, mask)
    if choice.num_nonempty is not None:
        assert torch.equal(choice.num_nonempty.long(), (statistics.n > 0).sum(1))
    return mask


def check_linear_states(stages: Stages, block_mask: Tensor) -> dict[str, float]:
    """H and Z of every query block against sums over the keys it does not keep."""
    case, p, settings, statistics = stages.case, stages.inputs, stages.settings, stages.statistics
    assert statistics.center is not None
    shared_memory = 227 * 1024
    bits = words_of_mask(block_mask)
    found = linear_states(
        p.k, p.v, bits, statistics.n, statistics.center, stages.real, stages.order, settings, shared_memory
    ).states
    phi = reference.feature_map(stages.smooth_k, case.feature_map) * stages.all_real[..., None]
    phi, v = (reference.split_blocks(x, case.block_k) for x in (phi, stages.v))
    h, z = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (phi.mT @ v, phi.sum(3)))
    in_tail = (~block_mask).double()
    factor = 2.0 ** -max(0, round(math.log2(case.kv_len / case.dim)))
    state = torch.einsum("bhmt,bhtde->bhmde", in_tail, h) * factor
    normalizer = in_tail @ z * factor
    return {
        "H": relative_error(found[:, :, :-1], state.flatten(0, 1)),
        "Z": relative_error(found[:, :, -1], normalizer.flatten(0, 1)),
    }
