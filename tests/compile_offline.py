"""Compile every kernel for every supported GPU, without a GPU: `python tests/compile_offline.py [--quick]`.

The launchers themselves choose what is compiled: they run on tensors without memory for a GPU that is only described,
and each launch is recorded in place of being made. So block sizes, warps, stages and what Triton specialises on
(divisibility, constants) are those of a real call. Prints registers, shared memory, spills and how many of their
loads and stores are in loops, of each kernel; fails if one spills, does not fit, does not compile, or is launched by no
case, and if a GPU lacks a number format that it should have.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import machine_code
import offline_cases
import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import sla2_compile.kernels
from sla2_compile.kernels import hardware
from sla2_compile.kernels.dispatch import missing_for_format
from sla2_compile.kernels.hardware import Hardware

# Shared memory per program and multiprocessors of an A100, RTX 3090, RTX 4090, H200, B200 and RTX 5090.
GPUS = {
    80: Hardware((8, 0), 163 * 1024, 108),
    86: Hardware((8, 6), 99 * 1024, 82),
    89: Hardware((8, 9), 99 * 1024, 128),
    90: Hardware((9, 0), 227 * 1024, 132),
    100: Hardware((10, 0), 227 * 1024, 148),
    120: Hardware((12, 0), 99 * 1024, 170),
}
# Registers of a multiprocessor, of each of them.
REGISTERS = 64 * 1024
# What the tensor cores of these GPUs multiply, said here once more so that a mistake of `dispatch.py` shows.
FORMATS = {80: {"int8"}, 86: {"int8"}} | {arch: {"int8", "fp8"} for arch in (89, 90, 100, 120)}

# Their registers are divided among groups of warps by hand, so a block's scalars, used outside their loops, may be in
# local memory; every other kernel has no stack.
DIVIDE_REGISTERS = (
    "gluon_attention.attention_kernel",
    "gluon_backward_keys.keys_kernel",
    "gluon_backward_queries.queries_kernel",
    "gluon_backward_tail.tail_kernel",
    "gluon_fp8_attention.fp8_attention_kernel",
    "gluon_tail_sums.tail_sums_kernel",
)
# So many programs of these are meant to share a multiprocessor, whose shared memory is 228 KB, 1 KB a program apart.
SHARING = {"gluon_fp8_attention.fp8_attention_kernel": 2, "gluon_states.states_kernel": 3}
SHARED_MEMORY, RESERVED = 228 * 1024, 1024


@dataclass(frozen=True)
class Launch:
    """What Triton would compile for a launch, and the case that made it."""

    case: str
    arch: int
    function: Any  # the jit function
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    @property
    def key(self) -> str:
        return repr((self.arch, self.kernel, self.signature, self.constants, self.attributes, self.options))

    @property
    def kernel(self) -> str:
        return kernel_name(self.function)


@dataclass(frozen=True)
class Compiled:
    kernel: str
    case: str
    arch: int
    num_warps: int
    registers: int | None
    shared_memory: int | None
    stack_bytes: int | None
    local_in_loops: int | None  # loads and stores of spilled bytes in loops with tensor-core instructions
    problem: str  # empty where all is well


def kernel_name(function: Any) -> str:
    """The file and name of a jit function."""
    return f"{function.fn.__module__.rsplit('.', 1)[1]}.{function.fn.__name__.strip('_')}"


class DescribedGPU:
    """Stands in for Triton's driver, as far as a launch that is only recorded asks it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Kernels keep what they know of a device under its number.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def described_gpu(arch: int, launches: dict[str, Launch], label: str) -> Iterator[None]:
    """Within, launches are for the GPU `arch` and go into `launches`; nothing is compiled."""

    def record(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
    ) -> None:
        launch = Launch(label, arch, self, signature, constexprs, attrs, options)
        launches.setdefault(launch.key, launch)

    with ExitStack() as stack:
        stack.callback(driver.set_active, driver._active)
        driver.set_active(DescribedGPU(arch))
        stack.enter_context(mock.patch.object(hardware, "hardware_of", return_value=GPUS[arch]))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", record))
        yield


def record_launches(arch: int, cases: Iterable[offline_cases.Case]) -> tuple[list[Launch], dict[str, str]]:
    """The different launches of the cases on a GPU, and why it does not have the formats it does not have."""
    launches: dict[str, Launch] = {}
    missing: dict[str, str] = {}
    for case in cases:
        with described_gpu(arch, launches, case.name):
            reasons = {f: missing_for_format(f, torch.device("cuda")) for f in (case.qk_format, case.pv_format) if f}
            refused = {f: reason for f, reason in reasons.items() if reason is not None}
            missing |= refused
            if not refused:
                case.call()
    return list(launches.values()), missing


def compile_launch(launch: Launch) -> Compiled:
    """Compile one kernel and read what it needs from the machine code."""
    source = launch.function.ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    label = (launch.kernel, launch.case, launch.arch, launch.options.num_warps)
    try:
        target = GPUTarget("cuda", launch.arch, 32)
        kernel = triton.compile(source, target=target, options=launch.options.__dict__)
        registers, stack = machine_code.resource_usage(kernel.asm["cubin"])
        in_loops = machine_code.local_accesses_in_loops(kernel.asm["cubin"]) if stack else 0
    except Exception as error:  # whatever stops one kernel is a row of the table
        return Compiled(*label, None, None, None, None, _short(error))
    shared, limit = kernel.metadata.shared, GPUS[launch.arch].shared_memory
    problems = []
    if launch.kernel not in DIVIDE_REGISTERS:
        problems += ["spills"] if stack else []
    elif in_loops is None:
        problems.append("has no loop with tensor-core instructions, so nothing is known of its spills")
    elif in_loops:
        problems.append("spills in its loops")
    programs = SHARING.get(launch.kernel, 1)
    if programs * (shared + RESERVED) > SHARED_MEMORY:
        problems.append(f"{programs} programs do not fit into a multiprocessor")
    if shared > limit:
        problems.append(f"needs more than {limit} bytes of shared memory")
    if registers * 32 * launch.options.num_warps > REGISTERS and launch.kernel not in DIVIDE_REGISTERS:
        problems.append(f"needs more than {REGISTERS} registers")
    return Compiled(*label, registers, shared, stack, in_loops, ", ".join(problems))


def unlaunched_kernels(launches: Iterable[Launch]) -> list[str]:
    """Kernels of the package that no case launches, so that nobody knows whether they compile."""
    path = sla2_compile.kernels.__path__
    names = [f"sla2_compile.kernels.{module.name}" for module in pkgutil.iter_modules(path)]
    functions = [x for name in names for x in vars(importlib.import_module(name)).values()]
    kernels = {kernel_name(x) for x in functions if isinstance(x, JITFunction) and x.fn.__name__.endswith("_kernel")}
    return sorted(kernels - {launch.kernel for launch in launches})


def _short(error: Exception) -> str:
    """An error in one line, without the source that Triton shows before the reason."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 200 else '...' + text[-200:]}"


_launches: list[Launch] = []


def _compile_number(i: int) -> Compiled:
    return compile_launch(_launches[i])


def compile_all(launches: list[Launch], num_processes: int) -> list[Compiled]:
    """Compile in parallel, with a progress bar."""
    # Launches refer to modules and layouts; forked processes have them without sending them.
    _launches[:] = launches
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        results = pool.imap(_compile_number, range(len(launches)))
        return list(tqdm(results, total=len(launches), unit="kernel", desc="compiling", mininterval=5))


def format_rows(arch: int, missing: dict[str, str]) -> list[list[Any]]:
    """Rows of the table for number formats that a GPU wrongly has or has not."""
    rows = []
    for name in sorted(set().union(*FORMATS.values())):
        if name in missing and name in FORMATS[arch]:
            rows.append(_row("-", f"format {name}", arch, problem=f"should be there: {missing[name]}"))
        elif name not in missing and name not in FORMATS[arch]:
            rows.append(_row("-", f"format {name}", arch, problem="should be refused: this GPU cannot multiply it"))
    return rows


def _row(kernel: str, case: str, arch: int | None, *numbers: float | None, problem: str) -> list[Any]:
    gpu = "" if arch is None else f"sm_{arch}"
    return [kernel, case, gpu, *(numbers or [None] * 5), problem]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/compile_offline.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every kernel and format once per GPU")
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(GPUS), default=tuple(GPUS))
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the table there too")
    args = parser.parse_args()
    cases = list(offline_cases.quick_cases() if args.quick else offline_cases.all_cases())
    launches, rows = [], []
    for arch in args.arch:
        found, missing = record_launches(arch, cases)
        launches += found
        rows += format_rows(arch, missing)
    if set(args.arch) == set(GPUS):
        rows += [_row(name, "-", None, problem="no case launches it") for name in unlaunched_kernels(launches)]
    num_failed = len(rows)
    compiled = compile_all([launch for launch in launches if args.only in launch.kernel], args.processes)
    num_failed += sum(bool(row.problem) for row in compiled)
    for row in sorted(compiled, key=lambda row: (row.kernel, row.arch, row.case)):
        kilobytes = None if row.shared_memory is None else row.shared_memory / 1024
        numbers = (row.num_warps, row.registers, kilobytes, row.stack_bytes, row.local_in_loops)
        rows.append(_row(row.kernel, row.case, row.arch, *numbers, problem=row.problem))
    headers = ["kernel", "first met in", "GPU", "warps", "registers", "shared KB", "stack bytes", "in loops", "problem"]
    print(tabulate(rows, headers=headers, floatfmt=".1f"))
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in compiled], indent=1))
    print(f"triton {triton.__version__}: {len(compiled)} kernels for {len(args.arch)} GPUs, {num_failed} problems")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
