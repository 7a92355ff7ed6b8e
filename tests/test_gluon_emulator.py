"""The emulator of Gluon kernels finds what a GPU would do wrong only now and then."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import toy_gluon_kernel
from emulated_machine import Hazard
from emulated_values import Pointer, Value, lift, load
from gluon_emulator import emulated
from triton.experimental.gluon import language as gl

ORDERS = [(0, 1), (1, 0)]
FAULTS = {
    "ring not waited for": "overwrites|arrives once more",
    "tile not waited for": "nothing has written|without having waited",
    "slot handed back too early": "still read",
    "slot never handed back": "(?s)deadlock.*mbarrier.wait\\(empty",
    "arrives twice": "deadlock",
    "too many bytes": "(?s)deadlock.*mbarrier.wait\\(full",
    "output overwritten": "still reads",
    "no fence": "without a fence",
}


def run(fault: str, order: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel writes and what it should."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, generator=generator).half()
    x = torch.randn(5 * 64, 64, generator=generator).half()
    with emulated(toy_gluon_kernel, order=order):
        out = toy_gluon_kernel.multiply(w, x, fault)
    return out, (w.double() @ x.double().unflatten(0, (5, 64))).flatten(0, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_faults_computes_what_it_should(order: tuple[int, int]) -> None:
    out, expected = run("", order)
    assert (out.double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_kind_of_fault_is_found_whoever_runs_first(fault: str, order: tuple[int, int]) -> None:
    with pytest.raises(Hazard, match=FAULTS[fault]):
        run(fault, order)


def test_a_product_that_is_not_waited_for_has_no_value() -> None:
    with pytest.raises(AttributeError):
        run("product not waited for", ORDERS[0])


def test_integers_divide_and_scalars_promote_as_in_c() -> None:
    assert int(lift(-7) // 2) == -3
    assert int(lift(-7) % 4) == -3
    assert (lift(3) * 0.5).dtype == gl.float32
    assert (Value(torch.ones(2, dtype=torch.int32)) + lift(1).to(gl.int64)).dtype == gl.int64
    assert (Value(torch.ones(2, dtype=torch.bfloat16)) * 2.5).dtype == gl.bfloat16


def test_a_load_outside_of_its_tensor_is_an_error_unless_it_is_masked() -> None:
    pointer = Pointer.of(torch.arange(4.0)) + Value(torch.tensor([3, 4]))
    with pytest.raises(AssertionError, match="outside of memory"):
        load(pointer)
    assert load(pointer, mask=Value(torch.tensor([True, False])), other=-1.0).data.tolist() == [3, -1]
