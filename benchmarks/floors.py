"""The floor: the least time that an attention could take on this machine, from its bytes, its operations and two rates.

    floor = max(bytes / copy bandwidth, sum over formats of operations / matmul rate)

Both rates are measured in the same run, on random data. Bytes: every input read once, every result written once; reads
and writes count alike, as in the copy. Operations, two per multiply-add, forward:

    kept     4 x (tokens in kept pairs of blocks) x D       half in the format of Q K^T, half in that of P V
    router   2 x M x T x D                                  16 bit
    pooled   4 x N x T x D                                  half in the format of Q K^T, half in 16 bit or all-FP8's
    linear   2 x (N + N_kv) x D x D                         16 bit: phi(K)^T V and phi(Q) H
    row mixing with a linear tail  2 x N x T x D            16 bit: the tail's scores

Not counted: exponentials, quantisation, and whatever leaves the kept blocks out of a linear tail's sums, whose cost
depends on the method chosen. A backward does 5 products of kept and pooled pairs for the forward's 2, and twice the
linear tail's; it reads q, k, v, out and its gradient and writes three gradients, all in 16 bit. The floor is thus
optimistic everywhere: no fraction of it that is printed flatters the measured code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

from benchmarks.timing import measure, short_error
from sla2_compile.config import SLA2Config
from sla2_compile.kernels.blocks import exact_query_blocks, max_kept_blocks, num_blocks
from sla2_compile.quant.formats import rounds_means_values

MATMUL_SIZE = 8192
COPY_BYTES = 1 << 31
TINY_MATMUL_SIZE = 256
TINY_COPY_BYTES = 1 << 20
DENSE_FORMAT = "16-bit"


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device: bytes per second of a copy, operations per second of a matmul per format.

    `missing` says why a format has no rate; the floor then uses the 16-bit one.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)

    def rate(self, number_format: str) -> float:
        return self.flops_per_s.get(number_format, self.flops_per_s[DENSE_FORMAT])


@dataclass(frozen=True)
class Work:
    """The least that a computation moves and computes."""

    num_bytes: int
    flops: dict[str, int]

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def floor_ms(self, ceilings: Ceilings) -> float:
        arithmetic = sum(flops / ceilings.rate(number_format) for number_format, flops in self.flops.items())
        return 1e3 * max(self.num_bytes / ceilings.bytes_per_s, arithmetic)


def attention_forward_work(shape: tuple[int, int, int, int], config: SLA2Config, itemsize: int = 2) -> Work:
    """Least work of one SLA2 forward over q, k, v of `shape` (B, H, N, D)."""
    batch, heads, length, dim = shape
    rows, total = num_blocks(length, config.block_q), num_blocks(length, config.block_k)
    flops = {DENSE_FORMAT: 2 * rows * total * dim}

    def add(number_format: str | None, count: int) -> None:
        name = number_format or DENSE_FORMAT
        flops[name] = flops.get(name, 0) + count

    for number_format in (config.qk_format, config.pv_format):
        add(number_format, 2 * _kept_pairs(length, config) * dim)
    tail = _tail_flops(length, dim, total, config)
    if config.tail == "pooled":
        add(config.qk_format, tail // 2)
        add(config.pv_format if rounds_means_values(config.qk_format, config.pv_format) else None, tail // 2)
    else:
        add(None, tail)
    scaled = {name: batch * heads * count for name, count in flops.items()}
    return Work(4 * batch * heads * length * dim * itemsize, scaled)


def attention_backward_work(shape: tuple[int, int, int, int], config: SLA2Config, itemsize: int = 2) -> Work:
    """Least work of one SLA2 backward."""
    batch, heads, length, dim = shape
    total = num_blocks(length, config.block_k)
    tail = _tail_flops(length, dim, total, config)
    per_head = 10 * _kept_pairs(length, config) * dim + (5 * tail // 2 if config.tail == "pooled" else 2 * tail)
    return Work(8 * batch * heads * length * dim * itemsize, {DENSE_FORMAT: batch * heads * per_head})


def dense_work(shape: tuple[int, int, int, int], *, backward: bool = False, itemsize: int = 2) -> Work:
    """Least work of dense attention: the forward, or the forward and the backward."""
    batch, heads, length, dim = shape
    pairs = batch * heads * length * length * dim
    size = batch * heads * length * dim * itemsize
    return Work(12 * size if backward else 4 * size, {DENSE_FORMAT: (14 if backward else 4) * pairs})


def _kept_pairs(length: int, config: SLA2Config) -> int:
    """Pairs of a query and a key token in kept blocks, the last blocks counted as full ones are not."""
    total = num_blocks(length, config.block_k)
    exact = config.exact_prefix, config.exact_suffix
    all_rows = exact_query_blocks(length, length, config.block_q, *exact).count
    slots = max_kept_blocks(length, config.block_k, config.sparsity_units, *exact)
    share = all_rows * total + (num_blocks(length, config.block_q) - all_rows) * slots
    return min(length * length, share * config.block_q * config.block_k)


def _tail_flops(length: int, dim: int, total: int, config: SLA2Config) -> int:
    if config.tail == "pooled":
        return 4 * length * total * dim
    return 4 * length * dim * dim + (2 * length * total * dim if config.mixing == "row" else 0)


def measure_ceilings(device: torch.device, *, tiny: bool = False) -> Ceilings:
    """Measure a device's copy bandwidth and matmul rates on random data."""
    size = TINY_MATMUL_SIZE if tiny else MATMUL_SIZE
    flops: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, product in (("16-bit", _product_16), ("int8", _product_int8), ("fp8", _product_fp8)):
        try:
            flops[name] = 2 * size**3 / (_median_ms(*product(size, device)) / 1e3)
        except Exception as error:  # a format this device or this build of PyTorch lacks
            missing[name] = short_error(error)
    source = torch.randn((TINY_COPY_BYTES if tiny else COPY_BYTES) // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_ms = _median_ms(target.copy_, source)
    return Ceilings(2 * source.nbytes / (copy_ms / 1e3), flops, missing)


def _median_ms(function: Callable[..., object], *inputs: torch.Tensor) -> float:
    return median(measure(function, [inputs], budget_s=0.1).ms for _ in range(3))


def _product_16(size: int, device: torch.device) -> tuple[Callable[..., object], torch.Tensor, torch.Tensor]:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return torch.mm, a, b.mT


def _product_int8(size: int, device: torch.device) -> tuple[Callable[..., object], torch.Tensor, torch.Tensor]:
    a, b = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    return torch._int_mm, a, b.mT


def _product_fp8(size: int, device: torch.device) -> tuple[Callable[..., object], torch.Tensor, torch.Tensor]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return product, a, b.mT
