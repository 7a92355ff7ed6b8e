"""Calls of the op that together launch every kernel in every format, for `compile_offline.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sla2_compile.kernels import cuda_forward, triton_backward
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved

DIMS = (64, 72, 80, 96, 128, 160, 192, 256)
# Tokens of a video of 720p.
LONG = 75_600
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the op, forward or forward and backward, on tensors that have a shape and no memory."""

    dtype: str = "bf16"
    dim: int = 128
    heads: int = 12
    key_heads: int = 12
    length: int = 32760
    tail: str = "pooled"
    mixing: str = "row"
    feature_map: str = "softmax"
    qk_format: str | None = None
    pv_format: str | None = None
    sparsity: float = 0.97
    block_q: int = 128
    block_k: int = 64
    gain: bool = False  # a learned one
    logit: bool = False
    router: bool = False
    masked: bool = False
    grid: bool = False  # tokens in 3D tiles
    training: bool = False

    @property
    def name(self) -> str:
        """What differs from the default, for a table."""
        shape = "" if self.heads == self.key_heads else f" {self.heads}/{self.key_heads} heads"
        if self.length != Case.length:
            shape += f" N={self.length}"
        blocks = f" blocks {self.block_q}/{self.block_k}" if (self.block_q, self.block_k) != (128, 64) else ""
        formats = "".join(f" {k} {f}" for k, f in (("qk", self.qk_format), ("pv", self.pv_format)) if f)
        flags = (name for name in ("gain", "logit", "router", "masked", "grid", "training") if getattr(self, name))
        feature_map = "" if self.feature_map == "softmax" else f" {self.feature_map}"
        dense = "" if self.sparsity else " dense"
        return (
            f"{self.dtype} D={self.dim}{shape}{blocks} {self.tail},{self.mixing}{feature_map}{dense}{formats} "
            f"{' '.join(flags)}"
        ).strip()

    def settings(self) -> Settings:
        return Settings(
            scale=self.dim**-0.5,
            sparsity_units=round(self.sparsity * 1_000_000),
            block_q=self.block_q,
            block_k=self.block_k,
            feature_map=self.feature_map,
            qk_format=self.qk_format,
            pv_format=self.pv_format,
            tail=self.tail,
            mixing=self.mixing,
            token_grid=[self.length // 1560, 30, 52] if self.grid else None,
            exact_prefix=self.length % 1560 if self.grid else 0,
            exact_suffix=0,
        )

    def call(self) -> None:
        """Run the launchers: the forward's, and with `training` the backward's."""
        dtype, settings = DTYPES[self.dtype], self.settings()

        def tokens(heads: int) -> Tensor:
            return torch.empty(1, self.length, heads, self.dim, dtype=dtype, device="meta").transpose(1, 2)

        def learned(present: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, device="meta") if present else None

        q, k, v = tokens(self.heads), tokens(self.key_heads), tokens(self.key_heads)
        mask = torch.empty(1, 1, 1, self.length, dtype=torch.bool, device="meta") if self.masked else None
        logit = learned(self.logit, self.heads, num_blocks(self.length, self.block_q))
        gain = learned(self.gain, self.heads)
        proj_q, proj_k = (learned(self.router, self.dim, self.dim) for _ in range(2))
        cuda_forward.forward(q, k, v, mask, proj_q, proj_k, logit, gain, self.training, settings)
        if self.training:
            saved = (empty_output(q), empty_output(q), *empty_saved(q, k, settings))
            triton_backward.backward(empty_output(q), q, k, v, mask, logit, gain, *saved, settings)


FORMS = [(tail, mixing) for tail in ("pooled", "linear") for mixing in ("row", "block")]
FORMATS: tuple[tuple[str | None, str | None], ...] = (
    ("int8", None), ("int8", "fp8"), ("fp8", None), ("fp8", "fp8"), (None, "fp8"),
)  # fmt: skip


def quick_cases() -> Iterator[Case]:
    """Every kernel and every format once, at the head dim and dtype that matter most."""
    yield Case(training=True, router=True)
    yield Case(tail="linear", mixing="block", training=True)
    yield Case()
    yield Case(tail="linear", mixing="block")
    yield Case(grid=True, masked=True, gain=True, logit=True)
    yield Case(grid=True, gain=True, logit=True)
    for qk_format, pv_format in FORMATS:
        yield Case(qk_format=qk_format, pv_format=pv_format)
    # States in FP8, with values' scales and without.
    for qk_format, pv_format in (("fp8", "fp8"), ("fp8", None)):
        yield Case(tail="linear", mixing="block", qk_format=qk_format, pv_format=pv_format)
    # So many key blocks that on Hopper a warp chooses a row's.
    yield Case(length=LONG)
    # Numbers that are 1 are constants to the compiler.
    for options in ({"logit": True}, {"tail": "linear", "mixing": "block"}):
        yield Case(heads=1, key_heads=1, length=LONG, qk_format="fp8", pv_format="fp8", **options)


def all_cases() -> Iterator[Case]:
    """The quick cases, then head dims, dtypes, forms and options, each with what it could change."""
    yield from quick_cases()
    for dim in DIMS:
        yield Case(dim=dim, training=True)
        yield Case(dim=dim, tail="linear", mixing="block", training=True)
        yield Case(dim=dim, qk_format="int8")
        yield Case(dim=dim, qk_format="fp8", pv_format="fp8")
    for dim in (64, 128):
        yield Case(dim=dim, gain=True, logit=True, training=True)
        yield Case(dim=dim, grid=True)
        yield Case(dim=dim, grid=True, gain=True, logit=True, training=True)
        yield Case(dim=dim, grid=True, tail="linear", mixing="block")
    for dim in (64, 256):
        yield Case(dim=dim, tail="linear", mixing="block")
        yield Case(dim=dim, tail="pooled", mixing="block")
        yield Case(dim=dim, qk_format="int8", pv_format="fp8")
    yield Case(tail="linear", mixing="row", training=True)
    yield Case(qk_format="int8", training=True)
    yield Case(key_heads=2, training=True)
    yield Case(dtype="fp16", training=True)
    yield Case(dtype="fp16", tail="linear", mixing="block", training=True)
    yield Case(dtype="fp16", qk_format="int8", pv_format="fp8")
    for dim in (64, 128, 256):
        yield Case(dtype="fp32", dim=dim, training=True)
        yield Case(dtype="fp32", dim=dim, tail="linear", mixing="block", training=True)
        yield Case(dtype="fp32", dim=dim, qk_format="int8")
    options = Case(training=True, masked=True, grid=True, logit=True, router=True)
    for tail, mixing in FORMS:
        yield replace(options, tail=tail, mixing=mixing, gain=mixing == "row")
    yield replace(options, qk_format="int8", pv_format="fp8", key_heads=2)
    yield replace(options, qk_format="int8", tail="linear", mixing="block")
    yield Case(qk_format="fp8", pv_format="fp8", sparsity=0.75)
    yield Case(qk_format="int8", pv_format="fp8", gain=True, logit=True)
    for qk_format, pv_format in FORMATS:
        yield Case(tail="linear", mixing="block", qk_format=qk_format, pv_format=pv_format)
    yield Case(dtype="fp16", tail="linear", mixing="block", qk_format="fp8", pv_format="fp8")
    for grid, masked in ((True, False), (False, True), (True, True)):
        yield Case(length=LONG, grid=grid, masked=masked)
    # 60 words of key blocks, in two parts, and 64, the most that a warp chooses from.
    for length in (120_000, 131_072):
        yield Case(length=length, grid=True, masked=True)
    yield Case(length=LONG, tail="linear", mixing="block", qk_format="fp8", pv_format="fp8")
    yield Case(sparsity=0.0, training=True)
    for length in (1, 262_144):
        yield Case(length=length, training=True)
    for block_q, block_k in ((16, 16), (256, 256)):
        yield Case(block_q=block_q, block_k=block_k, training=True)
        yield Case(block_q=block_q, block_k=block_k, tail="linear", mixing="block", training=True)
        yield Case(block_q=block_q, block_k=block_k, qk_format="int8", pv_format="fp8")
