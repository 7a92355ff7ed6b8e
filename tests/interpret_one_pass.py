"""Runs the kernels of `one_pass_checks.py` on the CPU: `python interpret_one_pass.py '["case", ...]' dtype`.

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
from one_pass_checks import SMALL, Case, errors_of

from sla2_compile.kernels import gluon_one_pass, hardware


def emulated_errors_of(case: Case) -> dict[str, float]:
    with mock.patch.object(hardware, "hardware_of", return_value=HOPPER[case.dim]), emulated(gluon_one_pass):
        return errors_of(case)


if __name__ == "__main__":
    interpreter.prepare()
    dtype = getattr(torch, sys.argv[2])
    names = json.loads(sys.argv[1])
    print(json.dumps({n: emulated_errors_of(dataclasses.replace(SMALL[n], dtype=dtype)) for n in names}))
