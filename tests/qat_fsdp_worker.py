"""One of two processes that train a low-bit model sharded by FSDP2 beside the same model whole; run by a test."""

from __future__ import annotations

import copy

import torch
from learned_models import compile_aot, parameters, randomize
from small_models import SMALL, WIDTH, Blocks, tokens
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torchao.quantization import quantize_
from two_ranks import NUM_RANKS, run_as_rank

from sla2_compile import prepare
from sla2_compile.backend import build_backend
from sla2_compile.quant import SLA2QATConfig, is_attention_site

NUM_STEPS = 3


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(1, 64, WIDTH, generator=torch.Generator().manual_seed(NUM_RANKS * step + rank))


def train_side_by_side(mesh: DeviceMesh, *, compile_blocks: bool) -> None:
    """Train one model sharded and its twin whole, on the same batches, and compare every parameter."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    whole = prepare(Blocks(), tokens(), config=SMALL)
    randomize(whole)
    quantize_(whole, SLA2QATConfig("int8", "fp8"), filter_fn=is_attention_site)
    sharded = copy.deepcopy(whole)
    before = parameters(whole.blocks[0]).alpha_logit.detach().clone()
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
        if compile_blocks:
            block.compile(backend=build_backend(SMALL, aot_eager))
    fully_shard(sharded, mesh=mesh)
    run, run_whole = sharded if compile_blocks else compile_aot(sharded), compile_aot(whole)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (sharded, whole)]
    for step in range(NUM_STEPS):
        run(batch(step, mesh.get_rank())).square().mean().backward()
        for rank in range(NUM_RANKS):
            (run_whole(batch(step, rank)).square().mean() / NUM_RANKS).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, x), (_, y) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)
    # Dense attention, which is what a lost conversion leaves, has no use for it.
    assert not torch.equal(parameters(whole.blocks[0]).alpha_logit, before)


def main(mesh: DeviceMesh, _store: str) -> None:
    for compile_blocks in (True, False):
        train_side_by_side(mesh, compile_blocks=compile_blocks)


if __name__ == "__main__":
    run_as_rank(main)
