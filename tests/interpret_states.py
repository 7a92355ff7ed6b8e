"""Runs the kernels of `states_checks.py` on the CPU: `python interpret_states.py '["case", ...]' dtype`.

Hopper's run in the emulator, Triton's in its interpreter; see `interpret_gluon.py`. Prints as JSON the errors of each
case.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from unittest import mock

import interpreter
import torch
from gluon_emulator import emulated
from interpret_gluon import HOPPER
from states_cases import DIM, SMALL, Case
from states_checks import check_fp8_states, check_states

from sla2_compile.kernels import gluon_states, gluon_tail_sums, hardware


def errors_of(case: Case) -> dict[str, float]:
    hopper = mock.patch.object(hardware, "hardware_of", return_value=HOPPER[DIM])
    with hopper, emulated(gluon_states, gluon_tail_sums):
        errors = {f"16 bit: {name}": error for name, error in check_states(case).items()}
        if case.feature_map == "softmax":
            errors |= check_fp8_states(case)
    return errors


if __name__ == "__main__":
    interpreter.prepare()
    dtype = getattr(torch, sys.argv[2])
    names = json.loads(sys.argv[1])
    print(json.dumps({n: errors_of(dataclasses.replace(SMALL[n], dtype=dtype)) for n in names}))
