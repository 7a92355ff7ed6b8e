"""The trained teacher as it lies in the repository, so that rows can be built without training it for minutes of a GPU.

Matrices in 8 bits with a scale per row, all else in float32; no pickle. The rows' teacher is this one, as rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TEACHER = Path(__file__).with_name("teacher.safetensors")
TOP_CODE = 127
_SCALE = ".scale"


def write_teacher(weights: Mapping[str, Tensor], path: Path = TEACHER) -> None:
    """Write a state dict, its matrices rounded."""
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    for name, x in weights.items():
        if x.ndim == 2 and x.numel() > 10_000:
            scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / TOP_CODE
            stored[name + _SCALE] = scale
            x = (x.float() / scale).round().to(torch.int8)
        stored[name] = x.contiguous().cpu()
    save_file(stored, path)


def read_teacher(path: Path = TEACHER) -> dict[str, Tensor]:
    """The state dict in float32."""
    from safetensors.torch import load_file

    stored = load_file(path)
    scales = {name.removesuffix(_SCALE): stored.pop(name) for name in list(stored) if name.endswith(_SCALE)}
    return {name: x.float() * scales.get(name, 1.0) if x.dtype != torch.int64 else x for name, x in stored.items()}
