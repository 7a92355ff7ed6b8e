"""Time and peak extra memory of compiled SLA2 attention on this CPU, against PyTorch's dense attention in the same run.

    python benchmarks/cpu_attention.py            print the table
    python benchmarks/cpu_attention.py --check    also fail below 12x, or above 4x the size of q
    python benchmarks/cpu_attention.py --save     also write benchmarks/results/cpu_attention.json

Both sides are called under ``no_grad`` on bf16 inputs, warm, alternating and rotating through input sets, so that drift
of the machine meets both and no input stays in a cache. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate

from sla2_compile import SLA2Config, attention

RESULTS = Path(__file__).parent / "results" / "cpu_attention.json"
MIN_RATIO = 12.0
MAX_MEMORY_RATIO = 4.0
NUM_INPUT_SETS = 3

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_inputs(shape: tuple[int, ...], seed: int) -> Inputs:
    """q, k and v in bf16, standard normal, each of ``shape`` (B, H, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3))
    return q, k, v


def compiled_sla2(sparsity: float, *, dynamic: bool | None = None) -> Attention:
    """``sla2_compile.attention`` at one sparsity, compiled by Inductor."""
    config = SLA2Config(sparsity=sparsity)
    return torch.compile(lambda q, k, v: attention(q, k, v, config=config), dynamic=dynamic)


def time_call(function: Attention, inputs: Inputs) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - begin


def measure_times(shape: tuple[int, ...], sparsity: float, num_rounds: int) -> tuple[float, float]:
    """Median seconds of dense attention and of SLA2; three SLA2 calls for each dense one, being the shorter."""
    sla2 = compiled_sla2(sparsity)
    input_sets = [make_inputs(shape, seed) for seed in range(NUM_INPUT_SETS)]
    for warm_up in (F.scaled_dot_product_attention, sla2):
        warm_up(*input_sets[-1])
    dense_seconds, sla2_seconds = [], []
    for i in range(num_rounds):
        dense_seconds.append(time_call(F.scaled_dot_product_attention, input_sets[i % NUM_INPUT_SETS]))
        sla2_seconds += [time_call(sla2, input_sets[(i + j) % NUM_INPUT_SETS]) for j in range(3)]
    return median(dense_seconds), median(sla2_seconds)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure_memory_here(shape: tuple[int, ...], sparsity: float) -> float:
    """Peak growth of resident memory during one call, as a multiple of q's bytes; the output counts as extra.

    Short sequences warm it up, compiled with dynamic lengths, so that nothing compiles in the measured call. A thread
    samples the resident size, as the operating system's own peak would include the compiler's.
    """
    sla2 = compiled_sla2(sparsity, dynamic=True)
    for num_tokens in (1024, 1536):
        sla2(*make_inputs((*shape[:2], num_tokens, shape[3]), seed=0))
    inputs = make_inputs(shape, seed=0)
    before = peak = resident_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(0.0005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    sla2(*inputs)
    done.set()
    sampler.join()
    return (peak - before) / (inputs[0].numel() * inputs[0].element_size())


def measure_memory(shape: tuple[int, ...], sparsity: float) -> float:
    """``measure_memory_here`` in a fresh process, where no freed memory of the timing runs can be reused unseen."""
    command = [sys.executable, __file__, "--memory-only", "--sparsity", str(sparsity), "--shape", *map(str, shape)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 4, 16384, 128), metavar=("B", "H", "N", "D"))
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--rounds", type=int, default=5, help="timed dense calls (default: 5)")
    parser.add_argument(
        "--check", action="store_true", help=f"fail below {MIN_RATIO:g}x or above {MAX_MEMORY_RATIO:g} q"
    )
    parser.add_argument(
        "--save", action="store_true", help=f"write the figures to {RESULTS.parent.name}/{RESULTS.name}"
    )
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = tuple(args.shape)

    with torch.no_grad():
        if args.memory_only:
            print(measure_memory_here(shape, args.sparsity))
            return 0
        dense_seconds, sla2_seconds = measure_times(shape, args.sparsity, args.rounds)
    memory_ratio = measure_memory(shape, args.sparsity)
    ratio = dense_seconds / sla2_seconds

    print(f"{shape} (B, H, N, D), bfloat16, sparsity {args.sparsity:g}, {torch.get_num_threads()} threads")
    rows = [
        ("dense SDPA, ms", dense_seconds * 1e3),
        ("SLA2 compiled, ms", sla2_seconds * 1e3),
        ("ratio", ratio),
        ("ideal ratio, 1 / (1 - sparsity)", 1 / (1 - args.sparsity)),
        ("peak extra memory, times q", memory_ratio),
    ]
    print(tabulate(rows, floatfmt=".2f"))

    if args.save:
        RESULTS.parent.mkdir(exist_ok=True)
        record = {
            "command": "python benchmarks/cpu_attention.py --save",
            "shape": shape,
            "sparsity": args.sparsity,
            "dense_ms": round(dense_seconds * 1e3, 2),
            "sla2_ms": round(sla2_seconds * 1e3, 2),
            "ratio": round(ratio, 2),
            "memory_times_q": round(memory_ratio, 2),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    failed = ratio < MIN_RATIO or memory_ratio > MAX_MEMORY_RATIO
    if args.check and failed:
        print(f"expected at least {MIN_RATIO:g}x and at most {MAX_MEMORY_RATIO:g} times q", file=sys.stderr)
    return int(args.check and failed)


if __name__ == "__main__":
    sys.exit(main())
