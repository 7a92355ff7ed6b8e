"""What all jobs share: files, device, deadline, the teacher, and the measuring of a model."""

from __future__ import annotations

import copy
import functools
import platform
import time

import torch
from torch import Tensor

from examples.paper_table.measures import feature_distance, features, kernel_distance, psnr, ssim
from examples.paper_table.presets import FULL, Preset
from examples.paper_table.published import TEACHER, read_teacher
from examples.paper_table.rows import PV_FORMAT, QK_FORMAT
from examples.paper_table.storage import Storage
from examples.video_dit.clips import ClipMaker, Clips
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.flow import held_out_loss, noise_like, sample
from examples.video_dit.model import VideoDiT
from examples.video_dit.photographs import unpack
from examples.video_dit.serve import autocast
from sla2_compile.kernels.dispatch import missing_for_format
from sla2_compile.learned_state import LowBit

SAMPLED_TOGETHER = 16


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
        return ClipMaker(unpack(path), self.preset.model.clip, self.device, self.preset.variety)

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
        if weights is None and self.preset.name == FULL.name and TEACHER.exists():
            weights = read_teacher()
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

    def samples(self, model: VideoDiT, num_clips: int | None = None) -> Tensor:
        """(num_samples or the first num_clips, F, 3, H, W): clips from the noise that all rows share."""
        frames, height, width = self.preset.model.clip
        made = []
        for i, label in enumerate(self.labels[:num_clips].split(SAMPLED_TOGETHER)):
            # Made on the host and for a whole batch, so that a clip depends neither on the device nor on their number.
            whole = noise_like(torch.empty(SAMPLED_TOGETHER, frames, 3, height, width), i)
            noise = whole[: len(label)].to(self.device)
            with autocast(self.device):
                made.append(sample(model, noise, label, self.preset.sampler_steps, self.preset.shift))
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

    def device_works(self) -> bool:
        """Whether this process can still use the device: after some errors, none of its kernels runs any more."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def low_bit(self) -> LowBit:
        """The paper's formats: the device's kernels, or rounding where it has none."""
        device = torch.device(self.device)
        is_missing = any(missing_for_format(name, device) for name in (QK_FORMAT, PV_FORMAT))
        return LowBit(QK_FORMAT, PV_FORMAT, "prepare" if is_missing else "convert")

    def machine(self) -> dict[str, str]:
        device = torch.cuda.get_device_name() if self.device == "cuda" else platform.machine()
        return {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
