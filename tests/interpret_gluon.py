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

from sla2_compile.kernels import (
    gluon_attention,
    gluon_fp8_attention,
    gluon_one_pass,
    gluon_states,
    gluon_tail_sums,
    hardware,
    triton_one_pass,
)
from sla2_compile.kernels.hardware import Hardware

# Small, so that every program has several query blocks and its rings go round.
HOPPER = {64: Hardware((9, 0), 128 * 1024, 1), 128: Hardware((9, 0), 227 * 1024, 2)}
# The fetching warp is number 2, where there is one. Whoever comes first runs ahead as far as it may.
ORDERS = ((2, 0, 1), (2, 1, 0), (0, 1, 2))


MODULES = (gluon_attention, gluon_fp8_attention, gluon_one_pass, gluon_states, gluon_tail_sums)


def errors_of(name: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    case = dataclasses.replace(gluon_cases.CASES[name], dtype=dtype)
    p, errors = cases.problem(case), {}
    in_fp8 = name in gluon_cases.FP8_CASES
    sums_codes = in_fp8 and case.tail == "pooled"
    with (
        mock.patch.object(hardware, "hardware_of", return_value=HOPPER[case.dim]),
        mock.patch.object(gluon_fp8_attention, "MIN_TILES", gluon_cases.MIN_TILES),
    ):
        for order in ORDERS if case.q_len < 300 else ORDERS[:1]:
            with emulated(*MODULES, order=order) as kernels:
                errors = forward_errors(case, p, repeat=False, sums_codes=sums_codes)
            # Something is saved, and nothing, of many keys twice.
            launches = [kernels[kernel].num_launches for kernel in ("_attention_kernel", "_fp8_attention_kernel")]
            unsaved = 2 if case.kv_len > triton_one_pass.SAMPLES else 1
            assert launches == ([1, unsaved] if in_fp8 else [1 + unsaved, 0]), "the kernel was not eligible"
    return errors


if __name__ == "__main__":
    interpreter.prepare()
    print(json.dumps({name: errors_of(name, getattr(torch, sys.argv[2])) for name in json.loads(sys.argv[1])}))
