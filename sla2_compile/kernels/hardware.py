"""What a device offers, asked once: the questions cost more than the launch of a kernel."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Hardware:
    capability: tuple[int, int]  # compute capability; (0, 0) of what is no CUDA device
    shared_memory: int  # bytes that a program may use
    num_multiprocessors: int


# What Triton's interpreter computes for: block sizes of Hopper, and none of its instructions.
INTERPRETER = Hardware((0, 0), 227 * 1024, 1)


@functools.cache
def hardware_of(device: torch.device) -> Hardware:
    """What a CUDA device offers; any other is the interpreter's."""
    if device.type != "cuda":
        return INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    shared_memory = int(properties.shared_memory_per_block_optin)
    return Hardware((properties.major, properties.minor), shared_memory, int(properties.multi_processor_count))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) of any other."""
    return hardware_of(device).capability


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; Hopper's where there is no GPU (the interpreter)."""
    return hardware_of(device).shared_memory


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return hardware_of(device).num_multiprocessors
