"""The pieces of the comparison: stages of the teacher, stage 1 of SLA2 per form, and every row with every seed.

A job gives what its JSON file will hold and reads what jobs before it left, so the table can be built in pieces, on
machines that come and go.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.paper_table.context import Context
from examples.paper_table.pictures import SHOWN_ROWS
from examples.paper_table.rows import DEFAULT, Form, Row, all_rows
from examples.paper_table.training import Plan, train
from examples.paper_table.variants import put_variant
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.flow import held_out_loss, noise_like, noisy
from examples.video_dit.frames import save_frames
from examples.video_dit.model import VideoDiT
from examples.video_dit.serve import autocast, digest, make_clips, prepare_model, save_model
from sla2_compile import SLA2Config, calibrate
from sla2_compile.learned_state import LowBit
from sla2_compile.prepare import owner_state, prepared_owners

# Seeds of the clips: far apart, so that no two uses meet.
TEACHER_SEED, STAGE_1_SEED, FINE_TUNING_SEED, SEED_STRIDE = 0, 10_000_000, 20_000_000, 100_000
NUM_SHOWN = 3

# The row that is also saved and served by another process, which compiles it once more.
SERVED = f"{Row('sla2', 0.97, DEFAULT, 'learned', low_bit=True).name}-s0"


@dataclass(frozen=True)
class TeacherStage:
    """Some steps of the teacher's training, from the averaged weights that the stage before left.

    The optimizer starts anew in every stage, so it need not travel: with it a checkpoint would be six times as large.
    """

    number: int

    @property
    def name(self) -> str:
        return f"teacher-{self.number}"

    @property
    def needs(self) -> list[str]:
        return [f"teacher-{self.number - 1}"] if self.number else []

    def run(self, context: Context) -> dict[str, Any]:
        preset, storage = context.preset, context.storage
        model = context.new_model()
        if self.number:
            weights = storage.read_weights(f"teacher-{self.number - 1}")
            if weights is None:
                raise FileNotFoundError(f"expected the weights of stage {self.number - 1} in {storage.work}")
            model.load_state_dict(weights)
        compile_blocks(model, None, preset.compiler)
        total, done = preset.teacher_stages * preset.teacher_steps, self.number * preset.teacher_steps

        def lr(step: int) -> float:
            fall = min(1.0, 2 * (1 - (done + step) / total))
            return preset.teacher_lr * min(1, (step + 1) / 50) * max(0.02, fall)

        plan = Plan(
            preset.teacher_steps,
            preset.batch,
            lr,
            TEACHER_SEED + done,
            preset.shift,
            storage.unfinished / f"{self.name}.pt",
            context.deadline,
            uses_muon=True,
        )
        trained = train(model, context.maker, plan)
        model.load_state_dict(trained.averaged)
        with autocast(context.device):
            loss = held_out_loss(model.eval(), context.held_out)
        storage.write_weights(self.name, model.state_dict())
        return {"losses": trained.losses, "held_out_loss": loss, "seconds_per_step": trained.seconds_per_step}


@dataclass(frozen=True)
class Stage1:
    """Learn router and mixing of one form on the teacher, at the sparsities that rows have."""

    form: Form

    @property
    def name(self) -> str:
        return f"stage1-{self.form[0]}-{self.form[1]}"

    @property
    def needs(self) -> list[str]:
        return ["teacher"]

    def run(self, context: Context) -> dict[str, Any]:
        preset = context.preset
        model = copy.deepcopy(context.teacher)
        rows = [row for row in all_rows() if row.kind == "sla2" and row.trained and row.form == self.form]
        sparsities = sorted({row.sparsity for row in rows})
        options = Row("sla2", sparsities[0], self.form).options(preset)
        batches = []
        for i in range(preset.calibration_batches):
            clips = context.maker.make(STAGE_1_SEED + i, 1)
            t = torch.full((1,), (i + 0.5) / preset.calibration_batches, device=context.device)
            batches.append((noisy(clips.video, noise_like(clips.video, i), t), t, clips.label))
        tail, mixing = self.form
        with autocast(context.device):
            report = calibrate(
                model, batches, sparsity=sparsities, config=SLA2Config.from_options(options), tails=(tail,),
                mixings=(mixing,), steps=preset.calibration_steps, store="device", progress=False,
            )  # fmt: skip
        learned = {name: x for name, x in model.state_dict().items() if ".sla2." in name}
        context.storage.write_learned(self.name, learned)
        return {
            "errors": [
                {"site": site.name, "sparsity": each.sparsity, "before": each.before, "after": each.after}
                for site in report.sites
                for each in site.results
            ]
        }


@dataclass(frozen=True)
class RowJob:
    """Fine-tune, sample and measure one row with one seed."""

    row: Row
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.row.name}-s{self.seed}"

    @property
    def needs(self) -> list[str]:
        learned = [f"stage1-{'-'.join(self.row.form)}"] if self.needs_stage_1 else []
        return ["teacher", *learned]

    @property
    def needs_stage_1(self) -> bool:
        # With the untrained router too, the mixing comes from stage 1, so that only the router differs.
        return self.row.kind == "sla2" and self.row.trained

    def run(self, context: Context) -> dict[str, Any]:
        row, preset = self.row, context.preset
        # The teacher's clips first: compiling it would drop what is compiled for the row.
        _ = context.wanted
        model, options = self.build(context)
        result: dict[str, Any] = {"row": dataclasses.asdict(row), "seed": self.seed}
        compile_blocks(model, options, preset.compiler)
        if row.trained:
            seed = FINE_TUNING_SEED + SEED_STRIDE * self.seed
            checkpoint = context.storage.unfinished / f"{self.name}.pt"

            def lr(step: int) -> float:
                return preset.lr * min(1, (step + 1) / 20) * (1 - step / preset.steps)

            trained = train(
                model.train(),
                context.maker,
                Plan(preset.steps, preset.batch, lr, seed, preset.shift, checkpoint, context.deadline),
            )
            result |= {"losses": trained.losses, "seconds_per_step": trained.seconds_per_step}
        result["measures"], video = context.measure(model)
        if row.low_bit:
            result["formats"] = dataclasses.asdict(context.low_bit())
            if self.name == SERVED:
                assert options is not None
                result["served"] = serve_in_new_process(model, options, context)
        if row.measures_quantised:
            set_formats(model, context.low_bit())
            compile_blocks(model, options, preset.compiler)
            result["quantised_afterwards"], _ = context.measure(model)
        if self.name in SHOWN_ROWS:
            save_frames(video[:NUM_SHOWN], context.storage.results / f"{self.name}.png")
        return result

    def build(self, context: Context) -> tuple[VideoDiT, dict[str, Any] | None]:
        """The model with the teacher's weights and this row's attention, and the backend's options."""
        row, preset = self.row, context.preset
        model = copy.deepcopy(context.teacher).requires_grad_(row.trained)
        if row.kind == "full":
            return model, None
        if row.kind != "sla2":
            put_variant(model, row, preset)
            return model, None
        options = row.options(preset)
        if not row.trained:
            return model, options
        prepare_model(model, options)
        learned = context.storage.read_learned(f"stage1-{'-'.join(row.form)}")
        model.load_state_dict(learned, strict=False)
        for name, parameter in model.named_parameters():
            if ".sla2." in name and ".proj_" in name:
                parameter.requires_grad_(False)
                if row.router == "means":
                    parameter.data.copy_(torch.eye(len(parameter)))
        if row.low_bit:
            set_formats(model, context.low_bit())
        return model, options


def serve_in_new_process(model: VideoDiT, options: dict[str, Any], context: Context) -> dict[str, Any]:
    """Save a compiled, fine-tuned model, let another process load it and make clips, and compare their bits."""
    settings = {"count": 2, "steps": 4, "seed": 0}
    expected = digest(make_clips(model, settings["count"], settings["steps"], settings["seed"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_model(model, options, path, model.state_dict())
        command = [sys.executable, "-m", "examples.video_dit.serve", str(path)]
        command += ["--device", context.device, "--compiler", context.preset.compiler]
        command += [f"--{name}={value}" for name, value in settings.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        # The row itself is trained and measured, and must not be lost with this.
        return {"same_bits": False, "error": done.stderr[-2000:], **settings}
    return {"same_bits": done.stdout.split()[-1] == expected, **settings}


def set_formats(model: VideoDiT, low_bit: LowBit) -> None:
    """What `quantize_(model, SLA2QATConfig(...))` does, on a machine without torchao."""
    for _, owner in prepared_owners(model):
        owner_state(owner).set_low_bit(low_bit)
