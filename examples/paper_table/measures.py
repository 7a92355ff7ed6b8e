"""What a row is judged by: held-out loss, likeness to the teacher's clips, and distance to held-out clips.

No weights of a perceptual network can be had here, so features are the teacher's own: what its middle block makes of a
clip with a tenth of noise. Diffusion models' features at little noise are known to follow what is seen (DIFT, arXiv
2306.03881); being the teacher's, they may favour what resembles it, which is what is asked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.video_dit.flow import noise_like, noisy
from examples.video_dit.model import VideoDiT
from examples.video_dit.serve import autocast

FEATURE_NOISE = 0.1


@torch.no_grad()
def features(teacher: VideoDiT, video: Tensor, label: Tensor, batch: int = 8) -> Tensor:
    """(B, N, C) float32: the middle block's output for clips (B, F, 3, H, W), with the same noise for all."""
    found: list[Tensor] = []
    hook = teacher.blocks[len(teacher.blocks) // 2].register_forward_hook(lambda *call: found.append(call[2].float()))
    try:
        for x, y in zip(video.split(batch), label.split(batch), strict=True):
            t = torch.full((len(x),), FEATURE_NOISE, device=x.device)
            noise = noise_like(x[:1], 0).expand_as(x)
            with autocast(x.device):
                teacher(noisy(x, noise, t), t, y)
    finally:
        hook.remove()
    return torch.cat(found)


def feature_distance(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of unit feature vectors (B, N, C), in LPIPS's form (arXiv 1801.03924) without weights."""
    return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean().item()


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """Unbiased squared MMD of clips' mean features (B, C), cubic kernel: the kernel inception distance's form.

    The Fréchet distance would need more clips than feature channels. Around 0, also below it, where the two are alike.
    Source: arXiv 1801.01401.
    """
    mean, std = real.mean(0), real.std(0).clamp(min=1e-6)
    x, y = ((each - mean) / std for each in (made, real))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return (without_diagonal(kernel(x, x)) + without_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over clips (B, F, 3, H, W) from -1 to 1, in dB; equal clips count as 60."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-6).log10()).mean().item()


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of the frames' luma of clips (B, F, 3, H, W), Gaussian window of 1.5 pixels.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=a.device)[:, None, None]
    x, y = (((each.clamp(-1, 1) + 1) / 2 * weights).sum(2).flatten(0, 1)[:, None] for each in (a, b))
    offsets = torch.arange(-5, 6, device=a.device, dtype=torch.float32)
    window = (-(offsets**2) / (2 * 1.5**2)).exp()
    window = (window / window.sum())[None, None]

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window[..., None]), window[:, :, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return values.mean().item()


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan where there are fewer than two."""
    x = list(values)
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1)) if len(x) > 1 else math.nan
    return mean, spread
