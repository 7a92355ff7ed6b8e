"""Cases for the kernels of Hopper, at the block sizes and head dims that they take: for the emulator, on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest
from kernel_cases import Case

POOLED = Case(heads=1, kv_heads=1, q_len=256, kv_len=320, dim=64, block_q=128, block_k=64, learned=False, sparsity=0.6)
PAPERS = dataclasses.replace(POOLED, tail="linear", mixing="block", learned=True, key_offset=1.0)
TILES = dataclasses.replace(
    POOLED, q_len=5 * 7 * 9 + 20, kv_len=5 * 7 * 9 + 20, token_grid=(5, 7, 9), exact_prefix=8, exact_suffix=12
)
RAGGED = {"q_len": 170, "kv_len": 333}
# Two programs a multiprocessor take these where nothing is saved; several query blocks each in the emulator.
FP8_POOLED = dataclasses.replace(
    POOLED,
    dim=128,
    heads=3,
    kv_heads=3,
    q_len=290,
    kv_len=64 * 11 + 5,
    qk_format="fp8",
    pv_format="fp8",
    key_offset=2.0,
)
FP8_CASES = {
    **{f"FP8, head dim 128, {n} of 12 kept": dataclasses.replace(FP8_POOLED, sparsity=1 - n / 12) for n in (1, 2, 5)},
    "FP8, head dim 128, learned logit": dataclasses.replace(
        FP8_POOLED, learned=True, gain=False, heads=4, kv_heads=2, batch=2, q_len=256, kv_len=320
    ),
    "FP8, head dim 128, whole blocks": dataclasses.replace(FP8_POOLED, q_len=256, kv_len=64 * 9),
    "FP8, head dim 128, all scores equal": dataclasses.replace(FP8_POOLED, equal=True, q_len=128, key_offset=0.0),
    **{
        f"FP8, head dim 128, linear, {feature_map}": dataclasses.replace(
            FP8_POOLED, tail="linear", mixing="block", learned=True, feature_map=feature_map
        )
        for feature_map in ("softmax", "elu")
    },
    "FP8, head dim 128, many tiles": dataclasses.replace(
        FP8_POOLED, heads=1, kv_heads=1, q_len=300, kv_len=64 * 40 + 9
    ),
}
# Of the kernel of these cases; it takes a linear tail only where there are many.
MIN_TILES = 1
CASES = {
    "pooled": POOLED,
    "pooled, head dim 128, groups": dataclasses.replace(POOLED, dim=128, heads=2, **RAGGED),
    "pooled, large scores": dataclasses.replace(POOLED, magnitude=2.5, sparsity=0.2, **RAGGED),
    "linear, large scores, head dim 128": dataclasses.replace(PAPERS, magnitude=4.0, sparsity=0.2, dim=128, **RAGGED),
    "pooled, batch": dataclasses.replace(POOLED, batch=2, q_len=130, kv_len=200),
    "pooled, exact ends": dataclasses.replace(POOLED, q_len=400, kv_len=400, exact_prefix=70, exact_suffix=10),
    "pooled, more keys": dataclasses.replace(POOLED, q_len=64, kv_len=64 * 70 + 5, sparsity=0.97),
    "pooled, learned": dataclasses.replace(POOLED, learned=True, **RAGGED),
    "pooled, learned, many means": dataclasses.replace(
        POOLED, learned=True, q_len=200, kv_len=64 * 130, exact_prefix=64 * 70, sparsity=0.97
    ),
    "pooled, block": dataclasses.replace(POOLED, learned=True, mixing="block", dim=128, heads=2),
    "pooled, learned, qk int8, pv fp8": dataclasses.replace(
        POOLED, learned=True, qk_format="int8", pv_format="fp8", key_offset=2.0, **RAGGED
    ),
    **{
        f"{kept} FP8 tiles kept": dataclasses.replace(
            POOLED,
            qk_format="fp8",
            pv_format="fp8",
            key_offset=2.0,
            q_len=130,
            kv_len=64 * 11 + 5,
            sparsity=1 - kept / 12,
        )
        for kept in (1, 2, 3, 4, 7)
    },
    **FP8_CASES,
    "many FP8 tiles": dataclasses.replace(
        POOLED, qk_format="int8", pv_format="fp8", key_offset=2.0, q_len=64, kv_len=64 * 70 + 5, sparsity=0.0
    ),
    "tiles": TILES,
    "tiles, learned, batch": dataclasses.replace(TILES, learned=True, batch=2, heads=2),
    "tiles, linear, head dim 128": dataclasses.replace(TILES, tail="linear", mixing="block", dim=128, key_offset=1.0),
    "tiles, dense": dataclasses.replace(TILES, sparsity=0.0),
    "linear": PAPERS,
    "linear, head dim 128": dataclasses.replace(PAPERS, dim=128, heads=3, **RAGGED),
    "linear, elu, batch": dataclasses.replace(PAPERS, feature_map="elu", batch=2, q_len=130, kv_len=200),
    **{
        f"linear, FP8 states, qk {qk_format}": dataclasses.replace(
            PAPERS,
            dim=128,
            heads=2,
            q_len=170,
            kv_len=64 * 17 + 5,
            sparsity=0.9,
            qk_format=qk_format,
            pv_format="fp8",
            key_offset=2.0,
        )
        for qk_format in ("int8", "fp8")
    },
    "dense": dataclasses.replace(POOLED, sparsity=0.0, **RAGGED),
    **{
        f"{tail}, qk {qk_format}, pv {pv_format}": dataclasses.replace(
            case, qk_format=qk_format, pv_format=pv_format, key_offset=2.0, **RAGGED
        )
        for qk_format, pv_format in (("int8", None), ("fp8", None), ("fp8", "fp8"), ("int8", "fp8"))
        for tail, case in {"pooled": POOLED, "linear": PAPERS}.items()
    },
}
BACKWARD_CASES = {
    "pooled row": POOLED,
    "pooled row, learned, head dim 128": dataclasses.replace(POOLED, dim=128, heads=3, learned=True, **RAGGED),
    "pooled block": dataclasses.replace(POOLED, mixing="block", learned=True, q_len=200, kv_len=320),
    "linear block": PAPERS,
    "linear block, ragged, head dim 128": dataclasses.replace(PAPERS, dim=128, heads=3, **RAGGED),
    "linear row": dataclasses.replace(PAPERS, mixing="row", **RAGGED),
    "linear row, a kept short block": dataclasses.replace(PAPERS, mixing="row", sparsity=0.2, **RAGGED),
    "batch and groups": dataclasses.replace(POOLED, batch=2, heads=4, kv_heads=2, q_len=130, kv_len=200),
    "linear, batch and groups": dataclasses.replace(PAPERS, batch=2, heads=2, kv_heads=1, q_len=130, kv_len=200),
    "exact ends": dataclasses.replace(POOLED, q_len=400, kv_len=400, exact_prefix=70, exact_suffix=10),
    "dense": dataclasses.replace(POOLED, sparsity=0.0, **RAGGED),
    "dense linear": dataclasses.replace(PAPERS, sparsity=0.0, **RAGGED),
    "more keys than queries": dataclasses.replace(POOLED, q_len=64, kv_len=64 * 70 + 5, sparsity=0.97),
    "one block of each": dataclasses.replace(POOLED, q_len=5, kv_len=3),
    "long lists": dataclasses.replace(POOLED, q_len=48 * 128, kv_len=16 * 64, sparsity=0.94, popular=True),
    "int8 forward": dataclasses.replace(POOLED, qk_format="int8", key_offset=1.0, **RAGGED),
}


def by_dtype(cases: Mapping[str, Case], in_bfloat16: Sequence[str]) -> pytest.MarkDecorator:
    """Parameters `names` and `dtype` of a test: these cases in bfloat16, all others in float16."""
    in_float16 = [name for name in cases if name not in in_bfloat16]
    return pytest.mark.parametrize(
        "names, dtype",
        [pytest.param(in_float16, "float16", id="float16"), pytest.param(in_bfloat16, "bfloat16", id="bfloat16")],
    )
