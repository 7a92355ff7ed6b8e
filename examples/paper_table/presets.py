"""Sizes of the comparison: the one for a GPU, and two that only show that everything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from examples.video_dit.compiling import Compiler
from examples.video_dit.model import ModelConfig
from examples.video_dit.photographs import SOURCES


@dataclass(frozen=True)
class Preset:
    """Sizes of model, training and measurement.

    Args:
        name: of the preset.
        model: sizes of the transformer.
        block_q, block_k: tokens per query and key block.
        variety: of the clips; see `ClipMaker`.
        teacher_stages, teacher_steps: how often the teacher's training starts from its averaged weights, and the steps
            of a stage. A stage is what can be carried from one machine to another.
        teacher_lr: learning rate of the teacher, which falls over the last half of all stages.
        steps: fine-tuning steps of every row.
        lr: peak learning rate of fine-tuning.
        batch: clips of a step.
        shift: of the times in training and sampling; see `flow.later`.
        calibration_batches, calibration_steps: of stage 1.
        num_samples: clips that a row makes; all are compared with the teacher's of the same noise.
        sampler_steps: of the sampler.
        num_held_out: clips of the held-out loss, and of the distribution distance.
        seeds: of the rows that decide.
        compiler: how blocks are compiled.
        job_seconds: a guess at one job's time, until one has been measured.
    """

    name: str
    model: ModelConfig
    block_q: int
    block_k: int
    variety: float
    teacher_stages: int
    teacher_steps: int
    teacher_lr: float
    steps: int
    lr: float
    batch: int
    shift: float
    calibration_batches: int
    calibration_steps: int
    num_samples: int
    sampler_steps: int
    num_held_out: int
    seeds: int
    compiler: Compiler
    job_seconds: float


# 4,608 tokens in 288 key blocks of 16, of which 97 % leaves 9, 95 % leaves 14 and 90 % leaves 29: about as many as the
# paper's blocks of 64 leave of 32,760 tokens. With blocks of 64 there would be 72 of them and 2 left, and untrained
# SLA2 at 97 % loses three times as much (`block_sizes.py`). The model has 21 M parameters, 42 MB in bfloat16. A clip
# costs 0.18 TFLOP forward in its linear layers and 0.30 in dense attention, so 1.6 forward and backward, and a step of
# 8 clips 12.8: 42 ms on an H200 with AdamW. 6,000 such steps on clips of full variety gave samples with the colours and
# textures of their photographs and nothing one would recognise; hence fewer kinds of windows, more steps, and Muon,
# with which a small model needed two thirds of the steps. Stage 1 took 25 to 40 s a form there. A sparse row's step has
# 4.3 TFLOP of linear layers, 17 ms at 250 TFLOP/s, and its attention waits for the host, some 30 ms for eight calls
# forward and backward. It was 79 ms, of which the GPU works 42: blocks of 16 are slow. To sample is 96 clips times 23
# evaluations, 2 to 4 s, and compiling a row 5 s, or 1 where a rehearsal has left its code in the caches.
FULL = Preset(
    name="full",
    model=ModelConfig((16, 96, 96), (2, 4, 4), width=448, num_heads=7, num_layers=8, num_labels=len(SOURCES)),
    block_q=16,
    block_k=16,
    variety=0.5,
    teacher_stages=6,
    teacher_steps=1800,
    teacher_lr=1e-3,
    steps=300,
    lr=1e-4,
    batch=8,
    shift=3.0,
    calibration_batches=48,
    calibration_steps=200,
    num_samples=96,
    sampler_steps=12,
    num_held_out=256,
    seeds=3,
    compiler="inductor",
    job_seconds=60,
)

# The same shapes, so that all that is compiled is what `FULL` needs.
REHEARSAL = dataclasses.replace(
    FULL,
    name="rehearsal",
    teacher_stages=1,
    teacher_steps=1,
    steps=1,
    calibration_batches=2,
    calibration_steps=4,
    num_samples=16,
    sampler_steps=1,
    num_held_out=16,
    seeds=1,
    job_seconds=1,
)

TINY = Preset(
    name="tiny",
    model=ModelConfig((4, 32, 32), (2, 4, 4), width=32, num_heads=2, num_layers=1, num_labels=2),
    block_q=16,
    block_k=16,
    variety=0.5,
    teacher_stages=2,
    teacher_steps=8,
    teacher_lr=1e-2,
    steps=2,
    lr=1e-4,
    batch=1,
    shift=3.0,
    calibration_batches=2,
    calibration_steps=4,
    num_samples=3,
    sampler_steps=1,
    num_held_out=4,
    seeds=1,
    compiler="aot_eager",
    job_seconds=1,
)
