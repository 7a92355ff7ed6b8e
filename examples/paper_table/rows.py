"""Every row of the table: what takes the place of attention, and whether it is trained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from examples.paper_table.presets import Preset
from sla2_compile.config import Mixing, PVFormat, QKFormat, Tail

Kind = Literal["full", "sla2", "sla", "sparse"]
Form = tuple[Tail, Mixing]

PAPER: Form = ("linear", "block")
DEFAULT: Form = ("pooled", "row")
FORMS: tuple[Form, ...] = (PAPER, ("linear", "row"), ("pooled", "block"), DEFAULT)

SPARSITIES = (0.9, 0.95, 0.97)
# The paper's: INT8 for Q K^T, FP8 for P V.
QK_FORMAT: QKFormat = "int8"
PV_FORMAT: PVFormat = "fp8"


@dataclass(frozen=True)
class Row:
    """One way to attend, and to train.

    Args:
        kind: full attention; SLA2; SLA, O_s + proj(O_l); or the sparse branch alone.
        sparsity: fraction of key blocks that skip the sparse branch.
        form: tail and mixing of SLA2.
        router: learned in stage 1, or the similarity of block means.
        low_bit: the forward is rounded to INT8 and FP8, in training too.
        trained: fine-tuned; otherwise the teacher's weights as they are.
        tiles: tokens are visited in tiles of 4 x 4 x 4, otherwise in the model's order.
        decides: it answers one of the paper's claims, so it is run with several seeds.
    """

    kind: Kind
    sparsity: float = 0.0
    form: Form = DEFAULT
    router: Literal["learned", "means"] = "means"
    low_bit: bool = False
    trained: bool = True
    tiles: bool = True
    decides: bool = False

    @property
    def name(self) -> str:
        """Of its results, without the seed."""
        parts: list[str] = [self.kind]
        if self.kind == "sla2":
            parts += self.form
            parts += ["means"] if self.router == "means" and self.trained else []
        if self.kind != "full":
            parts.append(f"{100 * self.sparsity:g}")
        parts += ["qat"] if self.low_bit else []
        parts += [] if self.trained else ["untrained"]
        parts += [] if self.tiles else ["raster"]
        return "-".join(parts)

    @property
    def measures_quantised(self) -> bool:
        """Whether it is also measured after quantising what was trained without."""
        return self.kind == "sla2" and self.trained and not self.low_bit and self.form in (PAPER, DEFAULT)

    def options(self, preset: Preset) -> dict[str, Any]:
        """Options of the backend."""
        return {
            "sparsity": self.sparsity,
            "block_q": preset.block_q,
            "block_k": preset.block_k,
            "tail": self.form[0],
            "mixing": self.form[1],
            "token_grid": preset.model.grid if self.tiles else None,
            "infer_layout": False,
            "min_seq_len": 0,
            # A row must not run dense by mistake.
            "strict": True,
        }


def all_rows() -> list[Row]:
    """In the order in which they are worth having."""
    learned = [
        Row("sla2", sparsity, form, "learned", low_bit=low_bit, decides=form == PAPER or (low_bit and sparsity == 0.97))
        for sparsity, form, low_bit in itertools.product((0.97, 0.95), (PAPER, DEFAULT), (True, False))
    ]
    other_forms = [Row("sla2", sparsity, form, "learned") for sparsity in (0.97, 0.95) for form in FORMS[1:3]]
    kinds: tuple[Kind, ...] = ("sla2", "sparse")
    untrained = [
        Row(kind, sparsity, trained=False, tiles=tiles)
        for kind, sparsity, tiles in itertools.product(kinds, SPARSITIES, (True, False))
    ]
    return [
        Row("full", trained=False),
        Row("full", decides=True),
        *learned,
        Row("sla", 0.95, decides=True),
        Row("sparse", 0.95, decides=True),
        Row("sla2", 0.95, PAPER, "means", low_bit=True, decides=True),
        Row("sla2", 0.97, PAPER, "means", low_bit=True, decides=True),
        Row("sla", 0.97),
        Row("sparse", 0.97),
        Row("sla2", 0.9, PAPER, "learned", low_bit=True),
        Row("sla2", 0.9, DEFAULT, "learned", low_bit=True),
        *untrained,
        *other_forms,
    ]
