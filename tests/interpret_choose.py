"""Runs the kernels of `choose_checks.py` on the CPU: `python interpret_choose.py '["case", ...]'`.

Hopper's runs in the emulator, Triton's in its interpreter; see `interpret_gluon.py`. Prints as JSON, for each case, in
what their choices differ.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import interpreter
from choose_cases import SMALL
from choose_checks import differing
from gluon_emulator import emulated

from sla2_compile.kernels import gluon_choose

if __name__ == "__main__":
    interpreter.prepare()
    on_hopper = mock.patch.object(gluon_choose, "capability", return_value=(9, 0))
    with_few = mock.patch.object(gluon_choose, "MIN_KEY_BLOCKS", 1)
    with on_hopper, with_few, emulated(gluon_choose):
        answers = {name: differing(SMALL[name]) for name in json.loads(sys.argv[1])}
    print(json.dumps(answers))
