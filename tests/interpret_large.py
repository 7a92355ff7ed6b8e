"""Runs kernels on inputs whose storage is larger than 2^31 elements: `python interpret_large.py '["case", ...]' dtype`.

Tokens or heads lie far apart in memory that nobody else touches, which costs nothing. Triton's kernels run in its
interpreter, Hopper's in the emulator; needs TRITON_INTERPRET=1. Prints as JSON, for each case, the numbers of those
results that differ from the ones for ordinary storage: none, unless an offset wraps.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import sys
from contextlib import ExitStack
from unittest import mock

import gluon_cases
import interpreter
import kernel_cases as cases
import torch
from gluon_emulator import emulated
from interpret_gluon import HOPPER
from interpret_gluon_backward import MODULES
from torch import Tensor

from sla2_compile.kernels import (
    cuda_forward,
    gluon_attention,
    gluon_states,
    gluon_tail_sums,
    hardware,
    triton_backward,
)

TABLES = {
    "triton": {**cases.CASES, **cases.FORWARD_CASES},
    "hopper": gluon_cases.CASES,
    "hopper backward": gluon_cases.BACKWARD_CASES,
}


def far_apart(x: Tensor, dim: int) -> Tensor:
    """`x` (1, H, N, D) with such strides that the last head (dim 1) or token (2) lies behind 2^31 elements."""
    heads, depth = x.shape[1], x.shape[3]
    # A multiple of a row, so that the whole is a matrix to the copy engine.
    step = -(-(2**31) // (x.shape[dim] - 1) // 1024) * 1024
    strides = (0, depth, step, 1) if dim == 2 else (0, step, depth, 1)
    size = max(n * stride for n, stride in zip(x.shape, strides, strict=True)) + heads * depth
    memory = mmap.mmap(-1, size * x.element_size())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def results(case: cases.Case, table: str, dim: int | None) -> list[Tensor]:
    """Of the forward and, for what has a backward, of that; `dim`: along which inputs are far apart."""
    p = cases.problem(case)
    saved = cases.saved_tensors(case, p)
    if dim is not None:
        moved = {name: far_apart(getattr(p, name), dim) for name in ("q", "k", "v", "grad_out")}
        p = dataclasses.replace(p, **moved)
    with ExitStack() as stack:
        if table != "triton":
            stack.enter_context(mock.patch.object(hardware, "hardware_of", return_value=HOPPER[case.dim]))
            kernels = stack.enter_context(emulated(gluon_attention, gluon_states, gluon_tail_sums, *MODULES))
        found = []
        if table != "hopper backward":
            found += cuda_forward.forward(*p.forward_arguments, True, case.settings)
        if table != "hopper" and not case.settings.is_low_bit:
            found += triton_backward.backward(*cases.backward_arguments(p, saved), case.settings)
        if table != "triton":
            assert any(kernel.num_launches for kernel in kernels.values()), "no kernel for Hopper was eligible"
    return found


def differing(case: cases.Case, table: str) -> dict[str, list[int]]:
    case = dataclasses.replace(case, batch=1, heads=2, kv_heads=2)
    if table != "triton" and case.token_grid is None:
        # Whole query blocks: tiles that reach past a head's end, where heads lie apart, are left to Triton.
        case = dataclasses.replace(case, q_len=256, kv_len=256)
    ordinary = results(case, table, None)
    return {
        name: [
            i for i, (x, y) in enumerate(zip(ordinary, results(case, table, dim), strict=True)) if not torch.equal(x, y)
        ]
        for name, dim in (("tokens", 2), ("heads", 1))
        if name == "tokens" or table == "triton" or case.token_grid is None
    }


if __name__ == "__main__":
    interpreter.prepare()
    dtype = getattr(torch, sys.argv[2])
    answers = {}
    for name in json.loads(sys.argv[1]):
        table, _, case = name.partition(": ")
        answers[name] = differing(dataclasses.replace(TABLES[table][case], dtype=dtype), table)
    print(json.dumps(answers))
