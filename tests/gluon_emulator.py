"""Runs warp-specialised Gluon kernels on CPU tensors, without a GPU, and finds their races.

    with emulated(gluon_attention):
        gluon_attention.attend(...)  # its launches run here

The kernels' own Python runs, with other globals: `gl` and Hopper's modules are this package's (`emulated_values.py`,
`emulated_memory.py`), functions of the kernel are converted likewise. Each partition of `warp_specialize` is a thread
and they take turns at barriers (`emulated_machine.py`). Whatever is asynchronous happens as late as the kernel allows,
and what no barrier, wait or fence orders raises `Hazard` with the kernel's line. Layouts, registers and what the
compiler refuses are not modelled: `compile_offline.py` is for that.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import emulated_memory as memory
import torch
from emulated_machine import Barrier, Machine
from emulated_values import FUNCTIONS, Pointer, Value, lift
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction


class _Namespace:
    """A module as the kernels see it: these functions, and of the real one layouts, types and constants."""

    def __init__(self, real: Any, functions: dict[str, Any]) -> None:
        self._real, self._functions = real, functions

    def __getattr__(self, name: str) -> Any:
        if name in self._functions:
            return self._functions[name]
        found = getattr(self._real, name)
        if isinstance(found, JITFunction) or hasattr(found, "__triton_builtin__"):
            raise NotImplementedError(f"{name} is not emulated: add it to emulated_values.FUNCTIONS")
        return found


class Program:
    """One program of a grid: its machine, its place in the grid, and the kernel's functions converted for it."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], order: Sequence[int]) -> None:
        machine = self.machine = Machine(order)
        self._converted: dict[int, Callable[..., Any]] = {}
        functions = {
            **FUNCTIONS,
            "program_id": lambda axis: lift(index[axis]),
            "num_programs": lambda axis: lift(grid[axis]),
            "num_ctas": lambda: 1,
            "allocate_shared_memory": self._allocate,
            "warp_specialize": lambda work, *_: machine.specialize(work),
            # Groups of warps are not taken apart here.
            "barrier": lambda **_: None,
            "thread_barrier": lambda **_: None,
        }
        barriers = {
            "allocate_mbarrier": lambda batch=None, **_: memory.Barriers([Barrier(machine) for _ in range(batch or 1)]),
            "init": lambda barrier, count: barrier.one.init(int(count)),
            "expect": lambda barrier, bytes_per_cta=0, pred=True: pred and barrier.one.expect(int(bytes_per_cta)),
            "arrive": lambda barrier, count=1, pred=True: pred and barrier.one.arrive(int(count)),
            "wait": lambda barrier, phase, pred=True, **_: pred and barrier.one.wait(phase),
            "invalidate": lambda barrier: None,
        }
        copies = {
            "async_copy_global_to_shared": memory.copy_in,
            "async_copy_shared_to_global": memory.copy_out,
            "store_wait": lambda pendings: memory.wait_for_copies_out(machine, pendings),
        }
        hopper_functions = {
            "mbarrier": _Namespace(hopper.mbarrier, barriers),
            "tma": _Namespace(hopper.tma, copies),
            "warpgroup_mma": functools.partial(memory.warpgroup_mma, machine),
            "warpgroup_mma_wait": lambda num_outstanding=0, deps=(): memory.wait_for_products(
                machine, num_outstanding, deps
            ),
            "fence_async_shared": lambda **_: memory.fence(machine),
        }
        row_copies = {
            "async_copy_global_to_shared": functools.partial(memory.copy_rows, machine),
            "commit_group": lambda: memory.commit_row_copies(machine),
            "wait_group": lambda num_outstanding=0: memory.wait_for_row_copies(machine, num_outstanding),
        }
        self._emulated = {id(gl): _Namespace(gl, functions), id(hopper): _Namespace(hopper, hopper_functions)}
        self._emulated[id(ampere.async_copy)] = _Namespace(ampere.async_copy, row_copies)
        for name in ("barrier", "thread_barrier"):
            if hasattr(gl, name):
                self._emulated[id(getattr(gl, name))] = functions[name]
        for name, emulated in hopper_functions.items():
            self._emulated[id(getattr(hopper, name))] = emulated
        self._builtins = {"range": _range, "min": functions["minimum"], "max": functions["maximum"]}

    def _allocate(self, dtype: Any, shape: Sequence[int], layout: Any, value: Value | None = None) -> Any:
        if isinstance(layout, hopper.mbarrier.MBarrierLayout):
            return memory.Barriers([Barrier(self.machine) for _ in range(shape[0] if len(shape) > 1 else 1)])
        allocated = memory.SharedMemory.allocate(self.machine, dtype, shape, layout)
        if value is not None:
            allocated.store(value)
        return allocated

    def convert(self, function: JITFunction[Any]) -> Callable[..., Any]:
        """The function of a kernel with the emulator's globals."""
        if id(function) not in self._converted:
            plain = function.fn
            names: dict[str, Any] = {"_emulated": True, "__builtins__": plain.__globals__["__builtins__"]}
            converted = types.FunctionType(
                plain.__code__, names, plain.__name__, _unwrapped(plain.__defaults__), plain.__closure__
            )
            converted.__kwdefaults__ = plain.__kwdefaults__
            self._converted[id(function)] = converted
            names.update(self._builtins)
            names.update({key: self._global(value) for key, value in plain.__globals__.items() if key[:2] != "__"})
        return self._converted[id(function)]

    def _global(self, value: Any) -> Any:
        if id(value) in self._emulated:
            return self._emulated[id(value)]
        if isinstance(value, JITFunction):
            # Converted when it is called: kernels import more than they use.
            return lambda *args, **kwargs: self.convert(value)(*args, **kwargs)
        return value.value if isinstance(value, gl.constexpr) else value


def _unwrapped(defaults: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    return defaults and tuple(x.value if isinstance(x, gl.constexpr) else x for x in defaults)


def _range(*bounds: Any, **_: Any) -> Iterator[Value]:
    return map(lift, range(*(int(x) for x in bounds)))


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.of(x)
    if isinstance(x, TensorDescriptor):
        return memory.Tiles(x)
    return lift(x) if isinstance(x, (bool, int, float)) else x


class EmulatedKernel:
    """In place of a Gluon kernel: the same launch runs its programs one after the other."""

    def __init__(self, kernel: JITFunction[Any], order: Sequence[int]) -> None:
        self.kernel, self.order = kernel, order
        self.num_launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, tuple(grid))

    def _launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        parameters = self.kernel.params
        constants = {parameter.name for parameter in parameters if parameter.is_constexpr}
        given = dict(zip((parameter.name for parameter in parameters), args, strict=False))
        given |= {name: value for name, value in kwargs.items() if name in {p.name for p in parameters}}
        arguments = {name: x if name in constants else _argument(x) for name, x in given.items()}
        self.num_launches += 1
        for number in range(torch.Size(grid).numel()):
            index = tuple(torch.unravel_index(torch.tensor(number), tuple(reversed(grid))))[::-1]
            program = Program(tuple(int(x) for x in index), grid, self.order)
            program.convert(self.kernel)(**arguments)


@contextmanager
def emulated(*modules: Any, order: Sequence[int] = ()) -> Iterator[dict[str, EmulatedKernel]]:
    """Within, the modules' Gluon kernels (whose names end in `_kernel`) run here; those, by name.

    order: numbers of the groups of warps in `warp_specialize`, those first that run whenever they can.
    """
    kernels: dict[str, EmulatedKernel] = {}
    with ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and value.is_gluon() and name.endswith("_kernel"):
                    kernels[name] = EmulatedKernel(value, order)
                    stack.enter_context(mock.patch.object(module, name, kernels[name]))
        yield kernels
