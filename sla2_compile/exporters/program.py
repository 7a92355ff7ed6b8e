"""Exported programs with `sla2::attention` in them, and the programs without it that other runtimes take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError
from torch.utils import _pytree as pytree

from sla2_compile.ops import forward_arguments, settings_of

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


def lengths_stay_symbolic() -> contextlib.AbstractContextManager[None]:
    """Inside, a size that could be 1, of kept blocks or blocks of a sequence, is no condition on the lengths."""
    return symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # installed at import time


def export_graph(graph: nn.Module, inputs: Inputs) -> ExportedProgram:
    """A module as an exported program, without gradients.

    Raises:
        ValueError: what stands in the way, with the reason and the line.
    """
    with explained_failures(graph), torch.no_grad(), lengths_stay_symbolic():
        return torch.export.export(
            graph, inputs.args, inputs.kwargs, dynamic_shapes=inputs.dynamic_shapes, strict=False
        )


def replace_attention(program: ExportedProgram, inputs: Inputs, attention: Attention) -> ExportedProgram:
    """`program` with the operations that `attention` is made of in place of `sla2::attention`."""
    module = program.module()
    for graph in graphs(module):
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
        autocasts = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocasts else contextlib.nullcontext():
            return forward(*arguments[:8], settings_of(arguments[9:]))

    return attention


def tensors_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Parameters, buffers and inputs."""
    given = pytree.tree_leaves((inputs.args, inputs.kwargs))
    return [*model.parameters(), *model.buffers(), *(x for x in given if isinstance(x, Tensor))]


def device_of(model: nn.Module, inputs: Inputs) -> torch.device:
    """The one device of a model and its inputs; a ValueError where there are several."""
    devices = {x.device for x in tensors_of(model, inputs)}
    if len(devices) > 1:
        raise ValueError(
            f"model: expected model and inputs on one device, got {', '.join(sorted(map(str, devices)))}; move them"
        )
    return devices.pop() if devices else torch.device("cpu")


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
            raise ValueError(_forbidden_range(error)) from error
        raise ValueError(_not_exportable(model, error)) from error
    except ConstraintViolationError as error:
        raise ValueError(_forbidden_range(error)) from error
    except NotImplementedError:
        # Says itself what is missing, although Python counts it among the errors below.
        raise
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        raise ValueError(_not_exportable(model, error)) from error


def _forbidden_range(error: Exception) -> str:
    return f"dynamic_shapes: expected ranges that the model and its attention's blocks allow, but {error}"


def _not_exportable(model: nn.Module, error: Exception) -> str:
    stack = getattr(error, "real_stack", None)
    line = f" at {stack[-1].filename}:{stack[-1].lineno}: {stack[-1].line}" if stack else ""
    reason = str(error).strip().partition("\n\n")[0]
    return (
        f"model: expected a {type(model).__name__} that can be traced as one graph, but{line or ' tracing failed'}: "
        f"{type(error).__name__}: {reason}. Change that line, or export the part of the model around it"
    )


def graphs(module: nn.Module) -> Iterator[GraphModule]:
    """A graph and those nested in it."""
    return (each for each in module.modules() if isinstance(each, GraphModule))
