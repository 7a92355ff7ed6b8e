"""Which stage a CUDA kernel belongs to, by its name and by the file of this project that defines it."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import sla2_compile

Rules = tuple[tuple[str, tuple[str, ...]], ...]

OTHER = "other"
SLA2 = "SLA2"
DENSE = ("dense attention", ("flash", "cudnn", "sdpa", "fmha"))
# A kernel's label is "<files that define it> <its name>"; the first rule with a word in the label decides.
FORWARD: Rules = (
    DENSE,
    ("linear tail", ("linear", "states", "tail_sums", "nvjet", "cutlass", "gemm", "xmma")),
    ("quantisation", ("low_bit", "codes", "one_pass")),
    ("block means", ("statistics",)),
    ("router", ("rout", "choose", "bits", "topk", "sort", "order")),
    ("sparse + tail", ("attention", "mixture")),
)
BACKWARD: Rules = (
    ("linear tail", ("linear", "states", "nvjet", "cutlass", "gemm", "xmma")),
    ("index", ("inverse_index", "statistics", "rows")),
    ("tail", ("tail",)),
    ("dq", ("queries",)),
    ("dk, dv", ("keys",)),
)
MODEL: Rules = (
    ("SLA2 attention", (SLA2,)),
    DENSE,
    ("Inductor", ("triton_",)),
    ("matmul", ("nvjet", "cutlass", "gemm", "xmma", "cublas")),
)


@functools.cache
def own_kernels() -> dict[str, tuple[str, ...]]:
    """Names of this package's Triton kernels, with the files (without suffix) that define one of that name."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((Path(sla2_compile.__file__).parent / "kernels").glob("*_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                found[node.name] = (*found.get(node.name, ()), path.stem)
    return found


def stage_of(kernel: str, rules: Rules) -> str:
    """The stage of a kernel; `OTHER` where no rule knows it."""
    files = own_kernels().get(kernel, ())
    if rules is MODEL:
        label = SLA2 if files else kernel
    else:
        # A kernel of the forward may share its name with one of the backward, and the backward may use the forward's.
        same_side = tuple(file for file in files if ("backward" in file) == (rules is BACKWARD))
        label = " ".join((*(same_side or files), kernel.lstrip("_")))
    for stage, words in rules:
        if any(word in label for word in words):
            return stage
    return OTHER


def group(kernels: dict[str, float], rules: Rules) -> dict[str, float]:
    """Milliseconds per stage, in the order of the rules, from milliseconds per kernel."""
    total = dict.fromkeys([*(stage for stage, _ in rules), OTHER], 0.0)
    for kernel, ms in kernels.items():
        total[stage_of(kernel, rules)] += ms
    return {stage: ms for stage, ms in total.items() if ms}
