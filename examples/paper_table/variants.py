"""SLA and the sparse branch alone, out of SLA2's own operator, so that router, blocks and kernels are the same.

SLA2 gives a O_s + (1 - a) O_l. With a logit of +-40 and the mixing per block, a is 1 or 4e-18 in float32: one call
gives O_s exactly, another O_l.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.paper_table.presets import Preset
from examples.paper_table.rows import PAPER, Row
from examples.video_dit.model import Block, VideoDiT
from sla2_compile.config import SLA2Config
from sla2_compile.functional import attention

_CERTAIN = 40.0


class SparseOnly(nn.Module):
    """Softmax attention over the key blocks that the similarity of block means keeps, and nothing of the others."""

    def __init__(self, row: Row, preset: Preset) -> None:
        super().__init__()
        options: dict[str, Any] = {**row.options(preset), "tail": PAPER[0], "mixing": PAPER[1]}
        self.config = SLA2Config.from_options(options)

    def branch(self, q: Tensor, k: Tensor, v: Tensor, logit: float) -> Tensor:
        return attention(q, k, v, alpha_logit=q.new_full((q.shape[1], 1), logit).float(), config=self.config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.branch(q, k, v, _CERTAIN)


class SLA(SparseOnly):
    """SLA (arXiv 2509.24006): O_s + proj(O_l), the projection shared by the heads, learned, and 0 at first."""

    def __init__(self, row: Row, preset: Preset) -> None:
        super().__init__(row, preset)
        self.proj = nn.Parameter(torch.zeros(preset.model.head_dim, preset.model.head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        linear = self.branch(q, k, v, -_CERTAIN)
        return self.branch(q, k, v, _CERTAIN) + linear @ self.proj.to(linear.dtype).mT


def put_variant(model: VideoDiT, row: Row, preset: Preset) -> None:
    """Replace the attention of every block."""
    cls = SLA if row.kind == "sla" else SparseOnly
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.attend = cls(row, preset).to(model.cos.device)
