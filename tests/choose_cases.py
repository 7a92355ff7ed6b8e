"""Cases for the kernels that choose key blocks: see `choose_checks.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("normal", "ties", "equal", "infinite", "masked", "exact", "exact, masked")


@dataclass(frozen=True)
class Case:
    """Query blocks (B, H, M) of which each chooses some of T key blocks."""

    kind: str
    T: int
    slots: int
    heads: int = 2
    rows: int = 3
    device: str = "cpu"

    @property
    def batch(self) -> int:
        """Elements differ in their masks alone."""
        return 2 if self.masked else 1

    @property
    def masked(self) -> bool:
        return "masked" in self.kind

    @property
    def limits(self) -> tuple[int, int, int, int]:
        """First and last of the key blocks, and of the query blocks, between which none is exact."""
        return (1, self.T - 1, 1, self.rows - 1) if "exact" in self.kind else (0, self.T, 0, self.rows)

    def problem(self) -> tuple[Tensor, Tensor]:
        """Scores (B, H, M, T), and real tokens (B, T) of each key block."""
        options: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        scores = torch.randn(self.batch, self.heads, self.rows, self.T, **options)
        n = torch.full((self.batch, self.T), 64.0, device=self.device)
        if self.kind == "ties":
            scores = (2 * scores).round()
        elif self.kind == "equal":
            scores *= 0
        elif self.kind == "infinite":
            scores[torch.rand(scores.shape, **options) < 0.5] = -torch.inf
            scores[0, 0, 0, :3] = torch.inf
        if self.masked:
            n[torch.rand(n.shape, **options) < 0.5] = 0
            # Not all are empty; of the exact ones the last is.
            n[:, 0], n[:, -1] = 1, 0
        return scores, n


def cases_of(T: int, *slots: int, **options: Any) -> list[Case]:
    """Of every kind with each number of slots, which is at least that of exact key blocks."""
    return [
        Case(kind, T, x, **options)
        for kind in KINDS
        for x in sorted({max(x, 2 if "exact" in kind else 1) for x in slots})
    ]


def _by_name(cases: list[Case]) -> dict[str, Case]:
    return {f"{case.kind}, {case.slots} of {case.T}": case for case in cases}


# For the emulator, with blocks in one word of two, in four, in four and one of two more, in 32 and five of eight more.
SMALL = _by_name([*cases_of(20, 1, 19, 20), *cases_of(128, 4), *cases_of(130, 129), *cases_of(1182, 39)])
# For a GPU: 32 words, with eight or sixteen more, 64 words.
LARGE = _by_name(
    [case for T in (1024, 1182, 1300, 2000) for case in cases_of(T, T // 30, T - 1, device="cuda", heads=3, rows=40)]
)
