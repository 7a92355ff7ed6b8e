"""The format "pt2": a saved ExportedProgram, with `sla2::attention` in it or, portable, the ATen that it is made of."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sla2_compile.exporters.program import Inputs, Run, attention_from, replace_attention
from sla2_compile.kernels import traceable

SUFFIX = ".pt2"
METADATA = "sla2.json"


def check_requirements(model: nn.Module, inputs: Inputs) -> None:
    """Nothing beside PyTorch is needed."""


def write(program: ExportedProgram, inputs: Inputs, path: Path, metadata: dict[str, Any], *, portable: bool) -> None:
    """Save a program, with the metadata as an extra file of the archive.

    Args:
        program: with `sla2::attention`.
        inputs: what it was traced with.
        path: of the file.
        metadata: plain values.
        portable: save what attention is made of; the file then loads where this package is not installed.
    """
    if portable:
        # Explicit operations: PyTorch's own decomposition of its CPU kernel gives another log-sum-exp.
        attention = attention_from(functools.partial(traceable.forward, fused=False))
        program = replace_attention(program, inputs, attention)
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def load(path: Path) -> tuple[Run, dict[str, Any]]:
    """A saved program as a function, and its metadata."""
    files = {METADATA: ""}
    module = torch.export.load(path, extra_files=files).module()
    return module, json.loads(files[METADATA])
