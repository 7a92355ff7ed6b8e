"""Frames of the rows that need no training, without all else that their jobs measure: minutes of a CPU."""

from __future__ import annotations

import torch
from tqdm import tqdm

from examples.paper_table.context import Context
from examples.paper_table.jobs import NUM_SHOWN, RowJob
from examples.paper_table.measures import psnr
from examples.paper_table.pictures import SHOWN_ROWS
from examples.paper_table.rows import Row, all_rows
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.frames import save_frames

TEACHER = Row("full", trained=False)


def make_frames(context: Context) -> list[tuple[str, float]]:
    """Save the frames of the shown rows, the teacher's first.

    A job writes the same picture, from the same noise, once it runs.

    Returns:
        Each row's title, and the PSNR of its clips against the teacher's in dB.
    """
    others = [row for row in all_rows() if not row.trained and row != TEACHER]
    jobs = [RowJob(row) for row in [TEACHER, *others]]
    clips: list[torch.Tensor] = []
    table = []
    for job in tqdm([job for job in jobs if job.name in SHOWN_ROWS], desc="rows", unit="row"):
        model, options = job.build(context)
        compile_blocks(model, options, context.preset.compiler)
        with torch.no_grad():
            clips.append(context.samples(model, NUM_SHOWN))
        save_frames(clips[-1], context.storage.results / f"{job.name}.png")
        table.append((SHOWN_ROWS[job.name], psnr(clips[-1], clips[0])))
    return table
