"""The format "onnx": a graph of standard operators that gathers the kept keys and values, or one `sla2.Attention` node.

The node's meaning is a function in the same model, so that it runs everywhere and a runtime may replace it. INT8 is
QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sla2_compile.exporters.onnx_function import AttentionFunctions
from sla2_compile.exporters.program import (
    Inputs,
    Run,
    attention_from,
    device_of,
    export_graph,
    replace_attention,
    tensors_of,
)
from sla2_compile.kernels import traceable
from sla2_compile.quant.formats import format_scale, quantized_by, round_trip

SUFFIX = ".onnx"
METADATA = "sla2"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

OnnxOp = Literal["standard", "custom"]


def check_requirements(model: nn.Module, inputs: Inputs) -> None:
    """Raise where a model cannot become an ONNX model and be checked.

    Raises:
        ImportError: packages that are missing.
        NotImplementedError: bfloat16, in which onnxruntime does not compute on a CPU.
        ValueError: a model that is not on the CPU.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"format: expected {', '.join(missing)} for 'onnx', not installed here; pip install 'sla2-compile[export]'"
        )
    if (device := device_of(model, inputs)).type != "cpu":
        raise ValueError(f"format: expected a model on the CPU for 'onnx', got one on {device}; call model.cpu()")
    if any(x.dtype == torch.bfloat16 for x in tensors_of(model, inputs)):
        raise NotImplementedError(
            "format: expected a float32 or float16 model and inputs for 'onnx', got bfloat16, in which onnxruntime "
            "does not compute on a CPU; convert them with .float()"
        )


def write(program: ExportedProgram, inputs: Inputs, path: Path, metadata: dict[str, Any], *, onnx_op: OnnxOp) -> None:
    """Write an ONNX model.

    Args:
        program: with `sla2::attention`.
        inputs: what it was traced with.
        path: of the file; weights beyond 2 GB go to a second one beside it.
        metadata: plain values, for the model's metadata.
        onnx_op: "standard" operators in place of each attention, or one "custom" node with a function as its body.
    """
    if onnx_op == "standard":
        model = as_onnx(replace_attention(program, inputs, attention_from(_standard_forward)))
    else:
        functions = AttentionFunctions()
        model = as_onnx(replace_attention(program, inputs, attention_from(functions.node)))
        functions.add_to(model.model, lambda body, given: as_onnx(export_graph(body, given)).model, _standard_forward)
    model.model.metadata_props[METADATA] = json.dumps(metadata)
    model.save(str(path))


def as_onnx(program: ExportedProgram) -> Any:
    """torch's ONNXProgram of an exported program."""
    from onnxscript.optimizer import optimize_ir

    with torch.no_grad():
        made: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, optimize=False, custom_translation_table=_TRANSLATIONS
        )
    # Constants are folded, but what was learned stays, under its name.
    optimize_ir(made.model, should_fold=lambda node: False if any(map(_is_learned, node.inputs)) else None)
    return made


def _is_learned(value: Any) -> bool:
    return value is not None and value.is_initializer() and ".sla2." in f".{value.name}"


def load(path: Path) -> tuple[Run, dict[str, Any]]:
    """An ONNX model as a function from the model's arguments to a list of its outputs, and its metadata."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise NotImplementedError(
            f"format: expected a model that onnxruntime {onnxruntime.__version__} runs on a CPU, but {error}; the node "
            "that it names is in the model's own part: convert that part to float32, or write it with other operators"
        ) from error
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        feed = {name: x.detach().numpy() for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feed)]

    return run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA])


def _standard_forward(*args: Any) -> Tensor:
    with quantized_by(_quantize_linear):
        return traceable.forward(*args, fused=False)


def _quantize_linear(x: Tensor, number_format: str, dims: tuple[int, ...]) -> Tensor:
    """`quantize_dequantize` of blocks (..., b, D) as the two operators that ONNX has for it."""
    if number_format != "int8":
        return round_trip(x, number_format, dims)
    assert dims == (-2, -1)
    rows = x.reshape(-1, x.shape[-2] * x.shape[-1])
    scale = format_scale(rows, number_format, (1,))[:, 0]
    zero = torch.zeros_like(scale, dtype=torch.int8)
    symbolic = functools.partial(torch.onnx.ops.symbolic, attrs={"axis": 0}, shape=rows.shape)
    codes = symbolic("QuantizeLinear", (rows, scale, zero), dtype=torch.int8)
    return symbolic("DequantizeLinear", (codes, scale, zero), dtype=x.dtype).view(x.shape)


# What follows torch's exporter lacks, or has without broadcasting.
def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """aten::sort.stable: TopK of all elements, whose ties ONNX gives to the lower index."""
    from onnxscript import opset18 as op

    last: Any = op.Constant(value_ints=[dim])
    size = op.Gather(op.Shape(x), last, axis=0)
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    """aten::copy: `source` in the shape and dtype of `x`."""
    from onnxscript import opset18 as op

    return op.Expand(op.CastLike(source, x), op.Shape(x))


def _masked_fill(x: Any, mask: Any, value: Any) -> Any:
    """aten::masked_fill, of booleans too, for which onnxruntime has no Where."""
    from onnxscript import opset18 as op

    value = op.CastLike(value, x)
    if x.dtype != x.dtype.BOOL:
        return op.Where(mask, value, x)
    return op.Or(op.And(mask, value), op.And(op.Not(mask), x))


_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.masked_fill.Scalar: _masked_fill,
    torch.ops.aten.masked_fill.Tensor: _masked_fill,
}
