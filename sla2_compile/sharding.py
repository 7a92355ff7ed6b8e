"""How the operators run on DTensors: batch and heads may be sharded, tokens and head dim may not.

A sequence-sharded input is gathered by DTensor before the op. To avoid that, redistribute it to heads first
(Ulysses: Shard(2) -> Shard(1), attention, Shard(1) -> Shard(2)), which is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# Placements of the outputs, then of the inputs.
Rule = tuple[list[Any], list[Any]]


def register_sharding_rules() -> None:
    """Make the operators known to DTensor."""
    register_sharding(torch.ops.sla2.attention_forward.default)(_forward_shardings)
    register_sharding(torch.ops.sla2.attention_backward.default)(_backward_shardings)


def _forward_shardings(*args: Any) -> list[Rule]:
    """Output and input placements that `attention_forward` can run with; see `ops.py` for the arguments."""
    q, k, _, attn_mask, *_ = args
    save_sparse_out = args[8]
    rules = []
    for part, mask, state in _placements(q, k, attn_mask):
        whole = Replicate()
        inputs = [part, part, part, mask, whole, whole, state, state]
        outputs = [part, part if save_sparse_out else whole, part, part, part]
        rules.append((outputs, _for_tensors(inputs, args)))
    return rules


def _backward_shardings(*args: Any) -> list[Rule]:
    """The same for `attention_backward`, whose gradients of the state have a batch dimension that DTensor sums."""
    _, q, k, _, attn_mask, *_ = args
    return [
        ([part] * 5, _for_tensors([part, part, part, part, mask, state, state, *[part] * 5], args))
        for part, mask, state in _placements(q, k, attn_mask)
    ]


def _for_tensors(placements: list[Any], args: tuple[Any, ...]) -> list[Any]:
    """The placements of the tensors among the arguments, None for all others."""
    padded = placements + [None] * (len(args) - len(placements))
    return [None if arg is None else placement for placement, arg in zip(padded, args, strict=True)]


def _placements(q: Any, k: Any, attn_mask: Any) -> list[tuple[Any, Any, Any]]:
    """Choices of placement of everything with batch and heads, of the mask, and of the per-head state."""
    mask_has_batch = attn_mask is not None and attn_mask.shape[0] == q.shape[0]
    choices: list[tuple[Any, Any, Any]] = [
        (Replicate(), Replicate(), Replicate()),
        (Shard(0), Shard(0) if mask_has_batch else Replicate(), Replicate()),
    ]
    # Each part must hold whole groups of query heads with their key head.
    if all(k.shape[1] % size == 0 for size in q.mesh.shape):
        choices.append((Shard(1), Replicate(), Shard(0)))
    return choices
