"""Checks that need two processes: how a test starts them, and how each of them begins and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

NUM_RANKS = 2


def run_in_two_processes(worker: str, folder: Path) -> None:
    """Run a script of this folder as ranks 0 and 1."""
    command = [sys.executable, str(Path(__file__).with_name(worker))]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(NUM_RANKS)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * NUM_RANKS, "\n".join(errors)


def run_as_rank(check: Callable[[DeviceMesh, str], None]) -> None:
    """Be the rank that the command line names: join the other one, check, and end the process."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    check(init_device_mesh("cpu", (NUM_RANKS,)), store)
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    # Compiled graphs keep the group alive, and its threads can abort a Python that is shutting down (pytorch#190489).
    os._exit(0)
