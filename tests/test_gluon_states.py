"""States of key blocks and their sums on Hopper, in the emulator, against float64; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from states_cases import SMALL
from test_triton_forward import needs_triton
from tolerances import LINEAR_STATES, LINEAR_STATES_FP8


@needs_triton
@pytest.mark.timeout(200)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_the_emulator_states_and_their_sums_have_no_race_and_are_those_of_float64(dtype: str) -> None:
    limits = LINEAR_STATES_FP8 | dict.fromkeys(("16 bit: h", "16 bit: z"), LINEAR_STATES[getattr(torch, dtype)])
    for name, errors in interpret("interpret_states.py", list(SMALL), dtype).items():
        assert all(error < limits[what] for what, error in errors.items()), (name, errors)
