"""Compile every kernel for every supported GPU, without a GPU: `python tests/compile_offline.py [--quick]`.

The launchers themselves choose what is compiled: they run on tensors without memory for a GPU that is only described,
and each launch is recorded in place of being made. So block sizes, warps, stages and what Triton specialises on
(divisibility, constants) are those of a real call. Prints registers, shared memory and spills of each kernel; fails if
one spills, does not fit, or does not compile, and if a number format that a GPU should have does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import offline_cases
import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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
        return f"{self.function.fn.__module__.rsplit('.', 1)[1]}.{self.function.fn.__name__.strip('_')}"


@dataclass(frozen=True)
class Compiled:
    kernel: str
    case: str
    arch: int
    num_warps: int
    registers: int | None
    shared_memory: int | None
    spilled_bytes: int | None
    problem: str  # empty where all is well


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
        registers, stack = resource_usage(kernel.asm["cubin"])
    except Exception as error:  # whatever stops one kernel is a row of the table
        return Compiled(*label, None, None, None, _short(error))
    shared, limit = kernel.metadata.shared, GPUS[launch.arch].shared_memory
    problems = []
    if stack:
        problems.append("spills")
    if shared > limit:
        problems.append(f"needs more than {limit} bytes of shared memory")
    return Compiled(*label, registers, shared, stack, ", ".join(problems))


def _short(error: Exception) -> str:
    """An error in one line, without the source that Triton shows before the reason."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 200 else '...' + text[-200:]}"


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack per thread, which in a kernel without arrays of its own are spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/compile_offline.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every kernel and format once per GPU (three minutes)")
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(GPUS), default=tuple(GPUS))
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the table there too")
    args = parser.parse_args()
    cases = list(offline_cases.quick_cases() if args.quick else offline_cases.all_cases())
    launches, rows = [], []
    for arch in args.arch:
        found, missing = record_launches(arch, cases)
        launches += [launch for launch in found if args.only in launch.kernel]
        rows += [["-", f"format {name}", f"sm_{arch}", "", "", "", "", f"none: {why}"] for name, why in missing.items()]
    compiled = compile_all(launches, args.processes)
    for row in sorted(compiled, key=lambda row: (row.kernel, row.arch, row.case)):
        kilobytes = None if row.shared_memory is None else row.shared_memory / 1024
        numbers = (row.num_warps, row.registers, kilobytes, row.spilled_bytes)
        rows.append([row.kernel, row.case, f"sm_{row.arch}", *numbers, row.problem])
    headers = ["kernel", "first met in", "GPU", "warps", "registers", "shared KB", "spilled bytes", "problem"]
    print(tabulate(rows, headers=headers, floatfmt=".1f"))
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in compiled], indent=1))
    failed = [row for row in compiled if row.problem]
    print(
        f"triton {triton.__version__}: {len(compiled)} kernels for {len(args.arch)} GPUs, {len(failed)} with a problem"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
