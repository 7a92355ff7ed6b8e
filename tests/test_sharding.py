"""The op on DTensors, and prepared models under FSDP2, in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_in_two_processes(worker: str, folder: Path) -> None:
    """Run a script of this folder as ranks 0 and 1."""
    command = [sys.executable, str(Path(__file__).with_name(worker))]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def test_sharded_over_batch_or_heads_it_gives_the_whole_result_and_its_gradients(tmp_path: Path) -> None:
    run_in_two_processes("sharding_worker.py", tmp_path)


def test_learned_state_is_sharded_gathered_and_trained_by_fsdp2_like_any_parameter(tmp_path: Path) -> None:
    run_in_two_processes("fsdp_worker.py", tmp_path)
