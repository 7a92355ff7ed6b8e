"""The op on DTensors, and prepared models under FSDP2, in two processes."""

from __future__ import annotations

from pathlib import Path

from two_ranks import run_in_two_processes


def test_sharded_over_batch_or_heads_it_gives_the_whole_result_and_its_gradients(tmp_path: Path) -> None:
    run_in_two_processes("sharding_worker.py", tmp_path)


def test_learned_state_is_sharded_gathered_and_trained_by_fsdp2_like_any_parameter(tmp_path: Path) -> None:
    run_in_two_processes("fsdp_worker.py", tmp_path)
