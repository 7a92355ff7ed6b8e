"""Cases for the kernels that make and sum states of key blocks on Hopper: see `states_checks.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sla2_compile.kernels.settings import Settings

DIM, BLOCK_K, BLOCK_Q = 128, 64, 128


@dataclass(frozen=True)
class Case:
    """Keys and values of some heads and which blocks query blocks keep."""

    heads: int = 2
    group: int = 1  # query heads of a key head
    batch: int = 1
    kv_len: int = 700
    q_blocks: int = 3
    dtype: torch.dtype = torch.bfloat16
    qk_format: str | None = "fp8"
    pv_format: str | None = None
    feature_map: str = "softmax"
    sparsity: float = 0.9
    spread: int = 0  # powers of two by which values of different blocks differ, up or down
    device: str = "cpu"

    @property
    def T(self) -> int:
        return -(-self.kv_len // BLOCK_K)

    def settings(self, **changes: Any) -> Settings:
        options: dict[str, Any] = {
            "scale": DIM**-0.5, "sparsity_units": 900_000, "block_q": BLOCK_Q, "block_k": BLOCK_K,
            "feature_map": self.feature_map, "qk_format": self.qk_format, "pv_format": self.pv_format, "tail": "linear",
            "mixing": "block", "token_grid": None, "exact_prefix": 0, "exact_suffix": 0,
        }  # fmt: skip
        return Settings(**(options | changes))


# For the emulator, which has two multiprocessors, so that every program has several blocks, its stretch ends in another
# head, and rings turn.
SMALL = {
    "qk fp8": Case(),
    "qk int8, pv fp8, groups, batch": Case(
        heads=2, group=2, batch=2, kv_len=64 * 11, q_blocks=70, qk_format="int8", pv_format="fp8"
    ),
    "values of many sizes": Case(heads=1, kv_len=64 * 40 + 1, spread=8, pv_format="fp8"),
    "more query blocks than a program takes": Case(heads=1, kv_len=64 * 130, q_blocks=130),
    "elu": Case(feature_map="elu"),
}
VIDEO = Case(heads=12, kv_len=32760, q_blocks=256, sparsity=0.97, device="cuda")
LARGE = {
    "480p, qk fp8": VIDEO,
    "480p, qk fp8, pv fp8": replace(VIDEO, pv_format="fp8"),
    "qk int8, groups, batch": replace(
        VIDEO, heads=3, group=2, batch=2, kv_len=64 * 300, q_blocks=70, qk_format="int8", pv_format="fp8"
    ),
    "values of many sizes": replace(VIDEO, heads=5, spread=6),
    "720p, some heads": replace(VIDEO, heads=4, kv_len=75600, q_blocks=591, pv_format="fp8"),
}
