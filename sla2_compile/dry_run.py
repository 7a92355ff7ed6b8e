"""Run a model once through our passes without leaving a trace: for finding its sites and for capturing their inputs."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sla2_compile.config import SLA2Config
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

# More graphs than any model has: looking at a model must not stop at the limit of recompilations.
_NO_LIMIT = 1 << 20

# Makes what takes the place of a converted site's op; it is called with the op's arguments.
Replace = Callable[[Site], Callable[..., Tensor]]


def traced(model: nn.Module, config: SLA2Config, replace: Replace, on_graph: Callable[[list[Site]], Any]) -> Any:
    """`model` as a function that runs through our passes, with other functions in place of the converted sites.

    Args:
        model: the model; its own compiled code, if it has any, stays as it is.
        config: decides which sites are converted.
        replace: called with each converted site, gives what runs there.
        on_graph: called with all sites of each graph.
    """

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        sites = convert(gm, config, sparsity_is_default=True)
        for site in sites:
            if site.verdict == "sla2":
                site.node.target = _named(replace(site))
                site.owner.recompile()
        on_graph(sites)
        return gm

    return torch.compile(with_own_code(model), backend=backend, dynamic=False)


def with_own_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """`model` as a function to compile, of a code object that nothing else has.

    Dynamo keeps compiled code, and counts it against the limit of recompilations, per code object. This one is thrown
    away with the function; the model's own would stay full, and a later compilation of it would silently run eager.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)


def _named(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # FX writes a target by its name.
    def sla2_site(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return sla2_site


@contextmanager
def without_trace(model: Callable[..., Any]) -> Iterator[None]:
    """Inside, the model may run: gradients are off; afterwards buffers and random states are what they were."""
    module = model if isinstance(model, nn.Module) else nn.Module()
    buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in module.named_buffers()}
    devices = {x.device for x in module.parameters()} | {x.device for x, _ in buffers.values()}
    # Where a function computes, only its run would tell: None is every device.
    cuda = [device for device in devices if device.type == "cuda"] if module is model else None
    python_state = random.getstate()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=cuda),
            torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT),
        ):
            yield
    finally:
        random.setstate(python_state)
        with torch.no_grad():
            for name, (buffer, value) in buffers.items():
                _restore(module, name, buffer, value)


def _restore(model: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    if not torch.equal(buffer, value) if buffer.device.type != "meta" else False:
        buffer.copy_(value)
    if owner._buffers[attribute] is not buffer:
        owner._buffers[attribute] = buffer
