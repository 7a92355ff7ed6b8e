"""The format "aoti": a package that AOTInductor compiles, with no operator of ours and no Python left in it.

On a CPU attention is C++ over the kept blocks with PyTorch's own softmax attention inside; on CUDA the Triton kernels
of `kernels/packaged.py` are part of the package.
"""

from __future__ import annotations

import functools
import json
import operator
import shutil
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sla2_compile.exporters.program import (
    Inputs,
    Run,
    attention_from,
    device_of,
    lengths_stay_symbolic,
    replace_attention,
    user_inputs,
)
from sla2_compile.kernels import traceable
from sla2_compile.kernels.dispatch import missing_for_triton

SUFFIX = ".pt2"
METADATA = "sla2"
COMPILERS = ("c++", "g++", "clang++")
# PyTorch's own packages bring the first, not the others.
CUDA_HEADERS = ("cuda.h", "crt/host_defines.h", "nv/target")

# Inductor's setting by which numbers reach Triton kernels in float64; a launch from Python hands over float32.
_WIDE_FLOATS = "_use_fp64_for_unbacked_floats"


def check_requirements(model: nn.Module, inputs: Inputs) -> None:
    """Raise where a model cannot be compiled into a package.

    Raises:
        OSError: no C++ compiler, or for CUDA no headers of its toolkit.
        NotImplementedError: another device, a GPU or an installation that cannot run the Triton kernels, or dynamic
            lengths where they cannot be compiled yet.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise OSError(f"format: expected a C++ compiler for 'aoti', got none of {', '.join(COMPILERS)}; install one")
    device = device_of(model, inputs)
    if device.type == "cuda":
        if missing := missing_for_triton(device):
            raise NotImplementedError(f"format: 'aoti' on {device} {missing}")
        _check_headers()
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"format: expected a model on a CPU or CUDA for 'aoti', got one on {device}; move it")
    if inputs.dynamic_shapes is None:
        return
    if device.type == "cuda":
        raise NotImplementedError(
            "dynamic_shapes: expected None for an 'aoti' package on CUDA, whose kernels are compiled for one length; "
            "export a package per length"
        )
    if not _has_loops():
        raise NotImplementedError(
            f"dynamic_shapes: expected None for an 'aoti' package with PyTorch {torch.__version__}, which cannot "
            "compile loops; upgrade to 2.13, or export a package per length"
        )


def _check_headers() -> None:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    missing = [name for name in CUDA_HEADERS if home is None or not (Path(home) / "include" / name).exists()]
    if missing:
        raise OSError(
            f"format: expected the CUDA toolkit's headers for 'aoti' on CUDA, got no {', '.join(missing)} in "
            f"{'any toolkit' if home is None else Path(home) / 'include'}; install the toolkit, or "
            "`pip install nvidia-cuda-crt nvidia-cuda-cccl` in the version of torch.version.cuda and set CUDA_HOME to "
            "the folder nvidia/cu13 among the installed packages"
        )


def _has_loops() -> bool:
    """Whether AOTInductor writes loops in C++."""
    return torch.__version__ >= "2.13"


def write(program: ExportedProgram, inputs: Inputs, path: Path, metadata: dict[str, Any]) -> None:
    """Compile a program into a package for the device that it was traced on.

    Args:
        program: with `sla2::attention`.
        inputs: what it was traced with.
        path: of the file.
        metadata: plain values.
    """
    if device_of(program.module(), inputs).type == "cuda":
        from sla2_compile.kernels import packaged

        forward = packaged.forward
    else:
        forward = functools.partial(traceable.forward, fused=True, loop=_has_loops())
    program = replace_attention(program, inputs, attention_from(forward))
    bind_symbols(program)
    settings: dict[str, Any] = {
        "aot_inductor.metadata": {METADATA: json.dumps(metadata)},
        # Small tensors too stay constants with a name, and are not written into the code.
        "always_keep_tensor_constants": True,
    }
    if hasattr(torch._inductor.config, _WIDE_FLOATS):
        settings[_WIDE_FLOATS] = False
    with torch.no_grad(), lengths_stay_symbolic():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def load(path: Path) -> tuple[Run, dict[str, Any]]:
    """A package as a function, and its metadata."""
    package = torch._inductor.aoti_load_package(str(path))
    return package, json.loads(package.get_metadata()[METADATA])


def bind_symbols(program: ExportedProgram) -> int:
    """Hand every loop of a program the symbols that its results' sizes are made of; how many were handed over.

    Inductor rebuilds those sizes from the loop's operands, but reads a symbol only from one that is that symbol alone:

        %y = scan(%step, [...], [...], (%q, %sym_size))       %q (64*s, 16), %sym_size = 64*s
        ->  ... (%q, %sym_size, %s)                           %s = %sym_size // 64
    """
    graph, num_bound = program.graph, 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
        step, init, xs, operands = node.args
        given = {_expression(x) for x in operands if isinstance(x, Node)}
        needed = {symbol for out in node.meta["val"] for size in out.shape for symbol in _free_symbols(size)} - given
        nested = program.graph_module.get_submodule(step.target)
        for symbol in sorted(needed, key=str):
            with graph.inserting_before(node):
                value = _read_symbol(program, symbol)
            operands = (*operands, value)
            _add_placeholder(nested, value)
            num_bound += 1
        node.args = (step, init, xs, operands)
    graph.lint()
    program.graph_module.recompile()
    return num_bound


def _expression(node: Node) -> Any:
    value = node.meta.get("val")
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _free_symbols(size: Any) -> set[sympy.Symbol]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def _read_symbol(program: ExportedProgram, symbol: sympy.Symbol) -> Node:
    """A node for a symbol, from an input with a size that is a multiple of it plus a number."""
    graph = program.graph
    for node in user_inputs(program):
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if _free_symbols(size) != {symbol}:
                continue
            factor, offset = sympy.Poly(size.node.expr, symbol).all_coeffs()[-2:]
            if size.node.expr != factor * symbol + offset:
                continue
            read = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
            read.meta["val"] = value = size
            if offset != 0:
                read = graph.call_function(operator.sub, (read, int(offset)))
                read.meta["val"] = value = value - int(offset)
            if factor != 1:
                read = graph.call_function(operator.floordiv, (read, int(factor)))
                read.meta["val"] = value // int(factor)
            return read
    raise NotImplementedError(
        "dynamic_shapes: expected every dynamic dimension to be a multiple of one Dim plus a number, got none that "
        f"gives {symbol}; use such a Dim in one input"
    )


def _add_placeholder(graph: GraphModule, value: Node) -> None:
    """One more input, which the loop's step does not use."""
    last = graph.graph.find_nodes(op="placeholder")[-1]
    with graph.graph.inserting_after(last):
        new = graph.graph.placeholder(f"symbol_{value.name}")
    new.meta["val"] = value.meta["val"]
    graph.recompile()
