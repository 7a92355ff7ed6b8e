"""An exported package with SLA2 attention against the dense model's package, both run in a process without our package.

    python -m benchmarks.export                   on this CPU: 16,384 tokens, 97 % sparsity, float32
    python -m benchmarks.export --device cuda     on this GPU: 32,760 tokens, bfloat16, with our Triton kernels
    python -m benchmarks.export --check           also fail below 5x on a CPU (disagreement with eager always fails)
    python -m benchmarks.export --save            also write benchmarks/results/export-DEVICE.json

The model is dominated by attention: two layers of it with their projections and nothing else. Needs PyTorch and a C++
compiler; on a GPU Triton too.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine, save_record
from sla2_compile.export import export

MIN_RATIO = 5.0
# Tokens, heads and dtype; the head dim is 64 on a CPU and 128 on a GPU, as in models that run there.
CPU = (16_384, 4, 64, torch.float32)
CUDA = (32_760, 12, 128, torch.bfloat16)
TINY = (1024, 2, 32, torch.float32)
# Relative L2 from the eager model in the same dtype: a choice of the router that is close to a tie may differ.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Layer(nn.Module):
    """Residual self-attention over (B, N, C)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(heads * dim)
        self.qkv = nn.Linear(heads * dim, 3 * heads * dim)
        self.out = nn.Linear(heads * dim, heads * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def measure(device: torch.device, size: tuple[int, int, int, torch.dtype], sparsity: float) -> dict[str, Any]:
    """Export the model dense and with SLA2, run both packages elsewhere, and compare the latter with eager."""
    num_tokens, heads, dim, dtype = size
    torch.manual_seed(0)
    model = nn.Sequential(Layer(heads, dim), Layer(heads, dim)).to(device, dtype).eval()
    x = torch.randn(1, num_tokens, heads * dim).to(device, dtype)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        begin = time.perf_counter()
        _say("building the dense package")
        dense = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (x,)), package_path=str(folder / "dense.pt2")
        )
        dense_built = time.perf_counter()
        _say("building and checking the SLA2 package")
        report = export(
            model,
            (x,),
            folder / "sla2.pt2",
            format="aoti",
            config={"sparsity": sparsity, "min_seq_len": 0},
            tolerance=TOLERANCE[dtype],
        )
        sla2_built = time.perf_counter()
        _say("running both packages in a process of their own")
        torch.save(x, folder / "input")
        script = str(Path(__file__).with_name("run_packages.py"))
        command = [sys.executable, script, *map(str, (folder / "input", folder / "output", dense, report.path))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"the packages did not run in a process of their own:\n{result.stderr}")
        dense_s, sla2_s = map(median, json.loads(result.stdout.splitlines()[-1]))
        dense_out, sla2_out = (out.float() for out in torch.load(folder / "output"))
        package_bytes = report.path.stat().st_size
    (check,) = report.checks
    return {
        "shape": {"tokens": num_tokens, "heads": heads, "head_dim": dim, "layers": 2, "dtype": str(dtype)},
        "sparsity": sparsity,
        "dense_package_s": dense_s,
        "sla2_package_s": sla2_s,
        "ratio": dense_s / sla2_s,
        "difference_from_eager": check.difference,
        "difference_from_dense": ((sla2_out - dense_out).norm() / dense_out.norm()).item(),
        "eager_dense_s": check.dense_seconds,
        "build_dense_s": dense_built - begin,
        "build_and_check_sla2_s": sla2_built - dense_built,
        "package_mib": package_bytes / 2**20,
        "threads": torch.get_num_threads(),
        "kernels_in_package": "Triton" if device.type == "cuda" else "C++ and ATen",
    }


def _say(step: str) -> None:
    # To stderr, which a crash does not hold back.
    print(f"{step} ...", file=sys.stderr, flush=True)


def main() -> int:
    # Compiled packages run in this process: a crash in one shows where, and not only an exit status.
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to export for (default: cpu)")
    parser.add_argument("--sparsity", type=float, default=0.97, help="key blocks that skip the exact branch")
    parser.add_argument("--tiny", action="store_true", help="a small model, to test the script")
    parser.add_argument("--check", action="store_true", help="fail where a target is missed")
    parser.add_argument("--save", action="store_true", help="write the record to benchmarks/results")
    args = parser.parse_args()
    device = torch.device(args.device)
    record = measure(device, TINY if args.tiny else {"cpu": CPU, "cuda": CUDA}[args.device], args.sparsity)
    for name, value in record.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    if args.save:
        save_record(RESULTS / f"export-{args.device}.json", {**describe_machine("benchmarks.export", device), **record})
    failed = args.device == "cpu" and not args.tiny and record["ratio"] < MIN_RATIO
    if args.check and failed:
        print(f"expected at least {MIN_RATIO:g}x over the dense package", file=sys.stderr)
    return int(args.check and failed)


if __name__ == "__main__":
    sys.exit(main())
