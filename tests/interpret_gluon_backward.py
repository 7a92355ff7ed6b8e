"""Runs the backward of Hopper on the CPU: `python interpret_gluon_backward.py '["case", ...]' dtype`.

As `interpret_gluon.py`, for the backward: prints what `interpret_backward.py` prints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import ExitStack
from unittest import mock

import gluon_cases
import interpreter
import kernel_cases as cases
import torch
from gluon_emulator import emulated
from interpret_gluon import HOPPER, ORDERS

from sla2_compile.kernels import (
    gluon_backward_keys,
    gluon_backward_queries,
    gluon_backward_tail,
    gluon_states,
    hardware,
    triton_backward,
)
from sla2_compile.kernels.blocks import num_blocks

MODULES = (gluon_backward_queries, gluon_backward_keys, gluon_backward_tail)


def errors_of(case: cases.Case) -> dict[str, dict[str, float]]:
    p = cases.problem(case)
    saved = cases.saved_tensors(case, p)
    arguments = cases.backward_arguments(p, saved)
    results = []
    for order in ORDERS if case.q_len < 1000 else ORDERS[:1]:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(hardware, "hardware_of", return_value=HOPPER[case.dim]))
            stack.enter_context(emulated(gluon_states, order=order))
            kernels = [stack.enter_context(emulated(module, order=order)) for module in MODULES]
            results.append(triton_backward.backward(*arguments, case.settings))
        launches = [x.num_launches for found in kernels for x in found.values()]
        pools = saved[-1].shape[3] - 1 < num_blocks(case.kv_len, 64) and (case.tail, case.mixing) != ("linear", "block")
        assert launches == [1, 1, int(pools)], "a kernel was not eligible"
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    exact = cases.reference_gradients(case, p, saved[-1], torch.float64)
    eager = cases.reference_gradients(case, p, saved[-1], case.dtype)
    return {
        "triton": cases.relative_errors(cases.summed(results[0]), exact),
        "eager": cases.relative_errors(eager, exact),
    }


if __name__ == "__main__":
    interpreter.prepare()
    dtype = getattr(torch, sys.argv[2])
    names, table = json.loads(sys.argv[1]), gluon_cases.BACKWARD_CASES
    print(json.dumps({name: errors_of(dataclasses.replace(table[name], dtype=dtype)) for name in names}))
