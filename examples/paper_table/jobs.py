"""The pieces of the comparison: stages of the teacher, stage 1 of SLA2 per form, and every row with every seed.

A job writes one JSON file when it is done and reads what jobs before it left, so the table can be built in pieces, on
machines that come and go.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from examples.paper_table.measures import feature_distance, features, kernel_distance, psnr, ssim
from examples.paper_table.presets import Preset
from examples.paper_table.rows import FORMS, PV_FORMAT, QK_FORMAT, SPARSITIES, Form, Row, all_rows
from examples.paper_table.storage import Storage
from examples.paper_table.training import OutOfTimeError, Plan, train
from examples.paper_table.variants import put_variant
from examples.video_dit.clips import ClipMaker, Clips
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.flow import held_out_loss, noise_like, noisy, sample
from examples.video_dit.frames import save_frames
from examples.video_dit.model import VideoDiT
from examples.video_dit.photographs import unpack
from examples.video_dit.serve import autocast, prepare_model
from sla2_compile import SLA2Config, calibrate
from sla2_compile.kernels.dispatch import missing_for_format
from sla2_compile.learned_state import LowBit
from sla2_compile.prepare import owner_state, prepared_owners

# Seeds of the clips: far apart, so that no two uses meet.
TEACHER_SEED, STAGE_1_SEED, FINE_TUNING_SEED, SEED_STRIDE = 0, 10_000_000, 20_000_000, 100_000
NUM_SHOWN = 3


class Context:
    """What jobs share: files, device, deadline, and what is costly to make, made once.

    Args:
        preset: sizes.
        storage: files.
        device: where to train.
        deadline: when to stop, on time.monotonic's clock.
    """

    def __init__(self, preset: Preset, storage: Storage, device: str, deadline: float) -> None:
        self.preset, self.storage, self.device, self.deadline = preset, storage, device, deadline

    @functools.cached_property
    def maker(self) -> ClipMaker:
        path = self.storage.work / "pictures.npz"
        if not path.exists():
            raise FileNotFoundError(f"expected {path}; python -m examples.paper_table pictures makes it")
        return ClipMaker(unpack(path), self.preset.model.clip, self.device)

    @property
    def last_stage(self) -> str:
        return f"teacher-{self.preset.teacher_stages - 1}"

    def new_model(self) -> VideoDiT:
        torch.manual_seed(0)
        return VideoDiT(self.preset.model).to(self.device)

    @functools.cached_property
    def teacher(self) -> VideoDiT:
        """The trained teacher, not compiled."""
        weights = self.storage.read_weights(self.last_stage)
        if weights is None:
            raise FileNotFoundError(f"expected the teacher in {self.storage.work}; its last stage is not done")
        model = self.new_model()
        model.load_state_dict(weights)
        return model.requires_grad_(False).eval()

    @functools.cached_property
    def held_out(self) -> list[Clips]:
        batch = min(16, self.preset.num_held_out)
        return [self.maker.make(i, batch, "held_out") for i in range(self.preset.num_held_out // batch)]

    @functools.cached_property
    def real_features(self) -> Tensor:
        """(B, C) of the held-out clips."""
        return torch.cat([features(self.teacher, clips.video, clips.label).mean(1) for clips in self.held_out])

    @functools.cached_property
    def wanted(self) -> tuple[Tensor, Tensor]:
        """The teacher's clips, and their features (B, N, C)."""
        compiled = copy.deepcopy(self.teacher)
        compile_blocks(compiled, None, self.preset.compiler)
        video = self.samples(compiled)
        return video, features(self.teacher, video, self.labels)

    @property
    def labels(self) -> Tensor:
        return (torch.arange(self.preset.num_samples) % self.preset.model.num_labels).to(self.device)

    def samples(self, model: VideoDiT) -> Tensor:
        """(num_samples, F, 3, H, W): clips from the noise that all rows share."""
        frames, height, width = self.preset.model.clip
        made = []
        for i, label in enumerate(self.labels.split(16)):
            noise = noise_like(torch.empty(len(label), frames, 3, height, width, device=self.device), i)
            with autocast(self.device):
                made.append(sample(model, noise, label, self.preset.sampler_steps))
        return torch.cat(made)

    def measure(self, model: VideoDiT) -> tuple[dict[str, float], Tensor]:
        """All measures of a compiled model, and the clips it made."""
        model.eval()
        with autocast(self.device):
            loss = held_out_loss(model, self.held_out)
        wanted, wanted_features = self.wanted
        self.synchronize()
        start = time.monotonic()
        video = self.samples(model)
        self.synchronize()
        seconds = time.monotonic() - start
        found = features(self.teacher, video, self.labels)
        return {
            "held_out_loss": loss,
            "psnr": psnr(video, wanted),
            "ssim": ssim(video, wanted),
            "feature_distance": feature_distance(found, wanted_features),
            "kernel_distance": kernel_distance(found.mean(1), self.real_features),
            "seconds_per_clip": seconds / len(video),
        }, video

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def low_bit(self) -> LowBit:
        """The paper's formats: the device's kernels, or rounding where it has none."""
        device = torch.device(self.device)
        is_missing = any(missing_for_format(name, device) for name in (QK_FORMAT, PV_FORMAT))
        return LowBit(QK_FORMAT, PV_FORMAT, "prepare" if is_missing else "convert")

    def machine(self) -> dict[str, str]:
        device = torch.cuda.get_device_name() if self.device == "cuda" else platform.machine()
        return {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


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

        checkpoint = storage.unfinished / f"{self.name}.pt"
        seed = TEACHER_SEED + done
        trained = train(
            model, context.maker, Plan(preset.teacher_steps, preset.batch, lr, seed, checkpoint, context.deadline)
        )
        model.load_state_dict(trained.averaged)
        with autocast(context.device):
            loss = held_out_loss(model.eval(), context.held_out)
        storage.write_weights(self.name, model.state_dict())
        return {"losses": trained.losses, "held_out_loss": loss, "seconds_per_step": trained.seconds_per_step}


@dataclass(frozen=True)
class Stage1:
    """Learn router and mixing of one form, at all sparsities, on the teacher."""

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
        options = Row("sla2", SPARSITIES[0], self.form).options(preset)
        batches = []
        for i in range(preset.calibration_batches):
            clips = context.maker.make(STAGE_1_SEED + i, 1)
            t = torch.full((1,), (i + 0.5) / preset.calibration_batches, device=context.device)
            batches.append((noisy(clips.video, noise_like(clips.video, i), t), t, clips.label))
        tail, mixing = self.form
        with autocast(context.device):
            report = calibrate(
                model, batches, sparsity=SPARSITIES, config=SLA2Config.from_options(options), tails=(tail,),
                mixings=(mixing,), steps=preset.calibration_steps, store="device", progress=False,
            )  # fmt: skip
        for _, owner in prepared_owners(model):
            state = owner_state(owner)
            for call in state.settings.calls:
                # Where nothing beat the untrained router, calibrate keeps that one, in the default form.
                entries = tuple(dataclasses.replace(entry, tail=tail, mixing=mixing) for entry in call.entries)
                parameters = [state.parameters_of(call, entry) for entry in call.entries]
                state.replace_call(dataclasses.replace(call, entries=entries), parameters)
        learned = {name: x.cpu() for name, x in model.state_dict().items() if ".sla2." in name}
        torch.save(learned, context.storage.work / f"{self.name}.pt")
        return {"sites": [dataclasses.asdict(site) | {"results": []} for site in report.sites], "report": str(report)}


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
        model, options = self.build(context)
        result: dict[str, Any] = {"row": dataclasses.asdict(row), "seed": self.seed}
        compile_blocks(model, options, preset.compiler)
        if row.trained:
            seed = FINE_TUNING_SEED + SEED_STRIDE * self.seed
            checkpoint = context.storage.unfinished / f"{self.name}.pt"

            def lr(step: int) -> float:
                return preset.lr * min(1, (step + 1) / 20) * (1 - step / preset.steps)

            trained = train(
                model.train(), context.maker, Plan(preset.steps, preset.batch, lr, seed, checkpoint, context.deadline)
            )
            result |= {"losses": trained.losses, "seconds_per_step": trained.seconds_per_step}
        result["measures"], video = context.measure(model)
        if row.low_bit:
            result["formats"] = dataclasses.asdict(context.low_bit())
        if row.measures_quantised:
            set_formats(model, context.low_bit())
            compile_blocks(model, options, preset.compiler)
            result["quantised_afterwards"], _ = context.measure(model)
        if self.seed == 0:
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
        learned = torch.load(context.storage.work / f"stage1-{'-'.join(row.form)}.pt", weights_only=True)
        model.load_state_dict(learned, strict=False)
        for name, parameter in model.named_parameters():
            if ".sla2." in name and ".proj_" in name:
                parameter.requires_grad_(False)
                if row.router == "means":
                    parameter.data.copy_(torch.eye(len(parameter)))
        if row.low_bit:
            set_formats(model, context.low_bit())
        return model, options


def set_formats(model: VideoDiT, low_bit: LowBit) -> None:
    """What `quantize_(model, SLA2QATConfig(...))` does, on a machine without torchao."""
    for _, owner in prepared_owners(model):
        owner_state(owner).set_low_bit(low_bit)


Job = TeacherStage | Stage1 | RowJob


def all_jobs(preset: Preset) -> list[Job]:
    """Every job, those worth having first."""
    rows = all_rows()
    more_seeds = [RowJob(row, seed) for seed in range(1, preset.seeds) for row in rows if row.decides]
    return [
        *(TeacherStage(i) for i in range(preset.teacher_stages)),
        *(Stage1(form) for form in FORMS),
        *(RowJob(row) for row in rows),
        *more_seeds,
    ]


def missing_needs(job: Job, done: set[str], preset: Preset) -> list[str]:
    needs = [f"teacher-{preset.teacher_stages - 1}" if need == "teacher" else need for need in job.needs]
    return [need for need in needs if need not in done]


def pending(preset: Preset, storage: Storage, patterns: tuple[str, ...]) -> Iterator[Job]:
    """Jobs that are not done and match a pattern, in order."""
    for job in all_jobs(preset):
        if storage.result(job.name) is None and any(fnmatchcase(job.name, pattern) for pattern in patterns):
            yield job


def run_jobs(context: Context, patterns: tuple[str, ...]) -> list[str]:
    """Run what is pending, as far as the time goes; the names of jobs that failed."""
    failed = []
    done = set(context.storage.all_results())
    longest = {TeacherStage: 0.0, Stage1: 0.0, RowJob: 0.0}
    for job in list(pending(context.preset, context.storage, patterns)):
        if missing := missing_needs(job, done, context.preset):
            print(f"{job.name}: waits for {', '.join(missing)}", flush=True)
            continue
        left = context.deadline - time.monotonic()
        if left < (longest[type(job)] or context.preset.job_seconds / 4):
            print(f"{job.name}: {left:.0f} s are left, too few to begin", flush=True)
            break
        print(f"{job.name}: begins, {left:.0f} s are left", flush=True)
        start = time.monotonic()
        try:
            result = job.run(context)
        except OutOfTimeError:
            print(f"{job.name}: stopped, goes on from its checkpoint in {context.storage.unfinished}", flush=True)
            break
        except Exception:
            # What other rows need must not be lost with this one.
            traceback.print_exc()
            failed.append(job.name)
            continue
        seconds = time.monotonic() - start
        longest[type(job)] = max(longest[type(job)], seconds)
        result |= {"preset": context.preset.name, "seconds": seconds, **context.machine()}
        context.storage.write_result(job.name, result)
        done.add(job.name)
        print(f"{job.name}: done in {seconds:.0f} s; {result.get('measures', '')}", flush=True)
    return failed
