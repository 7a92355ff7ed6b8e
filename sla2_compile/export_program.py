"""From a model to an exported program with its attention converted, and on to programs that other runtimes take.

    model --Dynamo--> torch-level graph --convert--> the same with sla2::attention --torch.export--> ExportedProgram

The graph that Dynamo hands to a backend is converted, and only then exported: the passes see what they see when the
model is compiled, and find the same sites under the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sla2_compile.config import SLA2Config
from sla2_compile.ops import forward_arguments, settings_of
from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

# A function with the signature of `sla2::attention`.
Attention = Callable[..., Tensor]

# A loaded artefact: takes the model's arguments, gives its outputs.
Run = Callable[..., Any]


@dataclass(frozen=True)
class Inputs:
    """What a model is traced with.

    Args:
        args, kwargs: example inputs.
        dynamic_shapes: as torch.export takes it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any = None


def capture(
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
    sites = convert(graph, config, sparsity_is_default=sparsity_is_default)
    _check_lengths(sites, config)
    if shape_env is not None and (added := shape_env.guards[num_guards:]):
        conditions = "; ".join(sorted({str(guard.expr) for guard in added}))
        raise ValueError(
            f"dynamic_shapes: expected ranges for which every site is decided alike, but the conversion holds only where "
            f"{conditions}; narrow the ranges, or leave sites out with exclude=[...]"
        )
    return _with_names_of(graph, model), sites


def export_graph(graph: nn.Module, inputs: Inputs) -> ExportedProgram:
    """A module as an exported program, without gradients.

    Raises:
        ValueError: what stands in the way, with the reason and the line.
    """
    # Without this every size that could be 1 becomes a condition on the lengths: kept blocks, or blocks of a sequence.
    with explained_failures(graph), torch.no_grad(), symbolic_config.patch(backed_size_oblivious=True):
        return torch.export.export(
            graph, inputs.args, inputs.kwargs, dynamic_shapes=inputs.dynamic_shapes, strict=False
        )


def replace_attention(program: ExportedProgram, inputs: Inputs, attention: Attention) -> ExportedProgram:
    """`program` with the operations that `attention` is made of in place of `sla2::attention`."""
    module = program.module()
    for graph in _graphs(module):
        for node in graph.graph.nodes:
            if node.target is torch.ops.sla2.attention.default:
                node.target = attention
        graph.recompile()
    return export_graph(module, inputs)


def attention_from(forward: Callable[..., Tensor]) -> Attention:
    """What stands for `sla2::attention` in a graph, from a forward that takes its checked arguments and settings."""

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        arguments = forward_arguments(*args, **kwargs)
        device = arguments[0].device.type
        # The precision of every step is the forward's own choice, so autocast must not reach inside.
        keeps = contextlib.nullcontext() if not torch.is_autocast_enabled(device) else torch.autocast(device, enabled=False)
        with keeps:
            return forward(*arguments[:8], settings_of(arguments[9:]))

    return attention


def operators(program: ExportedProgram) -> set[str]:
    """Names of all operators of a program, also in the graphs nested in it: "aten::mul" and so on."""
    nodes = (node for graph in _graphs(program.graph_module) for node in graph.graph.nodes)
    return {node.target.name() for node in nodes if isinstance(node.target, torch._ops.OpOverload)}


def user_inputs(program: ExportedProgram) -> list[Node]:
    """The placeholders of the model's inputs."""
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def symbolic_sizes(program: ExportedProgram) -> set[Any]:
    """The symbols that the sizes of the inputs are made of."""
    return {
        symbol
        for node in user_inputs(program)
        for size in getattr(node.meta.get("val"), "shape", ())
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }


@contextmanager
def explained_failures(model: nn.Module) -> Iterator[None]:
    """Inside, what Dynamo and torch.export cannot do is a ValueError with the reason and the line of the model."""
    try:
        yield
    except torch._dynamo.exc.UserError as error:
        if error.error_type == torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION:
            raise ValueError(
                f"dynamic_shapes: expected ranges that the model and its attention's blocks allow, but {error}"
            ) from error
        raise ValueError(_not_exportable(model, error)) from error
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        raise ValueError(_not_exportable(model, error)) from error


def _not_exportable(model: nn.Module, error: Exception) -> str:
    stack = getattr(error, "real_stack", None)
    line = f" at {stack[-1].filename}:{stack[-1].lineno}: {stack[-1].line}" if stack else ""
    reason = str(error).strip().partition("\n\n")[0]
    return (
        f"model: expected a {type(model).__name__} that can be traced as one graph, but{line or ' tracing failed'}: "
        f"{type(error).__name__}: {reason}. Change that line, or export the part of the model around it"
    )


def _graphs(module: nn.Module) -> Iterator[GraphModule]:
    return (each for each in module.modules() if isinstance(each, GraphModule))


def _replace_data(module: GraphModule) -> None:
    """`x.data`, which torch.export cannot trace, by `x.detach()`; without gradients they are the same."""
    for graph in _graphs(module):
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
                return size.node.shape_env  # type: ignore[no-any-return]
    return None


def _check_lengths(sites: list[Site], config: SLA2Config) -> None:
    """Raise ValueError for a converted site whose dynamic length may be shorter than its blocks need."""
    needed = max(config.block_q, config.block_k) + 1
    for site in sites:
        if site.verdict != "sla2":
            continue
        for length in (site.q_shape[2], site.kv_len):
            if not isinstance(length, torch.SymInt):
                continue
            shortest = length.node.shape_env.bound_sympy(length.node.expr).lower
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
    values: dict[str, Any] = {}
    for node in list(graph.graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.graph.erase_node(node)
            continue
        value: Any = graph
        for part in node.target.split("."):
            value = getattr(value, part)
        node.target = names.get(id(value), node.target.replace(".", "_"))
        values[node.target] = value
    return GraphModule(_as_module(values), graph.graph)


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
