"""The backward's kernels for Hopper in the emulator, against float64 autograd; no GPU is needed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from gluon_cases import BACKWARD_CASES, by_dtype
from interpreter import interpret
from test_triton_backward import INTERPRETER_FACTOR, allowed, needs_triton

import sla2_compile

# The interpreter rounds to bfloat16 towards zero, which shows where a linear tail's part is added.
IN_BFLOAT16 = ["pooled row, learned, head dim 128", "exact ends"]


@needs_triton
@by_dtype(BACKWARD_CASES, IN_BFLOAT16)
def test_in_the_emulator_gradients_of_hopper_have_no_race_and_are_those_of_float64(
    names: list[str], dtype: str
) -> None:
    for name, errors in interpret("interpret_gluon_backward.py", names, dtype).items():
        case = dataclasses.replace(BACKWARD_CASES[name], dtype=getattr(torch, dtype))
        for gradient in ("dq", "dk", "dv"):
            limit = allowed(errors["eager"][gradient], case, gradient, INTERPRETER_FACTOR)
            assert errors["triton"][gradient] <= limit, (name, gradient, errors)


ARRIVAL = "mbarrier.arrive(empty.index(slot), count=1); "
FAULTS = {
    "queries": ("            dq = warpgroup_mma_wait(0", "            " + ARRIVAL + "dq = warpgroup_mma_wait(0"),
    "keys": ("dk, dv = add_rows(", ARRIVAL + "dk, dv = add_rows("),
    "fetch": ("mbarrier.wait(empty.index(slot), phase_of(step, STAGES) ^ 1)", ""),
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("module", FAULTS)
def test_a_slot_handed_back_or_filled_too_early_is_found(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = FAULTS[module]
    shutil.copytree(Path(sla2_compile.__file__).parent, tmp_path / "sla2_compile")
    path = tmp_path / "sla2_compile" / "kernels" / f"gluon_backward_{module}.py"
    source = path.read_text()
    assert right in source
    path.write_text(source.replace(right, wrong))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match="Hazard"):
        interpret("interpret_gluon_backward.py", ["pooled row, learned, head dim 128"], "float16")


@needs_triton
def test_tokens_with_memory_of_others_between_them_are_left_to_triton_unless_no_tile_reaches_it() -> None:
    from sla2_compile.kernels.gluon_tiles import token_tiles

    memory = torch.empty(2, 256, 3, 64, dtype=torch.float16)
    padded, whole = memory[:, :130].transpose(1, 2), memory.transpose(1, 2)
    by_heads = memory.new_empty(2, 3, 256, 64)
    assert token_tiles(padded) is None
    assert token_tiles(by_heads[:, :, :130]) is None
    for x in (whole, by_heads, padded[:1], padded.contiguous(), memory[:, :128].transpose(1, 2)):
        assert token_tiles(x) is not None
