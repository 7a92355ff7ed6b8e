"""States of key blocks on Hopper and their sums, against float64, at a video's length."""

from __future__ import annotations

import dataclasses

import pytest
from states_cases import LARGE
from test_gluon_on_gpu import needs_hopper
from tolerances import LINEAR_STATES, LINEAR_STATES_FP8


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", LARGE)
def test_states_in_fp8_and_their_sums(name: str) -> None:
    from states_checks import check_fp8_states

    errors = check_fp8_states(LARGE[name])
    assert all(error < LINEAR_STATES_FP8[what] for what, error in errors.items()), errors


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name, feature_map", [(name, "softmax") for name in LARGE] + [("480p, qk fp8", "elu")])
def test_states_in_16_bits(name: str, feature_map: str) -> None:
    from states_checks import check_states

    case = dataclasses.replace(LARGE[name], feature_map=feature_map)
    errors = check_states(case)
    assert all(error < LINEAR_STATES[case.dtype] for error in errors.values()), errors
