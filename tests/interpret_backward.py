"""Runs the backward's kernels in Triton's interpreter on the CPU: `python interpret_backward.py '["case", ...]' dtype`.

Needs TRITON_INTERPRET=1; `interpreter.interpret` sets it. Prints as JSON, for each case,
each gradient's error and plain PyTorch's in that dtype, both relative to float64.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import interpreter
import kernel_cases as cases
import torch

from sla2_compile.kernels import triton_backward


def errors_of(case: cases.Case) -> dict[str, dict[str, float]]:
    problem = cases.problem(case)
    saved = cases.saved_tensors(case, problem)
    arguments = cases.backward_arguments(problem, saved)
    gradients = triton_backward.backward(*arguments, case.settings)
    for got, twin in zip(gradients, cases.blocked_gradients(case, problem, saved), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (twin.shape, twin.dtype, twin.stride())
    again = triton_backward.backward(*arguments, case.settings)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
    exact = cases.reference_gradients(case, problem, saved[-1], torch.float64)
    eager = cases.reference_gradients(case, problem, saved[-1], case.dtype)
    return {
        "triton": cases.relative_errors(cases.summed(gradients), exact),
        "eager": cases.relative_errors(eager, exact),
    }


if __name__ == "__main__":
    interpreter.prepare()
    dtype = getattr(torch, sys.argv[2])
    names = json.loads(sys.argv[1])
    print(json.dumps({name: errors_of(dataclasses.replace(cases.CASES[name], dtype=dtype)) for name in names}))
