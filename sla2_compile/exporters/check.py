"""Run an artefact beside the model it was made from, and say how far apart they are and how long they take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sla2_compile.dry_run import without_trace
from sla2_compile.exporters.program import Inputs, Run, tensors_of, user_inputs
from sla2_compile.passes.sites import Site

# Relative L2 error that an artefact may have: another order of the same float32 operations, some roundings of 16-bit
# intermediate results, and rounding to a low-bit format that goes the other way at a tie.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LOW_BIT_TOLERANCE = 5e-3

MAX_TIMED_CALLS = 5
TIMING_BUDGET_S = 10.0


@dataclass(frozen=True)
class Check:
    """One run of an artefact.

    Args:
        input_shapes: of the tensors it was given.
        difference: relative L2 difference from the converted model in eager PyTorch, the largest of all outputs.
        difference_from_dense: the same from the model as it is: what sparsity costs on these inputs.
        seconds: median time of a call of the artefact.
        dense_seconds: the same of the model as it is, in eager PyTorch.
    """

    input_shapes: tuple[tuple[int, ...], ...]
    difference: float
    difference_from_dense: float
    seconds: float
    dense_seconds: float


def check(run: Run, converted: nn.Module, model: nn.Module, inputs: Inputs) -> Check:
    """Compare an artefact with the converted graph that it was made from and with the model."""
    with without_trace(model):
        expected = _call(converted, inputs)
        dense, dense_seconds = _timed(model, inputs)
        found, seconds = _timed(run, inputs)
    return Check(
        tuple(tuple(x.shape) for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)),
        difference=_difference(found, expected),
        difference_from_dense=_difference(found, dense),
        seconds=seconds,
        dense_seconds=dense_seconds,
    )


def default_tolerance(model: nn.Module, inputs: Inputs, sites: list[Site]) -> float:
    """The relative L2 error that an artefact of a model with these sites may have."""
    tolerance = max((TOLERANCE.get(x.dtype, 0.0) for x in tensors_of(model, inputs)), default=0.0)
    return max(tolerance, LOW_BIT_TOLERANCE if any(site.formats for site in sites) else 0.0)


def at_another_length(inputs: Inputs, program: ExportedProgram) -> Inputs:
    """Example inputs whose every dynamic size is another one: the shortest allowed, or a longer one.

    Where a tensor grows, its values are drawn anew with its mean and deviation, or repeated if they are no floats.
    """
    nodes = (node for node in user_inputs(program) if isinstance(node.meta["val"], Tensor))
    sizes = _other_sizes(program)
    generator = torch.Generator().manual_seed(0)

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        traced = next(nodes).meta["val"].shape
        shape = [size if isinstance(size, int) else int(size.node.expr.xreplace(sizes)) for size in traced]
        if list(x.shape) == shape:
            return x
        if x.is_floating_point() and any(new > old for new, old in zip(shape, x.shape, strict=True)):
            noise = torch.randn(shape, generator=generator).to(x)
            return noise * x.std().nan_to_num() + x.mean()
        for dim, size in enumerate(shape):
            x = x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
        return x

    args, kwargs = pytree.tree_map(resize, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs, inputs.dynamic_shapes)


def _other_sizes(program: ExportedProgram) -> dict[Any, int]:
    """Another number for every symbol of the inputs' sizes."""
    others = {}
    for node in user_inputs(program):
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, int):
                continue
            for symbol in size.node.expr.free_symbols:
                traced_with = int(size.node.shape_env.backed_var_to_val[symbol])
                bounds = size.node.shape_env.bound_sympy(symbol)
                shortest = int(bounds.lower)
                longer = min(traced_with * 3 // 2 + 1, int(bounds.upper) if bounds.upper.is_Integer else 1 << 62)
                others[symbol] = longer if shortest == traced_with else shortest
    return others


def _call(function: Run, inputs: Inputs) -> list[Tensor]:
    out = function(*inputs.args, **inputs.kwargs)
    return [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]


def _timed(function: Run, inputs: Inputs) -> tuple[list[Tensor], float]:
    """The outputs of a function, and the median time of a call after the first."""
    out = _call(function, inputs)
    seconds: list[float] = []
    while len(seconds) < MAX_TIMED_CALLS and sum(seconds) < TIMING_BUDGET_S:
        _synchronize(out)
        begin = time.perf_counter()
        out = _call(function, inputs)
        _synchronize(out)
        seconds.append(time.perf_counter() - begin)
    return out, median(seconds)


def _synchronize(tensors: list[Tensor]) -> None:
    if any(x.device.type == "cuda" for x in tensors):
        torch.cuda.synchronize()


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 difference of an output; infinite where their shapes differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    # Stacked, since Python's max may lose a NaN.
    differences = [_relative(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return torch.stack(differences).max().item() if differences else 0.0


def _relative(x: Tensor, expected: Tensor) -> Tensor:
    norm = expected.norm()
    return ((x - expected).norm() / torch.where(norm > 0, norm, 1.0)).cpu()
