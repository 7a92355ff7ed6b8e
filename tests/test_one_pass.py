"""Codes and means by one pass over keys and values on Hopper: in the emulator, and on a GPU at a video's length."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpret
from one_pass_checks import LARGE, SMALL, errors_of
from test_gluon_on_gpu import needs_hopper
from test_triton_forward import needs_triton
from tolerances import BLOCK_STATISTICS

# Triton's interpreter rounds an fma twice, so that a quotient may miss that it is just between two codes.
INTERPRETED_CODES = 1e-4


def check(errors: dict[str, float], dtype: torch.dtype, codes: float) -> None:
    limits = dict.fromkeys(("center", "means of keys"), BLOCK_STATISTICS[torch.float32])
    limits |= {"means of values": BLOCK_STATISTICS[dtype], "codes of keys": codes, "codes of values": codes}
    assert all(error <= limits[what] for what, error in errors.items()), errors


@needs_triton
@pytest.mark.timeout(200)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_the_emulator_one_pass_writes_the_codes_that_two_do(dtype: str) -> None:
    for errors in interpret("interpret_one_pass.py", list(SMALL), dtype).values():
        check(errors, getattr(torch, dtype), INTERPRETED_CODES)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", LARGE)
def test_at_a_video_s_length_one_pass_writes_the_codes_that_two_do(name: str) -> None:
    check(errors_of(LARGE[name]), LARGE[name].dtype, 0.0)
