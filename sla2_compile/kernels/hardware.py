"""What a device offers, asked once: the questions cost more than the launch of a kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; Hopper's where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
