"""Runs the forward's kernels in Triton's interpreter on the CPU: `python interpret_forward.py '["case", ...]' dtype`.

Needs TRITON_INTERPRET=1; `interpreter.interpret` sets it. Prints as JSON, for each case, the
errors of the stages and of the whole forward. What must agree exactly is asserted here.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import interpreter
import kernel_cases as cases
import stage_checks
import torch
from forward_checks import forward_errors


def errors_of(case: cases.Case) -> dict[str, dict[str, float]]:
    p = cases.problem(case)
    if case.token_grid is not None:
        stage_checks.check_order(case)
    stages = stage_checks.Stages(case, p)
    block_mask = stage_checks.check_router(stages)
    errors = {"statistics": stage_checks.check_statistics(stages), "codes": stage_checks.check_codes(stages)}
    if case.tail == "linear":
        errors["states"] = stage_checks.check_linear_states(stages, block_mask)
    return {**errors, **forward_errors(case, p, repeat=False)}


if __name__ == "__main__":
    interpreter.prepare()
    everything = {**cases.CASES, **cases.FORWARD_CASES}
    dtype = getattr(torch, sys.argv[2])
    names = json.loads(sys.argv[1])
    print(json.dumps({name: errors_of(dataclasses.replace(everything[name], dtype=dtype)) for name in names}))
