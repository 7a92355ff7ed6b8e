"""Trace a model into a graph with converted attention, ready for torch.export.

    model --Dynamo--> torch-level graph --convert--> the same with sla2::attention

The graph that Dynamo hands to a backend is converted, and only then exported: the passes see what they see when the
model is compiled, and find the same sites under the same names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import bound_sympy

from sla2_compile.config import SLA2Config
from sla2_compile.exporters.program import Inputs, explained_failures, graphs
from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

# Owner, call and parameter of learned state; see `learned_state.py`.
_LEARNED = re.compile(r"((?:.*\.)?sla2)\.(call\d+)_(?:any|\d+)\.(\w+)")


def trace_model(
    model: nn.Module, inputs: Inputs, config: SLA2Config, *, sparsity_is_default: bool
) -> tuple[GraphModule, list[Site]]:
    """The model as a torch-level graph with converted attention and parameters under the model's own names.

    Raises:
        ValueError: a model that Dynamo cannot trace whole, with the reason and the line; or dynamic lengths for which
            the conversion holds in part only.
    """
    with explained_failures(model), torch.no_grad():
        exported = torch._dynamo.export(model, assume_static_by_default=True, dynamic_shapes=inputs.dynamic_shapes)
        graph = exported(*inputs.args, **inputs.kwargs).graph_module
    _replace_data(graph)
    shape_env = _shape_env(graph)
    num_guards = len(shape_env.guards) if shape_env is not None else 0
    # As the user gave them: a condition that the conversion adds narrows them.
    ranges = dict(shape_env.var_to_range) if shape_env is not None else {}
    sites = convert(graph, config, sparsity_is_default=sparsity_is_default)
    _check_lengths(sites, config, ranges)
    if shape_env is not None and (added := shape_env.guards[num_guards:]):
        conditions = "; ".join(sorted({str(guard.expr) for guard in added}))
        raise ValueError(
            "dynamic_shapes: expected ranges for which every site is decided alike, but the conversion holds only "
            f"where {conditions}; narrow the ranges, or leave sites out with exclude=[...]"
        )
    return _with_names_of(graph, model), sites


def _replace_data(module: GraphModule) -> None:
    """`x.data`, which torch.export cannot trace, by `x.detach()`; without gradients they are the same."""
    for graph in graphs(module):
        for node in graph.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "__name__", "") == "_get_data_attr":
                node.target = torch.Tensor.detach
        graph.recompile()


def _shape_env(graph: GraphModule) -> ShapeEnv | None:
    """Where the symbolic sizes of a graph live; None where it has none."""
    for node in graph.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        for size in getattr(value, "shape", ()):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _check_lengths(sites: list[Site], config: SLA2Config, ranges: Mapping[Any, Any]) -> None:
    """Raise ValueError for a converted site whose dynamic length may be shorter than its blocks need."""
    needed = max(config.block_q, config.block_k) + 1
    for site in sites:
        if site.verdict != "sla2":
            continue
        for length in (site.q_shape[2], site.kv_len):
            if not isinstance(length, torch.SymInt):
                continue
            shortest = bound_sympy(length.node.expr, dict(ranges)).lower
            least, why = max(
                (needed, f"two blocks (block_q={config.block_q}, block_k={config.block_k})"),
                (config.min_seq_len, f"min_seq_len={config.min_seq_len}"),
            )
            if shortest < least:
                raise ValueError(
                    f"dynamic_shapes: expected lengths from {least} tokens on at {site.name}, because of {why}, got "
                    f"a range that begins at {shortest}; raise its lower end, or change that setting"
                )


def _with_names_of(graph: GraphModule, model: nn.Module) -> GraphModule:
    """The graph as a module of its own, with the tensors that it reads under the model's names."""
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), name)
    read: dict[str, Any] = {}
    for node in list(graph.graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.graph.erase_node(node)
            continue
        value: Any = graph
        for part in node.target.split("."):
            value = getattr(value, part)
        node.target = names.get(id(value), node.target.replace(".", "_"))
        read[node.target] = value
    shorter = short_names(read)
    for node in graph.graph.find_nodes(op="get_attr"):
        node.target = shorter[node.target]
    root = _as_module({shorter[name]: value for name, value in read.items()})
    return GraphModule(root, graph.graph, type(model).__name__)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the call and the sparsity that learned state belongs to, as far as they stay different.

    `blocks.0.attn1.sla2.call0_950000.proj_q` -> `blocks.0.attn1.sla2.proj_q`, or `...sla2.call0.proj_q`.
    """
    choices = {name: [name] for name in names}
    for name, shorter in choices.items():
        if learned := _LEARNED.fullmatch(name):
            owner, call, parameter = learned.groups()
            shorter[:0] = [f"{owner}.{parameter}", f"{owner}.{call}.{parameter}"]
    count = Counter(choice for shorter in choices.values() for choice in shorter)
    return {name: next((choice for choice in shorter if count[choice] == 1), name) for name, shorter in choices.items()}


def _as_module(values: Mapping[str, Any]) -> nn.Module:
    """A module that holds parameters, buffers and modules under dotted names."""
    root = nn.Module()
    for name, value in values.items():
        *path, attribute = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(value, nn.Parameter):
            # The same memory, but nothing that an exporter would build a backward for.
            setattr(owner, attribute, nn.Parameter(value.detach(), requires_grad=False))
        elif isinstance(value, Tensor):
            owner.register_buffer(attribute, value)
        else:
            setattr(owner, attribute, value)
    return root
