"""One of two processes that save and train a prepared model under FSDP2, against the whole; run by test_sharding.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from learned_models import randomize
from small_models import SMALL, Blocks, tokens
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_ranks import run_as_rank

from sla2_compile import load_state, prepare, save_state
from sla2_compile.backend import build_backend


def compile_blocks(model: Blocks) -> Blocks:
    for block in model.blocks:
        block.compile(backend=build_backend(SMALL, aot_eager))
    return model


def train(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output before and the parameters after one step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    out = model(x)
    out.square().mean().backward()
    optimizer.step()
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.named_parameters()
    }
    return out.detach(), {name: value.detach() for name, value in whole.items()}


def main(mesh: DeviceMesh, store: str) -> None:
    torch.manual_seed(0)
    x = tokens(64)
    model = prepare(Blocks(), x, config=SMALL)
    randomize(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    state = {name: value for name, value in sharded.named_parameters() if ".sla2." in name}
    assert len(state) == 8
    assert all(isinstance(value, DTensor) for value in state.values())

    save_state(sharded, f"{store}.sharded")
    if mesh.get_rank() == 0:
        save_state(model, f"{store}.whole")
        assert Path(f"{store}.sharded").read_bytes() == Path(f"{store}.whole").read_bytes()
        with pytest.raises(ValueError, match="expected one that is not sharded yet"):
            load_state(sharded, f"{store}.whole")

    expected_out, expected = train(compile_blocks(model), x)
    out, trained = train(compile_blocks(sharded), x)
    torch.testing.assert_close(out, expected_out)
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, msg=lambda text, name=name: f"{name}: {text}")
        if name in state:
            # The router is frozen, the mixing learns.
            assert torch.equal(value, before[name]) == name.endswith(("proj_q", "proj_k")), name


if __name__ == "__main__":
    run_as_rank(main)
