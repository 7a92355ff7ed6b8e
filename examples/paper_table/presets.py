"""Sizes of the comparison: the one for a GPU, and one that only shows that everything runs."""

from __future__ import annotations

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
        teacher_stages, teacher_steps: how often the teacher's training starts from its averaged weights, and the steps
            of a stage. A stage is what can be carried from one machine to another.
        teacher_lr: learning rate of the teacher, which falls over the last half of all stages.
        steps: fine-tuning steps of every row.
        lr: peak learning rate of fine-tuning.
        batch: clips of a step.
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
    teacher_stages: int
    teacher_steps: int
    teacher_lr: float
    steps: int
    lr: float
    batch: int
    calibration_batches: int
    calibration_steps: int
    num_samples: int
    sampler_steps: int
    num_held_out: int
    seeds: int
    compiler: Compiler
    job_seconds: float


# 6,144 tokens: 96 key blocks of 64, of which 97 % leaves 3, 95 % leaves 5 and 90 % leaves 10. The model has 21 M
# parameters, 42 MB in bfloat16. A clip costs 0.24 TFLOP forward in its linear layers and 0.54 in dense attention, so
# 2.6 forward and backward; an 8-layer model of like sizes reached 335 TFLOP/s dense on an H200, compiled as here. At
# 300, a teacher step of 16 clips takes 0.14 s, and with what is not a matmul about 0.16: a stage is two and a half
# minutes, all six are under 17. A row is 400 steps of at most that, a minute of compilation and a quarter of a minute
# to sample and measure. None of this has been measured yet.
FULL = Preset(
    name="full",
    model=ModelConfig((16, 96, 128), (2, 4, 4), width=448, num_heads=7, num_layers=8, num_labels=len(SOURCES)),
    block_q=128,
    block_k=64,
    teacher_stages=6,
    teacher_steps=900,
    teacher_lr=5e-4,
    steps=400,
    lr=1e-4,
    batch=16,
    calibration_batches=24,
    calibration_steps=300,
    num_samples=128,
    sampler_steps=16,
    num_held_out=256,
    seeds=3,
    compiler="inductor",
    job_seconds=200,
)

TINY = Preset(
    name="tiny",
    model=ModelConfig((4, 32, 32), (2, 4, 4), width=32, num_heads=2, num_layers=1, num_labels=2),
    block_q=16,
    block_k=16,
    teacher_stages=2,
    teacher_steps=8,
    teacher_lr=1e-2,
    steps=2,
    lr=1e-4,
    batch=1,
    calibration_batches=2,
    calibration_steps=4,
    num_samples=3,
    sampler_steps=1,
    num_held_out=4,
    seeds=1,
    compiler="aot_eager",
    job_seconds=1,
)

PRESETS = {preset.name: preset for preset in (FULL, TINY)}
