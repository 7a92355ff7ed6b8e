"""The choice of key blocks by Hopper's kernel and by Triton's, for the emulator and for a GPU."""

from __future__ import annotations

import torch
from choose_cases import Case
from torch import Tensor

from sla2_compile.kernels import gluon_choose, triton_router
from sla2_compile.kernels.blocks import num_blocks


def choice(case: Case, *, hopper: bool) -> dict[str, Tensor]:
    """What one of the kernels writes, over numbers that it never writes."""
    scores, n = case.problem()

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, -7, dtype=torch.int32, device=case.device)

    rows = scores.shape[:3]
    kept, bits = poisoned(*rows, 1 + case.slots), poisoned(*rows, 2 * num_blocks(case.T, 64))
    num_nonempty = poisoned(case.batch)
    arguments = (scores, n, kept, bits, num_nonempty if case.masked else None, case.limits)
    if hopper:
        assert gluon_choose.choose_rows(*arguments), "the kernel was not eligible"
    else:
        triton_router.choose(*arguments)
    return {"kept": kept, "bits": bits, "num_nonempty": num_nonempty}


def differing(case: Case) -> list[str]:
    """In what the two kernels' choices differ."""
    found, expected = choice(case, hopper=True), choice(case, hopper=False)
    return [name for name, x in found.items() if not torch.equal(x, expected[name])]
