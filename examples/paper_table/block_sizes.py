"""Held-out loss of SLA2 without training, by the sizes of blocks: what the table's sizes were chosen by.

python -m examples.paper_table.block_sizes       # about two minutes of two CPU cores
"""

from __future__ import annotations

import dataclasses
import math

import torch
from tabulate import tabulate

from examples.paper_table.context import Context
from examples.paper_table.jobs import RowJob
from examples.paper_table.presets import FULL
from examples.paper_table.rows import Row
from examples.paper_table.storage import Storage
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.flow import held_out_loss

SIZES = ((64, 64), (64, 16), (32, 32), (32, 16), (16, 16))
ROW = Row("sla2", 0.97, trained=False)
NUM_CLIPS = 8


@torch.no_grad()
def main() -> None:
    storage = Storage(FULL.name)
    shared = Context(FULL, storage, "cpu", math.inf)
    clips = [shared.maker.make(0, NUM_CLIPS, "held_out")]
    table: list[tuple[str, float]] = [("full attention", held_out_loss(shared.teacher, clips))]
    for block_q, block_k in SIZES:
        preset = dataclasses.replace(FULL, block_q=block_q, block_k=block_k)
        model, options = RowJob(ROW).build(Context(preset, storage, "cpu", math.inf))
        compile_blocks(model, options, "aot_eager")
        table.append((f"SLA2, 97 %, {block_q} queries, {block_k} keys", held_out_loss(model, clips)))
    print(tabulate(table, ["attention, not trained", "held-out loss"], floatfmt=".4f"))


if __name__ == "__main__":
    main()
