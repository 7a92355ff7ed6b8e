"""Frames of clips as a PNG, without an imaging library: the machine that trains may have none."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor


def save_frames(video: Tensor, path: Path, num_frames: int = 4) -> None:
    """Write some frames of clips (B, F, 3, H, W), from -1 to 1, one row of the picture for each clip."""
    picked = video[:, torch.linspace(0, video.shape[1] - 1, num_frames).long()].float().clamp(-1, 1)
    pixels = ((picked + 1) * 127.5).round().to(torch.uint8).cpu()  # (B, frames, 3, H, W)
    write_png(pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1), path)


def write_png(pixels: Tensor, path: Path) -> None:
    """Write pixels (H, W, 3) uint8."""
    height, width, _ = pixels.shape
    # Each row begins with its filter: 0, none.
    rows = torch.cat([pixels.new_zeros(height, 1), pixels.flatten(1)], 1).contiguous()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
