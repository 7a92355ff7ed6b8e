"""The pictures of the page: frames side by side, and the curves of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What is shown, of those that exist: results by name, and what to call them.
SHOWN_ROWS = {
    "full-untrained-s0": "the teacher, full attention",
    "full-s0": "full attention, fine-tuned",
    "sla2-linear-block-97-qat-s0": "SLA2, 97 %, low bit",
    "sla2-pooled-row-97-qat-s0": "SLA2, 97 %, low bit, pooled tail",
    "sla-97-s0": "SLA, 97 %",
    "sparse-97-s0": "sparse only, 97 %",
    "sla2-pooled-row-90-untrained-s0": "SLA2 default, 90 %, not trained",
    "sla2-pooled-row-95-untrained-s0": "SLA2 default, 95 %, not trained",
    "sla2-pooled-row-97-untrained-s0": "SLA2 default, 97 %, not trained",
    "sparse-97-untrained-s0": "sparse only, 97 %, not trained",
}


def draw_frames(folder: Path, docs: Path) -> str | None:
    """Frames of the shown rows, from the same noise; the picture's name, or None where there is nothing to show."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    names = [name for name in SHOWN_ROWS if (folder / f"{name}.png").exists()]
    if not names:
        return None
    columns = 2
    rows = -(-len(names) // columns)
    # About a pixel for each of a frame's.
    figure = Figure(figsize=(9, 3.6 * rows), dpi=90, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for name, axes in zip(names, grid.flat, strict=False):
        axes.imshow(imread(folder / f"{name}.png"))
        axes.set_title(SHOWN_ROWS[name], fontsize=9)
    figure.savefig(docs / "paper_table_frames.png")
    return "paper_table_frames.png"


def draw_curves(results: dict[str, dict[str, Any]], docs: Path) -> str | None:
    """Training losses of the teacher and of the shown rows; the picture's name, or None."""
    from matplotlib.figure import Figure

    stages = [results[name] for name in sorted(results) if name.startswith("teacher-")]
    rows = [name for name in SHOWN_ROWS if results.get(name, {}).get("losses")]
    if not stages:
        return None
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    start = 0
    for stage in stages:
        steps, losses = zip(*stage["losses"], strict=True)
        left.plot([start + step for step in steps], losses, color="tab:blue")
        start += steps[-1] + 1
    left.set(title="teacher, all stages", xlabel="step", ylabel="training loss", yscale="log")
    for name in rows:
        right.plot(*zip(*results[name]["losses"], strict=True), label=SHOWN_ROWS[name])
    right.set(title="fine-tuning", xlabel="step")
    if rows:
        right.legend(fontsize=7)
    figure.savefig(docs / "paper_table_curves.png")
    return "paper_table_curves.png"
