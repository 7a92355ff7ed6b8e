"""Triton's interpreter on the CPU, with what is wrong in it put right: `interpret` runs a script in it.

A process of its own, since TRITON_INTERPRET has to be set before triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def interpret(script: str, names: list[str], *dtype: str) -> dict[str, Any]:
    """What a script of this folder prints as JSON for these cases, and in this dtype where it asks for one."""
    path = Path(__file__).with_name(script)
    command = [sys.executable, "-W", "ignore", str(path), json.dumps(names), *dtype]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def prepare() -> None:
    """Patch the interpreter, fill new memory with NaN, and use one thread: for the scripts, in their process."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run this with TRITON_INTERPRET=1"
    _let_loops_end_where_a_tensor_says()
    _round_to_fp8_as_hardware_does()
    _multiply_bfloat16_as_numbers()
    _leave_arguments_in_place()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


def _leave_arguments_in_place() -> None:
    """They are on the CPU already, and copying a storage back onto itself takes memory for all that it could hold."""
    from triton.runtime.interpreter import GridExecutor

    GridExecutor._restore_args_dev = lambda *_: None


def _let_loops_end_where_a_tensor_says() -> None:
    """NumPy 2.4 no longer turns an array of one element into an integer, which Triton 3.6 relies on for loop bounds."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


def _round_to_fp8_as_hardware_does() -> None:
    """The interpreter's own conversion loses the carry from the mantissa into the exponent."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounding_once(x: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if input_dtype != tl.float32 or output_dtype != tl.float8e4nv:
            return convert(x, input_dtype, output_dtype, rounding_mode)
        values = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.float32).copy()
        codes = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes.numpy().reshape(x.shape)

    interpreter._convert_float = convert_rounding_once


def _multiply_bfloat16_as_numbers() -> None:
    """The interpreter holds bfloat16 as integers of 16 bits, and multiplies those."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot_of_numbers
