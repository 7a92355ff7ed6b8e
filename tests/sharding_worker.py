"""One of two processes that check the op on DTensors against the whole tensors; run by test_sharding.py."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from two_ranks import run_as_rank

import sla2_compile

CONFIG = sla2_compile.SLA2Config(sparsity=0.5, block_q=16, block_k=16)


def main(mesh: DeviceMesh, _store: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, 16, dtype=torch.float64) for heads in (4, 2, 2))
    grad, logit = torch.randn_like(q), torch.randn(4, 3, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 50) > 0.2

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, logit, mask, grad = tensors
        leaves = [x.detach().requires_grad_() for x in (q, k, v, logit)]
        out = sla2_compile.attention(*leaves[:3], alpha_logit=leaves[3], attn_mask=mask, enable_gqa=True, config=CONFIG)
        return out, *torch.autograd.grad(out, leaves, grad)

    expected = run(q, k, v, logit, mask, grad)
    for part, mask_part, state_part in (
        (Shard(0), Shard(0), Replicate()),
        (Shard(1), Replicate(), Shard(0)),
        (Shard(2), Replicate(), Replicate()),
    ):
        placements = (part, part, part, state_part, mask_part, part)
        results = run(
            *(distribute_tensor(x, mesh, [p]) for x, p in zip((q, k, v, logit, mask, grad), placements, strict=True))
        )
        if part != Shard(2):
            assert results[0].placements == (part,), results[0].placements
        for result, whole in zip(results, expected, strict=True):
            torch.testing.assert_close(result.full_tensor(), whole)


if __name__ == "__main__":
    run_as_rank(main)
