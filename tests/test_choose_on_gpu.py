"""The choice of key blocks on Hopper is that of Triton's kernel, at a video's length."""

from __future__ import annotations

import pytest
import torch
from choose_cases import LARGE
from test_gluon_on_gpu import needs_hopper


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("name", LARGE)
def test_hopper_s_kernel_chooses_what_triton_s_does_in_every_run(name: str) -> None:
    from choose_checks import choice, differing

    assert not differing(LARGE[name])
    first, second = (choice(LARGE[name], hopper=True) for _ in range(2))
    assert all(torch.equal(x, second[what]) for what, x in first.items())
