"""Past 2^31 elements, where 32-bit offsets wrap: strides on the CPU, and on a GPU tensors of that size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from interpreter import interpret
from test_gluon_on_gpu import FP8, LIMIT, LINEAR, needs_hopper, without_gluon
from test_triton_forward import needs_triton
from tolerances import relative_error
from torch import Tensor

from sla2_compile import SLA2Config, attention

__all__ = ["without_gluon"]
HEADS, LENGTH, DIM = 72, 240_000, 128
# Of these the last ones lie behind 2^31 elements, in either storage.
LAST = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "pooled": {},
    "linear": LINEAR,
    "fp8": FP8,
    "fp8 keys, linear": {"qk_format": "fp8", **LINEAR},
    "tiles": {"token_grid": (100, 40, 60)},
}
CASES = [
    *((name, training) for name in ("pooled", "linear", "tiles") for training in (False, True)),
    ("fp8", False), ("fp8 keys, linear", False),
]  # fmt: skip

FAR_APART = [
    "triton: pooled row", "triton: linear block", "triton: tiles, masked, linear", "triton: qk int8, pv fp8, pooled",
    "hopper: linear, head dim 128", "hopper: pooled, qk fp8, pv fp8", "hopper: tiles, learned, batch",
    "hopper backward: pooled row, learned, head dim 128", "hopper backward: linear block, ragged, head dim 128",
]  # fmt: skip


@needs_triton
@pytest.mark.timeout(300)
def test_tokens_and_heads_may_be_2_31_elements_apart() -> None:
    for name, differing in interpret("interpret_large.py", FAR_APART, "float16").items():
        assert not any(differing.values()), (name, differing)


def run(tensors: Sequence[Tensor], options: dict[str, Any], *, training: bool) -> list[Tensor]:
    """The output for q, k and v, and with the output's gradient as the fourth tensor those of the three."""
    config = SLA2Config(sparsity=0.97, infer_layout=False, **options)
    if not training:
        return [attention(*tensors[:3], config=config)]
    inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attention(*inputs, config=config)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.timeout(300)
@pytest.mark.parametrize("triton_only", [False, True])
@pytest.mark.parametrize("name, training", CASES)
def test_on_a_gpu_the_last_heads_of_tensors_past_2_31_elements_are_as_alone(
    name: str, training: bool, triton_only: bool, without_gluon: Callable[[bool], None]
) -> None:
    if triton_only:
        without_gluon(False)
        if training:
            without_gluon(True)
    generator = torch.Generator("cuda").manual_seed(0)
    # Tokens or heads as neighbours in memory.
    shapes = [(1, LENGTH, HEADS, DIM)] * 3 + [(1, HEADS, LENGTH, DIM)]
    tensors = [torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator) for s in shapes[: 3 + training]]
    assert tensors[0].numel() > 2**31
    tensors[:3] = [x.transpose(1, 2) for x in tensors[:3]]
    found = [x[:, -LAST:].clone() for x in run(tensors, OPTIONS[name], training=training)]
    # Copies: a slice would have the same strides.
    alone = run([x[:, -LAST:].clone(memory_format=torch.contiguous_format) for x in tensors], OPTIONS[name],
                training=training)  # fmt: skip
    assert torch.equal(found[0], alone[0])
    for x, y in zip(found, alone, strict=True):
        assert x.isfinite().all()
        assert relative_error(x, y) < LIMIT
