"""Runs the forward of Hopper on the CPU: `python interpret_gluon.py '["case", ...]' dtype`.

What Triton compiles runs in its interpreter, what is Gluon's in the emulator, where races and deadlocks are
errors. Needs TRITON_INTERPRET=1; `interpreter.interpret` sets it. Prints as JSON, for each case, the errors of the
forward; see `forward_checks.py`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from unittest import mock

import gluon_cases
import interpreter
import kernel_cases as cases
import torch
from forward_checks import forward_errors
from gluon_emulator import emulated

from sla2_compile.kernels import gluon_attention, gluon_states, gluon_tail_sums, hardware
from sla2_compile.kernels.hardware import Hardware

# Small, so that every program has several query blocks and its rings go round.
HOPPER = {64: Hardware((9, 0), 128 * 1024, 1), 128: Hardware((9, 0), 227 * 1024, 2)}
# The fetching warp is number 2. Whoever comes first runs ahead as far as it may.
ORDERS = ((2, 0, 1), (2, 1, 0), (0, 1, 2))


def errors_of(case: cases.Case) -> dict[str, dict[str, float]]:
    p, errors = cases.problem(case), {}
    with mock.patch.object(hardware, "hardware_of", return_value=HOPPER[case.dim]):
        for order in ORDERS if case.q_len < 300 else ORDERS[:1]:
            with emulated(gluon_attention, gluon_states, gluon_tail_sums, order=order) as kernels:
                errors = forward_errors(case, p, repeat=False)
            assert kernels["_attention_kernel"].num_launches == 2, "the kernel was not eligible"
    return errors


if __name__ == "__main__":
    interpreter.prepare()
    dtype = getattr(torch, sys.argv[2])
    names = json.loads(sys.argv[1])
    print(json.dumps({n: errors_of(dataclasses.replace(gluon_cases.CASES[n], dtype=dtype)) for n in names}))
