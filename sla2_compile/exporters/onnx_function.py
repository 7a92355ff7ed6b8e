"""The ONNX node `sla2.Attention` and the functions that say what it computes.

    %out = sla2.Attention[sparsity_units=970000, block_q=128, ...](%q, %k, %v, %mask, %proj_q, %proj_k, %logit, %gain)
    model.functions: sla2.Attention(q, k, v, attn_mask, ...) => { ReduceMean, MatMul, TopK, Scan { Gather, ... } }

A model has one such function, or several overloads of it where its sites differ in more than their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sla2_compile.exporters.program import Inputs
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.traceable import tokens_first

DOMAIN, NAME, VERSION = "sla2", "Attention", 1
_INPUTS = ("q", "k", "v", "attn_mask", "proj_q", "proj_k", "alpha_logit", "alpha_gain")
_VARIANT = "sla2.variant"

# A forward from the eight tensors and the settings.
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class _Size:
    """A dimension of an input that is symbolic: what it is made of, and which numbers it takes."""

    expression: str
    hint: int
    lower: int
    upper: int | None


@dataclass(frozen=True)
class _Variant:
    """What two nodes must share to have the same function: the settings, and dtype and shape of every input."""

    settings: tuple[tuple[str, Any], ...]
    inputs: tuple[tuple[torch.dtype, tuple[int | _Size, ...]] | None, ...]


class AttentionFunctions:
    """Emits the nodes while a program is traced, and builds their functions afterwards."""

    def __init__(self) -> None:
        self.variants: list[_Variant] = []

    def node(self, *arguments: Any) -> Tensor:
        """One node, from the eight tensors (or None) and the settings of `sla2::attention_forward`."""
        *tensors, settings = arguments
        variant = _variant(tensors, settings)
        if variant not in self.variants:
            self.variants.append(variant)
        attributes = {name: value for name, value in variant.settings if value is not None}
        q = tensors[0]
        out = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            tensors,
            attributes,
            dtype=q.dtype,
            shape=q.shape,
            version=VERSION,
            metadata_props={_VARIANT: str(self.variants.index(variant))},
        )
        return tokens_first(out)

    def add_to(self, model: Any, build: Callable[[nn.Module, Inputs], Any], forward: Forward) -> None:
        """Put the functions of all emitted nodes into an `onnx_ir` model.

        Args:
            model: has the nodes.
            build: an ONNX model from a module and its example inputs.
            forward: what a node computes.
        """
        import onnx_ir as ir

        for i, variant in enumerate(self.variants):
            body, inputs = _Body(variant, forward), _example_inputs(variant)
            with torch.no_grad():
                graph = build(body, inputs).graph
            function = _as_function(ir, graph, variant, _overload(i))
            model.functions[function.identifier()] = function
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if (node.domain, node.op_type) == (DOMAIN, NAME):
                node.overload = _overload(int(node.metadata_props.pop(_VARIANT)))
        model.opset_imports[DOMAIN] = VERSION


def _overload(index: int) -> str:
    return str(index) if index else ""


def _variant(tensors: list[Tensor | None], settings: Settings) -> _Variant:
    # Not asdict, which copies: symbols cannot be copied.
    values = vars(settings)
    if any(isinstance(value, torch.SymInt) for value in pytree.tree_leaves(values)):
        raise NotImplementedError(
            'dynamic_shapes: expected a fixed number of text tokens and a fixed grid with onnx_op="custom", whose node '
            'has them as attributes; use onnx_op="standard", or leave them out with infer_layout=False'
        )
    return _Variant(
        tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items()),
        tuple(None if x is None else (x.dtype, tuple(map(_size, x.shape))) for x in tensors),
    )


def _size(size: int | torch.SymInt) -> int | _Size:
    if isinstance(size, int):
        return size
    node = size.node
    bounds = node.shape_env.bound_sympy(node.expr)
    upper = int(bounds.upper) if bounds.upper.is_Integer else None
    return _Size(str(node.expr), int(node.hint), int(bounds.lower), upper)


class _Body(nn.Module):
    """The forward of one variant, as a module that torch.export takes."""

    def __init__(self, variant: _Variant, forward: Forward) -> None:
        super().__init__()
        settings: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in variant.settings
        }
        self.settings = Settings(**settings)
        self.compute = forward
        self.given = [name for name, x in zip(_INPUTS, variant.inputs, strict=True) if x is not None]

    def forward(self, tensors: list[Tensor]) -> Tensor:
        by_name = dict(zip(self.given, tensors, strict=True))
        return self.compute(*(by_name.get(name) for name in _INPUTS), self.settings)


def _example_inputs(variant: _Variant) -> Inputs:
    """Tensors of the variant's shapes, whose equal symbolic sizes are one dynamic dimension."""
    tensors, shapes = [], []
    dims: dict[str, Any] = {}
    for each in variant.inputs:
        if each is None:
            continue
        dtype, sizes = each
        tensors.append(torch.ones([x if isinstance(x, int) else x.hint for x in sizes], dtype=dtype))
        dynamic = {}
        for i, size in enumerate(sizes):
            if isinstance(size, _Size):
                dim = Dim(f"length{len(dims)}", min=size.lower, max=size.upper)
                dynamic[i] = dims.setdefault(size.expression, dim)
        shapes.append(dynamic)
    return Inputs((tensors,), {}, (shapes,) if dims else None)


def _as_function(ir: Any, graph: Any, variant: _Variant, overload: str) -> Any:
    """A graph as the body of a function with all eight inputs."""
    for name, value in list(graph.initializers.items()):
        # A function has no initializers.
        constant = ir.node("Constant", [], {"value": value.const_value}, name=f"constant_{name}")
        constant.outputs[0].name = f"{name}_value"
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[name]
    given = iter(list(graph.inputs))
    inputs = [ir.Value() if x is None else next(given) for x in variant.inputs]
    for name, value in zip(_INPUTS, inputs, strict=True):
        value.name = name
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    kinds = {int: "INT", float: "FLOAT", str: "STRING", tuple: "INTS", bool: "INT"}
    attributes = [
        ir.Attr(name, ir.AttributeType[kinds[type(value)]], None)
        for name, value in variant.settings
        if value is not None
    ]
    return ir.Function(DOMAIN, NAME, overload, graph=graph, attributes=attributes)
