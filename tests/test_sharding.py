"""The op on DTensors, in two processes."""

from __future__ import annotations

from pathlib import Path

from two_ranks import run_on_two_ranks


def test_sharded_over_batch_or_heads_it_gives_the_whole_result_and_its_gradients(tmp_path: Path) -> None:
    run_on_two_ranks("sharding_worker.py", tmp_path)
