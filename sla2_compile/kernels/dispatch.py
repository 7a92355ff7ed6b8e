"""Which implementation runs the op on a device, and which number formats it has there."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sla2_compile.kernels import blocked, blocked_backward
from sla2_compile.kernels.hardware import capability

Implementation = Literal["triton", "blocked"]


@functools.cache
def implementation(device: torch.device) -> Implementation:
    """ "triton": fused kernels, for CUDA with Triton installed. "blocked": ATen in blocks, on any device."""
    return "triton" if device.type == "cuda" and missing_for_triton(device) is None else "blocked"


def forward_of(device: torch.device, *, only_rounds: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    """The implementation of `sla2::attention_forward` on a device, or the one that rounds to formats on any device."""
    if only_rounds or implementation(device) == "blocked":
        return blocked.forward
    from sla2_compile.kernels import cuda_forward

    return cuda_forward.forward


def backward_of(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """The implementation of `sla2::attention_backward` on a device."""
    if implementation(device) == "blocked":
        return blocked_backward.backward
    from sla2_compile.kernels import triton_backward

    return triton_backward.backward


def missing_for_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None if they can."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, this is a ROCm build of PyTorch"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install 'sla2-compile[gpu]'"
    major, minor = capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or higher, this device has {major}.{minor}"
    return None


def missing_for_format(number_format: str, device: torch.device) -> str | None:
    """Why a low-bit format cannot run on a device; None if it can, or is emulated, and for no format ("")."""
    if not number_format or implementation(device) == "blocked":
        return None
    return "the CUDA kernels have no low-bit formats yet"
