"""Clips made on the fly from a seed: a camera pans and zooms over a photograph, things pass in front of it.

Each clip shows one photograph through a window that moves, turns and zooms; a disc cut from another photograph passes
across it, and a handwritten digit moves over both. The label is the photograph. Training and held-out clips look at
different cells of a chessboard of window centres, and every seed gives other windows, motions and digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.video_dit.photographs import Pictures

Split = Literal["train", "held_out"]

# Cells of the chessboard of window centres along each side.
NUM_CELLS = 8
INK = (1.0, 0.85, -0.4)


@dataclass(frozen=True)
class Clips:
    """Videos (B, F, 3, H, W) from -1 to 1 and the photographs (B,) they show."""

    video: Tensor
    label: Tensor


class ClipMaker:
    """Makes clips of one size.

    Args:
        pictures: what to cut them from.
        size: (frames, height, width).
        device: where to make them.
        variety: how much windows differ in place, zoom and angle, and move; with less, a model learns what the
            photographs show from fewer clips.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: tuple[int, int, int],
        device: torch.device | str = "cpu",
        variety: float = 1.0,
    ) -> None:
        self.size, self.variety = size, variety
        self.device = torch.device(device)
        self.num_labels = len(pictures.photographs)
        side = max(max(photograph.shape[1:]) for photograph in pictures.photographs)
        # One size for all, so that a batch is cut in one call; windows undo the distortion.
        self._photographs = torch.stack(
            [
                F.interpolate(x[None].float() / 127.5 - 1, size=(side, side), mode="bicubic", align_corners=False)[0]
                for x in pictures.photographs
            ]
        ).to(self.device)
        shapes = [(x.shape[1], x.shape[2]) for x in pictures.photographs]
        self._aspect = torch.tensor([[min(h, w) / w, min(h, w) / h] for h, w in shapes])  # (P, 2) along x and y
        self._digits = (pictures.digits.float() / 16).to(self.device)

    def make(self, seed: int, count: int, split: Split = "train") -> Clips:
        """`count` clips; the same seed and split give the same ones on the same kind of device."""
        generator = torch.Generator().manual_seed(2 * seed + (split == "held_out"))

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator)

        def pick(upper: int) -> Tensor:
            return torch.randint(upper, (count,), generator=generator)

        frames = self.size[0]
        time = torch.linspace(-1, 1, frames)
        label, other = pick(self.num_labels), pick(self.num_labels)
        variety = self.variety
        scale = uniform(0.7 - 0.35 * variety, 0.7)[:, None] * (0.2 * variety * normal(1) * time).exp()
        angle = variety * (0.15 * normal(1) + 0.15 * normal(1) * time)
        center = variety * self._centers(pick(NUM_CELLS**2 // 2), uniform(0, 1, 2), split)
        path = center[:, None] + 0.2 * variety * normal(2)[:, None] * time[:, None]  # (B, F, 2)
        background = self._windows(label, scale, angle, path)

        disc_path = uniform(-0.8, 0.8, 2)[:, None] + 0.7 * normal(2)[:, None] * time[:, None]
        disc_size = uniform(0.2, 0.4)
        disc = self._windows(other, 0.4 * torch.ones(count, frames), torch.zeros(count, frames), disc_path * 0.2)
        video = torch.lerp(background, disc, self._disc_masks(disc_path, disc_size))

        digit_path = uniform(-0.7, 0.7, 2)[:, None] + 0.5 * normal(2)[:, None] * time[:, None]
        ink = self._digit_masks(pick(len(self._digits)), digit_path, uniform(2.5, 4.5))
        video = torch.lerp(video, torch.tensor(INK, device=self.device)[:, None, None].expand_as(video), ink)
        return Clips(video.clamp(-1, 1), label.to(self.device))

    def _centers(self, cell: Tensor, inside: Tensor, split: Split) -> Tensor:
        """(B, 2) window centres from -0.6 to 0.6 in the black or the white cells of a chessboard."""
        row, pair = cell // (NUM_CELLS // 2), cell % (NUM_CELLS // 2)
        column = 2 * pair + (row + (split == "held_out")) % 2
        return 1.2 * ((torch.stack([column, row], -1) + inside) / NUM_CELLS - 0.5)

    def _windows(self, photograph: Tensor, scale: Tensor, angle: Tensor, center: Tensor) -> Tensor:
        """(B, F, 3, H, W): photographs (B,) seen through windows of scale and angle (B, F) around center (B, F, 2)."""
        frames, height, width = self.size
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # The shorter side of the photograph is 2 units, of the window's height 2 * scale.
        shape = width / height
        rows = torch.stack([torch.stack([shape * cos, -sin], -1), torch.stack([shape * sin, cos], -1)], -2)
        rows = rows * self._aspect[photograph][:, None, :, None]
        theta = torch.cat([rows, center[..., None]], -1).flatten(0, 1).to(self.device)
        grid = F.affine_grid(theta, [len(theta), 3, height, width], align_corners=False)
        pictures = self._photographs[photograph.to(self.device)].repeat_interleave(frames, 0)
        return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False).unflatten(0, (-1, frames))

    def _disc_masks(self, path: Tensor, size: Tensor) -> Tensor:
        """(B, F, 1, H, W) from 0 to 1."""
        _, height, width = self.size
        y = torch.linspace(-1, 1, height, device=self.device)[:, None]
        x = torch.linspace(-1, 1, width, device=self.device) * width / height
        place, size = path.to(self.device)[..., None, None], size.to(self.device)[:, None, None, None]
        distance = ((x - place[:, :, 0]) ** 2 + (y - place[:, :, 1]) ** 2).sqrt()
        return ((size - distance) * height / 2 + 0.5).clamp(0, 1)[:, :, None]

    def _digit_masks(self, digit: Tensor, path: Tensor, zoom: Tensor) -> Tensor:
        """(B, F, 1, H, W): how much ink each pixel has."""
        frames, height, width = self.size
        zoom = zoom[:, None].expand(-1, frames)
        shape, zero = width / height, torch.zeros_like(zoom)
        theta = torch.stack(
            [
                torch.stack([shape * zoom, zero, -zoom * path[..., 0]], -1),
                torch.stack([zero, zoom, -zoom * path[..., 1]], -1),
            ],
            -2,
        )
        theta = theta.flatten(0, 1).to(self.device)
        grid = F.affine_grid(theta, [len(theta), 1, height, width], align_corners=False)
        digits = self._digits[digit.to(self.device)][:, None].repeat_interleave(frames, 0)
        return F.grid_sample(digits, grid, align_corners=False).unflatten(0, (-1, frames))


def token_grid(size: tuple[int, int, int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of a clip of that size."""
    counts = tuple(n // p for n, p in zip(size, patch, strict=True))
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"size: expected multiples of the patch {patch}, got {size}")
    assert math.prod(counts) > 0
    return counts[0], counts[1], counts[2]
