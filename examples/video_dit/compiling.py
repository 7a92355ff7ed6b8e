"""Compile the blocks of a model, each on its own, so that all of them share one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch._dynamo import lookup_backend

from examples.video_dit.model import VideoDiT
from sla2_compile.backend import build_backend, sla2
from sla2_compile.config import SLA2Config

# "aot_eager" runs the same rewritten graphs without generating code for them: it starts at once and is slower.
Compiler = Literal["inductor", "aot_eager"]
COMPILERS = get_args(Compiler)


def compile_blocks(model: VideoDiT, options: Mapping[str, Any] | None, compiler: Compiler) -> None:
    """Compile every block: with `backend="sla2"` and these options, or dense where there are none.

    Compiling again for other options, such as the next sparsity of a ramp, takes the place of what was compiled before.
    """
    # Dynamo keeps a few versions of a function and then, with a warning only, runs it uncompiled: here dense. A ramp
    # has many levels, so old versions go.
    torch.compiler.reset()
    backend: Any = compiler
    settings: dict[str, Any] = {}
    if options is not None and compiler == "inductor":
        # By its name, backend="sla2", where the package is installed; the function also serves a bare checkout.
        backend, settings = sla2, {"options": dict(options)}
    elif options is not None:
        compile_graph: Any = lookup_backend(compiler)
        is_default = "sparsity" not in options
        backend = build_backend(SLA2Config.from_options(options), compile_graph, sparsity_is_default=is_default)
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False, **settings)
