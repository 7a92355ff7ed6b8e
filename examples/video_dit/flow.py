"""Flow matching: the loss that the models are trained on, a fixed held-out version of it, and a sampler."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.video_dit.clips import Clips

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def noisy(video: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The clip on its way to noise: t (B,) is 0 at the clip and 1 at the noise."""
    return torch.lerp(video, noise, t[:, None, None, None, None])


def later(t: Tensor, shift: float) -> Tensor:
    """Times moved towards the noise, which large clips need: their many pixels tell of what is seen until late.

    0 and 1 stay; a shift of 1 changes nothing. Source: arXiv 2403.03206, section 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


def noise_like(video: Tensor, seed: int) -> Tensor:
    """Noise of a seed, made where the video is; kinds of devices differ in theirs."""
    generator = torch.Generator(video.device).manual_seed(seed)
    return torch.randn(video.shape, generator=generator, device=video.device)


def training_batch(clips: Clips, seed: int, shift: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy clip, t, target velocity) of a training step."""
    # Most steps where the model decides what is seen, fewer where all is noise or all is clear.
    t = torch.randn(len(clips.video), generator=torch.Generator().manual_seed(seed)).sigmoid()
    t = later(t, shift).to(clips.video.device)
    noise = noise_like(clips.video, seed)
    return noisy(clips.video, noise, t), t, noise - clips.video


@torch.no_grad()
def held_out_loss(predict: Predict, batches: Sequence[Clips], seed: int = 1) -> float:
    """Mean squared error of the velocity on fixed clips, at evenly spread times, with fixed noise."""
    losses = []
    for i, clips in enumerate(batches):
        count = len(clips.video)
        t = ((torch.arange(count) + (i + 0.5) / len(batches)) / count).to(clips.video.device)
        noise = noise_like(clips.video, seed + i)
        velocity = predict(noisy(clips.video, noise, t), t, clips.label)
        losses.append(F.mse_loss(velocity.float(), noise - clips.video))
    return torch.stack(losses).double().mean().item()


@torch.no_grad()
def sample(predict: Predict, noise: Tensor, label: Tensor, num_steps: int, shift: float = 1.0) -> Tensor:
    """Follow the velocity from noise (B, F, 3, H, W) to clips, by Heun's method with ever smaller steps."""
    # Squared: finer steps near the clip, where detail is decided.
    times = later(torch.linspace(1, 0, num_steps + 1) ** 1.5, shift).tolist()
    x = noise.float()

    def velocity(x: Tensor, t: float) -> Tensor:
        return predict(x, torch.full((len(x),), t, device=x.device), label).float()

    for t, following in itertools.pairwise(times):
        first = velocity(x, t)
        if following == 0:
            return x - t * first
        second = velocity(x + (following - t) * first, following)
        x = x + (following - t) * (first + second) / 2
    return x
