"""Hopper's choice of key blocks in the emulator beside Triton's in its interpreter: `python interpret_choose.py`.

Needs TRITON_INTERPRET=1. Prints what differs, and how many cases do.
"""

from __future__ import annotations

from unittest import mock

import interpreter
import torch
from gluon_emulator import emulated
from torch import Tensor

from sla2_compile.kernels import gluon_choose, hardware, triton_router
from sla2_compile.kernels.hardware import Hardware

KINDS = ("normal", "ties", "equal", "infinite", "masked", "exact")
BATCH, HEADS, ROWS = 2, 2, 3


def problem(kind: str, T: int) -> tuple[Tensor, Tensor]:
    """Scores and real tokens of each key block."""
    scores, n = torch.randn(BATCH, HEADS, ROWS, T), torch.full((BATCH, T), 64.0)
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "equal":
        scores = scores * 0
    elif kind == "infinite":
        scores[torch.rand_like(scores) < 0.5] = float("-inf")
        scores[0, 0, 0, :3] = float("inf")
    elif kind == "masked":
        n = torch.where(torch.rand_like(n) < 0.5, 0.0, n)
        n[:, 0] = 1
    return scores, n


def choices(kind: str, T: int, slots: int) -> list[list[Tensor]]:
    scores, n = problem(kind, T)
    words = 2 * -(-T // 64)
    limits = (1, T - 1, 1, ROWS) if kind == "exact" else (0, T, 0, ROWS)
    found = []
    for fast in (False, True):
        outputs = [torch.full((BATCH, HEADS, ROWS, size), -7, dtype=torch.int32) for size in (1 + slots, words)] + [
            torch.full((BATCH,), -7, dtype=torch.int32)
        ]
        of_op = (*outputs[:2], outputs[2] if kind == "masked" else None)
        if fast:
            hopper = mock.patch.object(hardware, "hardware_of", return_value=Hardware((9, 0), 227 * 1024, 2))
            with hopper, emulated(gluon_choose):
                assert gluon_choose.choose_rows(scores, n, *of_op, limits)
        else:
            blocks = max(64, triton_router.next_power_of_two(T))
            triton_router._choose_kernel[(BATCH * HEADS * ROWS,)](
                scores, n, *of_op, HEADS, ROWS, T, slots, words, *limits, BLOCK_T=blocks,
                SLOTS=triton_router.next_power_of_two(slots),
            )  # fmt: skip
        found.append(outputs)
    return found


if __name__ == "__main__":
    interpreter.prepare()
    torch.manual_seed(0)
    num_differing = 0
    for T in (1, 5, 31, 32, 33, 64, 70, 100, 130, 300, 512, 1182, 1300, 2040):
        for kind in KINDS:
            for slots in sorted({1, max(1, T // 30), max(1, T // 2), max(1, T - 1)}):
                if kind == "exact" and slots < min(T, 2):
                    continue
                differ = [not torch.equal(x, y) for x, y in zip(*choices(kind, T, slots), strict=True)]
                if any(differ):
                    print(T, kind, slots, differ)
                    num_differing += 1
    print(num_differing, "differ")
