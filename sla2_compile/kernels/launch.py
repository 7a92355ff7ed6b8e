"""Launches of Triton kernels that ask once what a call needs to know, and not at every call.

For each launch Triton finds out anew which compiled kernel the arguments ask for: 10 to 80 microseconds for 10 to 60
arguments, where the smaller kernels run 10. The same arguments, but for addresses, ask for the same kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.knobs import runtime
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Shapes that change with every call would fill the memory of what was launched.
MAX_LAUNCHES = 4096

_launched: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`.

    Args:
        kernel: a kernel of Triton's or Gluon's; anything else that is launched like one (Triton's interpreter, a
            tracer's wrapper) is.
        grid: one to three numbers.
        args: tensors, tensor descriptors, numbers and None; the kernel's first parameters.
        constants: its other parameters in any order, constants all, and Triton's options.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*args, **constants)
        return
    # Whole numbers as they are, though Triton asks less of them: whether one is 1, a multiple of 16, of 64 bits.
    traits = [x if x.__class__ is int or x is None else _traits(x) for x in args]
    # The kernel itself would be hashed by its source.
    device = driver.active.get_current_device()
    key = (id(kernel), device, *constants, *constants.values(), *traits)
    known = _launched.get(key)
    if known is None:
        compiled = kernel[grid](*args, **constants)
        if compiled is None:  # somebody only records what would be launched
            return
        if len(_launched) >= MAX_LAUNCHES:
            _launched.clear()
        _launched[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, rest = known
    stream, grid = driver.active.get_current_stream(device), (*grid, 1, 1)[:3]
    if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        # A profiler asks for each launch.
        compiled[grid](*args, *rest, stream=stream)
    else:
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *rest)


def _traits(x: Any) -> Any:
    """What of an argument decides which kernel it is compiled for."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if x.__class__ is float:
        return float
    if x.__class__ is bool:
        return bool, x
    # A tensor descriptor.
    return x.template


def descriptor_like(template: Any, x: Tensor) -> Any:
    """A tensor descriptor for `x`, in all else as `template` says.

    Making one from its parts checks them, at every call the same. Who calls this keeps templates, and sees to it that
    `x` has the template's dtype and layout and is aligned to 16 bytes.
    """
    descriptor = object.__new__(template.__class__)
    descriptor.__dict__.update(template.__dict__)
    descriptor.base, descriptor.template = x, template.__dict__.setdefault("template", object())
    return descriptor
