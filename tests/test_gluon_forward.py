"""The forward's kernel for Hopper in the emulator, against the float64 reference; no GPU is needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gluon_cases import CASES, by_dtype
from interpreter import interpret
from test_triton_forward import INTERPRETER_FACTOR, check, needs_triton

IN_BFLOAT16 = [
    "pooled, head dim 128, groups",
    "pooled, exact ends",
    "linear, head dim 128",
    "linear, qk fp8, pv fp8",
    "FP8, head dim 128, 2 of 12 kept",
]


@needs_triton
@pytest.mark.timeout(400)
@by_dtype(CASES, IN_BFLOAT16)
def test_in_the_emulator_the_forward_of_hopper_has_no_race_and_is_as_exact_as_plain_pytorch(
    names: list[str], dtype: str
) -> None:
    for name, errors in interpret("interpret_gluon.py", names, dtype).items():
        check(dataclasses.replace(CASES[name], dtype=getattr(torch, dtype)), errors, name, INTERPRETER_FACTOR)
