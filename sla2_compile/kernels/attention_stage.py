"""What the last stage of the forward takes and gives: the attention kernels share it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sla2_compile.kernels.triton_low_bit import Codes
from sla2_compile.kernels.triton_statistics import Statistics


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor  # (B, H, N, D), last stride 1
    k: Tensor  # (B, G, N_kv, D), last stride 1
    v: Tensor  # (B, G, N_kv, D), last stride 1
    kept: Tensor  # (B, H, M, 1 + slots) int32
    bits: Tensor  # (B, H, M, W) int32, the same as a bit mask
    num_nonempty: Tensor | None  # (B,) int32 key blocks with a real key; None: all have one
    statistics: Statistics
    codes: Codes
    states: Tensor | None  # (B H, M, D + 1, D) H and below it Z in the inputs' dtype, for a linear tail
    alpha_logit: Tensor | None  # (H, M) float32 or None for 0
    alpha_gain: Tensor | None  # (H,) float32 or None for 1; row mixing only
    real: Tensor | None  # (B, N_kv) bool or None where all keys are real
    order: Tensor | None  # (N,) int32 visiting order or None

    @property
    def has_tail(self) -> bool:
        """Whether a query block without exact tokens leaves any key block out."""
        return self.kept.shape[3] - 1 < self.statistics.n.shape[1]


@dataclass(frozen=True)
class Outputs:
    out: Tensor  # (B, H, N, D)
    sparse_out: Tensor | None  # (B, H, N, D) with out's strides, None where no gradient is needed
    sparse_lse: Tensor  # (B, H, N) float32, 0 where no gradient is needed
    tail_lse: Tensor  # (B, H, N) float32, likewise
