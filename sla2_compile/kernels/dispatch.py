"""Which implementation runs the op on a device, and which number formats it has there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sla2_compile.kernels import blocked, blocked_backward

Implementation = Literal["triton", "blocked"]


def implementation(device: torch.device) -> Implementation:
    """ "triton": fused kernels, for CUDA with Triton installed. "blocked": ATen in blocks, on any device."""
    return "triton" if device.type == "cuda" and missing_for_triton(device) is None else "blocked"


def forward_of(device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """The implementation of `sla2::attention_forward` on a device."""
    if implementation(device) == "blocked":
        return blocked.forward
    from sla2_compile.kernels import triton_forward

    return triton_forward.forward


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
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or higher, this device has {capability[0]}.{capability[1]}"
    return None


def missing_for_format(number_format: str, device: torch.device) -> str | None:
    """Why a low-bit format cannot run in the Triton kernels of a CUDA device; None if it can, or is emulated."""
    if implementation(device) == "blocked" or number_format != "fp8":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"FP8 needs compute capability 8.9 or higher, this device has {capability[0]}.{capability[1]}"
    return None
