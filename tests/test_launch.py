"""Launches are remembered by all that decides which compiled kernel they need, and by nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.knobs import runtime
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sla2_compile.kernels import launch as launch_module
from sla2_compile.kernels.launch import descriptor_like, launch
from sla2_compile.kernels.tensor_rows import row_tiles


@triton.jit
def _copy_kernel(x_ptr, out_ptr, length, factor, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < length, other=0.0)
    tl.store(out_ptr + i, x * factor if FLAG else x, mask=i < length)


class _Device:
    """As far as a launch asks Triton's driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


class _Compiled:
    """A compiled kernel: what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.seen_by_hooks: list[tuple[Any, ...]] = []

    def run(self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *args: Any) -> None:
        assert (function, metadata, *args[:3]) == ("function", "metadata", None, None, None)
        self.launched.append(((x, y, z), args[3:], stream))

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, stream: self.seen_by_hooks.append((grid, args, stream))


class _Launches:
    """Takes the place of Triton: what it is asked to choose a kernel for, and the chosen one's launches."""

    def __init__(self) -> None:
        self.chosen: list[tuple[Any, ...]] = []
        self.compiled: Any = _Compiled()

    @property
    def launched(self) -> list[tuple[Any, ...]]:
        return self.compiled.launched

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        self.chosen.append((grid, args, constants))
        return self.compiled


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> _Launches:
    recorder = _Launches()
    monkeypatch.setattr(driver, "_active", _Device())
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: recorder.run(*args, **kwargs))
    monkeypatch.setattr(launch_module, "_launched", {})
    return recorder


def test_a_second_launch_reuses_the_kernel_with_its_own_tensors(launches: _Launches) -> None:
    first, second = torch.zeros(64), torch.zeros(64)
    for x in (first, second):
        # Constants in another order than the kernel has them.
        launch(_copy_kernel, (3,), x, x, 64, 0.5, FLAG=True, BLOCK=32, num_warps=4)
    assert len(launches.chosen) == 1
    assert launches.chosen[0][1][0] is first
    ((grid, args, stream),) = launches.launched
    assert grid == (3, 1, 1)
    assert args[0] is second
    assert args[2:] == (64, 0.5, 32, True)
    assert stream == 7


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(65)[1:]},  # 4 bytes past a multiple of 16
        {"length": 1},
        {"length": 2**31},
        {"BLOCK": 16},
        {"FLAG": False},
        {"num_warps": 8},
        {"factor": None},
    ],
    ids=str,
)
def test_what_a_kernel_is_compiled_for_makes_another_launch(launches: _Launches, change: dict[str, Any]) -> None:
    defaults = {"x": torch.zeros(64), "length": 64, "factor": 0.5, "BLOCK": 32, "FLAG": True, "num_warps": 4}
    for changed in ({}, change, {}, change):
        values: dict[str, Any] = defaults | changed
        x, length, factor = (values.pop(name) for name in ("x", "length", "factor"))
        launch(_copy_kernel, (1,), x, x, length, factor, **values)
    assert len(launches.chosen) == 2
    assert len(launches.launched) == 2


def test_the_value_of_a_float_and_the_grid_are_no_part_of_it(launches: _Launches) -> None:
    x = torch.zeros(64)
    launch(_copy_kernel, (1,), x, x, 64, 0.5, BLOCK=32, FLAG=True)
    launch(_copy_kernel, (2, 3), x, x, 64, 0.25, BLOCK=32, FLAG=True)
    assert len(launches.chosen) == 1
    assert launches.launched[0][0] == (2, 3, 1)
    assert launches.launched[0][1][3] == 0.25


def test_a_profiler_s_hooks_see_every_launch(launches: _Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(runtime, hook), "calls", [lambda metadata: None])
            for _ in range(2):
                launch(_copy_kernel, (3,), x, x, 64, 0.5, BLOCK=32, FLAG=True)
    assert not launches.launched
    assert [(grid, stream) for grid, _, stream in launches.compiled.seen_by_hooks] == [((3, 1, 1), 7)] * 3


def test_who_only_records_launches_sees_every_one(launches: _Launches) -> None:
    launches.compiled = None
    x = torch.zeros(64)
    for _ in range(2):
        launch(_copy_kernel, (1,), x, x, 64, 0.5, BLOCK=32, FLAG=True)
    assert len(launches.chosen) == 2


def test_shapes_that_never_come_again_do_not_fill_memory(launches: _Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "MAX_LAUNCHES", 4)
    x = torch.zeros(64)
    for length in range(10):
        launch(_copy_kernel, (1,), x, x, length, 0.5, BLOCK=32, FLAG=True)
        assert len(launch_module._launched) <= 4


def test_descriptors_of_one_template_differ_in_their_tensor_alone() -> None:
    x, y = torch.zeros(1, 2, 128, 64), torch.ones(1, 2, 128, 64)
    a, b, other = row_tiles(x, 64), row_tiles(y, 64), row_tiles(x, 32)
    assert a.base is x
    assert b.base is y
    assert (a.shape, a.strides, a.block_shape) == (b.shape, b.strides, b.block_shape) == ([256, 64], [64, 1], [64, 64])
    assert launch_module._traits(a) is launch_module._traits(b)
    assert launch_module._traits(a) is not launch_module._traits(other)
    assert other.block_shape == [32, 64]
    assert descriptor_like(a, y).base is y


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_launch_computes_on_its_own_tensors() -> None:
    for length in (64, 1, 63, 64, 64):
        # The second tensor is not aligned.
        for start in (0, 1):
            x = torch.randn(65 + start, device="cuda")[start : start + length]
            out = torch.full_like(x, torch.nan)
            launch(_copy_kernel, (2,), x, out, length, 0.5, BLOCK=32, FLAG=True)
            torch.testing.assert_close(out, x * 0.5)
