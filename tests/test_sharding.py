"""The op on DTensors, in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("sharding_worker.py")


def test_sharded_over_batch_or_heads_it_gives_the_whole_result_and_its_gradients(tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
