"""Attention's inputs as the matrices that the copy engine of Hopper and later reads."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_compile.kernels.launch import MAX_LAUNCHES, descriptor_like


def matrix_shape(x: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of the matrix that holds `x` (B, H, N, D), two tokens of a head being one row apart.

    A head begins some columns to the right of its batch element's first row, or whole rows below. None where the
    layout is another, or not aligned to the 16 bytes that the copy engine needs.
    """
    (batch, heads, length, dim), (batch_stride, head_stride, pitch, _) = x.shape, x.stride()
    if pitch < dim or pitch * x.element_size() % 16 or x.data_ptr() % 16 or (batch > 1 and batch_stride % pitch):
        return None
    if heads > 1 and head_stride % pitch and heads * head_stride > pitch:
        return None
    last = (batch - 1) * batch_stride + (heads - 1) * head_stride
    return last // pitch + length, pitch


def matrix_steps(x: Tensor) -> tuple[int, int, int]:
    """Of a matrix as above: rows from one batch element to the next, and rows and columns from one head to the next."""
    batch_stride, head_stride, pitch, _ = x.stride()
    rows, columns = divmod(head_stride, pitch) if x.shape[1] > 1 else (0, 0)
    return (batch_stride // pitch if x.shape[0] > 1 else 0), rows, columns


def row_tiles(x: Tensor, rows: int) -> Any:
    """Triton's descriptor for tiles of `rows` tokens of `x` (B, H, N, D); None where its layout forbids it."""
    shape = matrix_shape(x)
    return shape and descriptor_like(_tiles(x.dtype, *shape, rows, x.shape[3]), x)


@functools.lru_cache(MAX_LAUNCHES)
def _tiles(dtype: torch.dtype, length: int, pitch: int, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(torch.empty(0, dtype=dtype), [length, pitch], [pitch, 1], [rows, columns])
