"""Run a worker script as the two ranks of a process group, for the tests that need more than one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_on_two_ranks(worker: str, folder: Path) -> None:
    """Start `worker` (a file beside this one) twice, as `worker RANK STORE`, and expect that both succeed.

    Args:
        worker: name of the script.
        folder: an empty one, for the file by which the processes find each other.
    """
    command = [sys.executable, str(Path(__file__).with_name(worker))]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
