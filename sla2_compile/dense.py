"""`dense`: run compiled models with their own attention for a while, such as the first steps of a diffusion sampler.

The backend compiles every graph with SLA2 and, once somebody asks for it, a twin as the model wrote it. Which of them
runs is decided at each call, outside of what Dynamo traces, so that it costs no guard and no recompilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule

CompiledGraph = Callable[..., Any]
CompileGraph = Callable[[GraphModule, Sequence[Any]], CompiledGraph]

_is_dense: ContextVar[bool] = ContextVar("sla2_is_dense", default=False)


@contextmanager
def dense() -> Iterator[None]:
    """Inside, models compiled with `backend="sla2"` run dense, as with Inductor alone.

    The first call inside compiles once more; after that both ways stay compiled, and going in and out costs nothing.

    Example:
        for i, t in enumerate(timesteps):
            with sla2_compile.dense() if i < 5 else contextlib.nullcontext():
                noise = transformer(latents, t)
    """
    token = _is_dense.set(True)
    try:
        yield
    finally:
        _is_dense.reset(token)


def with_dense_twin(
    converted: CompiledGraph, original: GraphModule, example_inputs: Sequence[Any], compile_graph: CompileGraph
) -> CompiledGraph:
    """`converted`, which runs `original` instead while somebody is inside `dense`.

    Args:
        converted: the compiled graph with SLA2.
        original: the same graph as it was traced.
        example_inputs: its fake inputs.
        compile_graph: a Dynamo backend, for the original.
    """

    @functools.cache
    def twin() -> CompiledGraph:
        # Traced anew, with guards of its own, which those of the converted graph cannot take any more. In a new module:
        # Dynamo does not trace one that was made while it was at work.
        traceable = GraphModule(original, original.graph)
        return torch.compile(traceable, backend=compile_graph, dynamic=any(map(_is_symbolic, example_inputs)) or None)

    def run(*args: Any) -> Any:
        return twin()(*args) if _is_dense.get() else converted(*args)

    return run


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy of a graph and the graphs nested in it, without what tracing noted on its nodes; tensors are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.meta = {}
    copied = GraphModule(gm, graph)
    for name, nested in gm.named_children():
        if isinstance(nested, GraphModule) and hasattr(copied, name):
            setattr(copied, name, copy_graph(nested))
    return copied


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, SymInt) or (isinstance(x, Tensor) and any(isinstance(size, SymInt) for size in x.shape))
