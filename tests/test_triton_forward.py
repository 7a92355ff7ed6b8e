"""The CUDA forward, stage by stage and whole, against the float64 reference: in the interpreter, and on a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import kernel_cases as cases
import pytest
import torch
from interpreter import interpret
from kernel_cases import CASES, FORWARD_CASES, Case, gpu_case
from tolerances import (
    BLOCK_STATISTICS,
    CODES,
    EAGER_ERROR_FACTOR,
    EAGER_ERROR_FLOOR,
    FP8_SUMS,
    LINEAR_STATES,
    LOG_SUM_EXP,
    LOW_BIT,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ALL_CASES = {**CASES, **FORWARD_CASES}
FAST = {
    "float32": [
        "pooled row, a logit per head", "pooled block", "linear block", "linear row", "masked",
        "tiles, masked, linear", "one token", "exact ends", "dense", "learned router, groups", "all scores equal",
        "huge scores", "scores of many magnitudes", "no real key", "nothing in the tail", "qk int8, pv fp8, pooled",
        "qk fp8, pv fp8, masked tiles, linear",
    ],
    "float16": ["pooled row, nothing learned", "huge scores, linear", "qk int8, pv None, masked tiles, linear"],
}  # fmt: skip
# The interpreter rounds after every step of an exp2 or a sum.
INTERPRETER_FACTOR = 2 * EAGER_ERROR_FACTOR

Errors = dict[str, dict[str, float]]


def check(case: Case, errors: Errors, name: str, factor: float = EAGER_ERROR_FACTOR) -> None:
    """Every error of `forward_checks` and `stage_checks` within its tolerance."""
    eager = max(factor * errors["eager"]["out"], EAGER_ERROR_FLOOR)
    if math.isnan(eager):
        # Plain PyTorch overflows in this dtype. That the kernels do not is asserted where they run.
        eager = math.inf
    formats = (case.qk_format, case.pv_format)
    for error in errors["exact"].values():
        assert error <= (eager if formats == (None, None) else LOW_BIT[formats]), (name, errors)
    codes = FP8_SUMS if formats == ("fp8", "fp8") else CODES
    limits = {
        "rounded": dict.fromkeys(("out", "sparse_out"), eager if formats == (None, None) else max(eager, codes)),
        "unsaved": {"out": eager},
        "statistics": dict.fromkeys(errors.get("statistics", ()), BLOCK_STATISTICS[case.dtype]),
        "codes": dict.fromkeys(errors.get("codes", ()), CODES),
        "states": dict.fromkeys(("H", "Z"), LINEAR_STATES[case.dtype]),
    }
    ties = errors.get("ties", {})
    limits["rounded"] |= {x: LOG_SUM_EXP[case.dtype] + ties.get(x, 0.0) for x in ("sparse_lse", "tail_lse")}
    for part, limit in limits.items():
        for what, error in errors.get(part, {}).items():
            assert error <= limit[what], (name, part, what, error, limit[what])


@needs_triton
@pytest.mark.parametrize(
    "names, dtype",
    [
        *(pytest.param(names, dtype, id=dtype) for dtype, names in FAST.items()),
        *(
            pytest.param(
                [name for name in ALL_CASES if name not in names and not name.startswith("long")],
                dtype,
                id=f"{dtype}, the rest",
                marks=[pytest.mark.slow, pytest.mark.timeout(600)],
            )
            for dtype, names in FAST.items()
        ),
    ],
)
def test_in_the_interpreter_every_stage_and_the_output_are_those_of_float64(names: list[str], dtype: str) -> None:
    for name, errors in interpret("interpret_forward.py", names, dtype).items():
        check(dataclasses.replace(ALL_CASES[name], dtype=getattr(torch, dtype)), errors, name, INTERPRETER_FACTOR)


def check_on_gpu(case: Case, name: str) -> None:
    import stage_checks
    from forward_checks import forward_errors

    p = cases.problem(case, "cuda")
    with cases.poisoned_memory():
        stages = stage_checks.Stages(case, p)
        block_mask = stage_checks.check_router(stages)
        errors = {"statistics": stage_checks.check_statistics(stages), "codes": stage_checks.check_codes(stages)}
        if case.tail == "linear":
            errors["states"] = stage_checks.check_linear_states(stages, block_mask)
        errors |= forward_errors(case, p, repeat=True)
    check(case, errors, name)


def skip_without(case: Case) -> None:
    from sla2_compile.kernels.dispatch import missing_for_format

    for number_format in filter(None, (case.qk_format, case.pv_format)):
        reason = missing_for_format(number_format, torch.device("cuda"))
        if reason is not None:
            pytest.skip(f"{number_format} {reason}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ALL_CASES)
def test_on_a_gpu_every_stage_and_the_output_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    case = gpu_case(ALL_CASES[name], dtype, 64)
    skip_without(case)
    check_on_gpu(case, name)


GPU_FORMS = {
    "pooled row": Case(learned=False),
    "pooled block": Case(mixing="block"),
    "linear block": Case(tail="linear", mixing="block"),
    "linear row, masked tiles": CASES["tiles, masked, linear"],
    "qk int8, pooled": Case(learned=False, qk_format="int8", key_offset=2.0),
    "qk int8, pv fp8, pooled": FORWARD_CASES["qk int8, pv fp8, pooled"],
    "qk fp8, pv fp8, linear block": Case(
        tail="linear", mixing="block", qk_format="fp8", pv_format="fp8", key_offset=2.0
    ),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [16, 72, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("name", GPU_FORMS)
def test_on_a_gpu_every_head_dim_works(name: str, dim: int) -> None:
    case = gpu_case(GPU_FORMS[name], torch.bfloat16, dim)
    skip_without(case)
    check_on_gpu(case, name)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block_q, block_k", [(16, 16), (16, 256), (64, 128), (256, 16), (256, 256)])
@pytest.mark.parametrize("name", ["pooled row", "linear block", "qk int8, pv fp8, pooled"])
def test_on_a_gpu_every_block_size_works(block_q: int, block_k: int, name: str) -> None:
    blocks = {"block_q": block_q, "block_k": block_k, "q_len": 700, "kv_len": 1900}
    case = dataclasses.replace(GPU_FORMS[name], dim=64, dtype=torch.bfloat16, **blocks)
    skip_without(case)
    check_on_gpu(case, name)
