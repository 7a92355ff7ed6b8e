"""The choice of key blocks on Hopper, in the emulator, is that of Triton's kernel; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from choose_cases import SMALL
from interpreter import interpret
from test_triton_forward import needs_triton


@needs_triton
def test_in_the_emulator_hopper_s_kernel_chooses_what_triton_s_does() -> None:
    assert interpret("interpret_choose.py", list(SMALL)) == {name: [] for name in SMALL}


@needs_triton
@pytest.mark.parametrize("major, T, chooses", [(9, 1023, 0), (9, 1024, 1), (9, 2048, 1), (9, 2049, 0), (10, 1024, 0)])
def test_on_other_gpus_and_for_few_or_very_many_key_blocks_the_choice_is_left_to_triton_s(
    major: int, T: int, chooses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sla2_compile.kernels import gluon_choose
    from sla2_compile.kernels.blocks import num_blocks

    launched = []
    monkeypatch.setattr(gluon_choose, "capability", lambda device: (major, 0))
    monkeypatch.setattr(gluon_choose, "launch", lambda *_, **__: launched.append(1))
    scores, n = torch.empty(1, 1, 1, T, device="meta"), torch.empty(1, T, device="meta")
    kept, bits = (scores.new_empty(1, 1, 1, size, dtype=torch.int32) for size in (5, 2 * num_blocks(T, 64)))
    assert gluon_choose.choose_rows(scores, n, kept, bits, None, (0, T, 0, 1)) == bool(chooses)
    assert len(launched) == chooses
