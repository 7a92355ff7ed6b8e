"""Every tolerance of the tests of the op, with its reason. Nothing else decides how wrong a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative L2 between two float64 computations of the same formula in another order: some hundred roundings of 1e-16.
FLOAT64 = 1e-12

# The same where a traced graph of dynamic length interpolates a logit, whose positions PyTorch computes in float32 in
# graphs before 2.12.
FLOAT64_INTERPOLATED = FLOAT64 if torch.__version__ >= "2.12" else 1e-7

# Relative L2 error of an exported file in float32 against eager PyTorch: what the project promises of ONNX models.
EXPORTED = 1e-4

# Relative L2 error in a dtype, against float64, as a multiple of plain PyTorch's at the same mathematics in that dtype.
EAGER_ERROR_FACTOR = 2.0
# Below this (8 units in the last place of float32) plain PyTorch's error of a gradient of few elements is luck.
EAGER_ERROR_FLOOR = 1e-6

# Relative L2 error of the output against full precision, by (qk_format, pv_format). With about 7 bits (INT8) and 4
# bits (e4m3) of mantissa these are what SageAttention2++'s scales reach on normal inputs; the project promises them.
LOW_BIT = {
    ("int8", None): 2e-2,
    ("int8", "fp8"): 4e-2,
    ("fp8", None): 6e-2,
    (None, "fp8"): 4e-2,
    ("fp8", "fp8"): 6e-2,
}

# Relative L2 error of what codes stand for, and of what low-bit kernels make of them against the reference's emulation:
# few codes differ, by one, where a value is halfway between two.
CODES = 1e-3
# The same where a GPU's tensor cores add up FP8 products: with some 14 bits, so that scores are off by 1e-3 and in
# consequence one code of P in a hundred is another.
FP8_SUMS = 5e-3

# Relative L2 error of means over blocks, some of them stored in the inputs' dtype, and of log-sum-exps, of which the
# tail's come from means in the inputs' dtype. Smoothed means are an eighth of the size of the tokens that they sum up,
# and so is what float32 keeps of them.
BLOCK_STATISTICS = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LOG_SUM_EXP = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}

# Relative L2 error of the linear tail's states, sums of products of numbers rounded to the dtype, stored in it.
LINEAR_STATES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# The same of states in FP8. One is off by what e4m3 rounds, 0.027, and by as much of the last one, which is rounded
# with it. Of their sums it is the error over what rounding would leave in them, and half of that for values that differ
# much.
LINEAR_STATES_FP8 = {
    "h": 4.5e-2,
    "z": LINEAR_STATES[torch.bfloat16],
    "all, over what stretches' ends leave": 1.5,
    "H, over what ends and kept blocks leave": 1.5,
    "Z": LINEAR_STATES[torch.bfloat16],
}

# Relative L2 of low-bit gradients against those of the same op without formats. The backward itself is not low-bit, but
# it starts from the forward's outputs and log-sum-exps and inherits part of their error. That of the learned weights is
# made of differences between the branches' outputs, in which the error weighs more.
LOW_BIT_GRADIENT = {"out": 6e-2, "q": 3e-2, "k": 3e-2, "v": 3e-2, "alpha_logit": 2e-1, "alpha_gain": 2e-1}

# Relative L2 of fake-quantised outputs against those of the low-bit kernels: the same codes but for ties.
FAKE_QUANT = 1e-3

# Relative L2 of directional derivatives against finite differences of the rounded output, both averaged over jittered
# inputs: what a few samples of the jitter leave, twice what was seen.
EXPECTED_GRADIENT = 5e-2

# Relative L2 of dense attention against float64: two units in the last place of the dtype.
DENSE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# Relative L2 of sums over the gradient of v: each of its elements is rounded once to the dtype, at random.
WEIGHTS_SUM = {torch.bfloat16: 1e-3, torch.float16: 1e-4}

# Relative L2 between a compiled and an eager model in float32, of an output and of a parameter's gradient: roundings of
# 1e-7 in another order, through some ten layers. The largest of 126 models are 2e-6 and 8e-5.
MODEL_OUTPUT = 1e-5
MODEL_GRADIENT = 2e-4


def relative_error(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected| over all elements, in float64; the plain norm of `x` where `expected` is 0."""
    x, expected = x.detach().double(), expected.detach().double()
    assert x.shape == expected.shape
    norm = expected.norm().item()
    return (x - expected).norm().item() / (norm if norm > 0 else 1.0)
