"""Which probabilities the backward of a low-bit forward should recompute: from the 16-bit q and k, or the rounded ones.

The first is what the paper does (Algorithm 3) and what the op does. The second is plain differentiation through the
rounding (straight-through), which autograd gives over the reference. Both are held against two truths, the gradient of
the same attention without formats and finite differences of the rounded output's expectation, over inputs that jitter
by about a code; and both train projections to a dense attention's output. Runs on a CPU in some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from sla2_compile.config import SLA2Config
from sla2_compile.functional import attention
from sla2_compile.kernels import reference

Backward = Literal["16-bit", "low-bit"]

FORMATS: tuple[dict[str, Any], ...] = (
    {"qk_format": "int8"},
    {"qk_format": "int8", "pv_format": "fp8"},
    {"qk_format": "fp8", "pv_format": "fp8"},
)
FORMS: tuple[dict[str, Any], ...] = ({"tail": "pooled", "mixing": "row"}, {"tail": "linear", "mixing": "block"})
SETTINGS: dict[str, Any] = {"sparsity": 0.6, "block_q": 64, "block_k": 32}
# Of inputs of size 1: about the distance of two codes, which for INT8 is a share of the block's largest value.
JITTER = {"int8": 0.02, "fp8": 0.06}
STEP = 0.05


def attend(qkv: list[Tensor], config: SLA2Config, backward: Backward, mask: Tensor | None = None) -> Tensor:
    q, k, v = qkv
    if backward == "16-bit":
        return attention(q, k, v, config=config)
    return reference.attention(q, k, v, config=config, block_mask=mask)


# Gradients


def directional_errors(config: SLA2Config, score_size: float, num_directions: int, num_jitters: int) -> list[float]:
    """Relative errors of both backwards, against the gradient without formats, then against the expectation's."""
    generator, shape = torch.Generator().manual_seed(0), (1, 1, 256, 32)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = (score_size, 1.0, 1.0)
    inputs = [size * normal() for size in sizes]
    mask = reference.block_mask(inputs[0], inputs[1], config=config)
    exact = dataclasses.replace(config, qk_format=None, pv_format=None)
    grad, jitter, rows = normal(), JITTER[config.qk_format or "int8"], []
    for i in range(num_directions):
        which, direction = i % 3, normal()
        totals = torch.zeros(4, dtype=torch.float64)
        for _ in range(num_jitters):
            moved = [x + jitter * size * normal() for x, size in zip(inputs, sizes, strict=True)]

            def value(shift: float, at: list[Tensor] = moved, which: int = which, along: Tensor = direction) -> float:
                ends = [x + shift * along if j == which else x for j, x in enumerate(at)]
                return (attend(ends, config, "low-bit", mask) * grad).sum().item()

            def slope(
                config: SLA2Config,
                backward: Backward,
                at: list[Tensor] = moved,
                which: int = which,
                along: Tensor = direction,
            ) -> float:
                leaves = [x.detach().requires_grad_() for x in at]
                (found,) = torch.autograd.grad(attend(leaves, config, backward, mask), (leaves[which],), grad)
                return (found * along).sum().item()

            step = STEP * sizes[which]
            difference = (value(step) - value(-step)) / (2 * step)
            without = slope(exact, "low-bit")
            totals += torch.tensor([slope(config, "16-bit"), slope(config, "low-bit"), without, difference])
        rows.append(totals / num_jitters)
    sixteen, low, without_formats, expected = torch.stack(rows).T
    pairs = itertools.product((without_formats, expected), (sixteen, low))
    return [((x - truth).norm() / truth.norm()).item() for truth, x in pairs]


# Training


def trained_error(config: SLA2Config, gain: float, backward: Backward, seed: int, num_steps: int = 150) -> float:
    """Relative squared error to dense attention, of the last steps, after training projections that were disturbed."""
    torch.manual_seed(seed)
    width, heads, num_tokens = 64, 2, 256
    wanted = [torch.randn(width, width) / width**0.5 * size for size in (gain, gain, 1.0)]
    trained = [(w + 0.3 * torch.randn(width, width) / width**0.5).requires_grad_() for w in wanted]
    optimizer = torch.optim.Adam(trained, 3e-3)

    def project(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [(x @ w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in weights]

    losses = []
    for step in range(num_steps):
        x = torch.randn(2, num_tokens, width)
        with torch.no_grad():
            q, k, v = project(x, wanted)
            target = F.scaled_dot_product_attention(q, k, v)
        loss = (attend(project(x, trained), config, backward) - target).square().mean() / target.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / num_steps)
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=24, help="random directions per row (default: 24)")
    parser.add_argument("--jitters", type=int, default=32, help="jittered inputs per direction (default: 32)")
    parser.add_argument("--seeds", type=int, default=3, help="training runs per row (default: 3)")
    args = parser.parse_args()
    table = []
    for formats, form, score_size in itertools.product(FORMATS, FORMS, (1.0, 4.0)):
        config = SLA2Config(**SETTINGS, **formats, **form)
        errors = directional_errors(config, score_size, args.directions, args.jitters)
        table.append([_name(config), f"{config.tail}, {config.mixing}", score_size, *(f"{x:.3f}" for x in errors)])
    headers = ["QK, PV", "form", "size of scores"]
    headers += [f"{how} against {truth}" for truth in ("no formats", "expectation") for how in ("16-bit", "low-bit")]
    print(tabulate(table, headers, disable_numparse=True), flush=True)
    table = []
    for formats, gain in itertools.product(({}, *FORMATS[1:]), (1.5, 2.5)):
        config = SLA2Config(**SETTINGS, **formats)
        errors = [
            sum(trained_error(config, gain, backward, seed) for seed in range(args.seeds)) / args.seeds
            for backward in ("16-bit", "low-bit")
        ]
        table.append([_name(config), gain, *(f"{x:.4f}" for x in errors)])
    print("\nrelative squared error after training:")
    print(tabulate(table, ["QK, PV", "gain of q and k", "16-bit", "low-bit"], disable_numparse=True))


def _name(config: SLA2Config) -> str:
    return f"{config.qk_format or '16 bit'}, {config.pv_format or '16 bit'}"


if __name__ == "__main__":
    main()
