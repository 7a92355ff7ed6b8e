"""How long calibration takes: a few layers of a Wan-1.3B-sized model at 480p length, scaled to all of them.

Random weights, a batch per timestep. A short calibration comes first, which compiles the kernels; its time is printed
apart. What is then measured on the layers that are there is multiplied by the layers of the full model over those
measured, and the forward passes that more groups of sites cost are added. On a CPU choose tiny sizes:

    python -m benchmarks.calibration
    python -m benchmarks.calibration --device cpu --heads 2 --head-dim 32 --tokens 1024 --steps 20 --batches 4
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine, save_record
from sla2_compile.calibrate import calibrate
from sla2_compile.config import SLA2Config
from sla2_compile.kernels.dispatch import implementation

FULL_LAYERS = 30


class Attention(nn.Module):
    """Wan's self-attention without its rotary embedding, whose cost is small."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, num_layers: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(width, num_heads) for _ in range(num_layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 6 * width), nn.GELU(), nn.Linear(6 * width, width))
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return x


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scale_up(args: argparse.Namespace, measured: float, forward: float, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds for the full model, from those measured on some of its layers.

    Args:
        args: the command line.
        measured: seconds of calibrating `args.layers` layers, which takes one pass over the batches.
        forward: seconds of one forward of these layers.
        dtype: of the samples.
    """
    # q, k, v of every batch, and the dense output (a third of that) of the held-out ones: at most half of all.
    group_bytes = 3.5 * args.tokens * args.heads * args.head_dim * dtype.itemsize * args.batches
    num_groups = max(1, math.ceil(args.full_layers * group_bytes / (args.memory_gib * 2**30)))
    scale = args.full_layers / args.layers
    # In the full model every group of sites runs all layers; one such pass is part of what was measured.
    passes = args.batches * forward * scale * (num_groups - 1)
    seconds = measured * scale + passes
    return {
        "forward_seconds": forward,
        "measured_seconds": measured,
        "full_groups": num_groups,
        "full_passes_seconds": passes,
        "full_seconds": seconds,
        "full_seconds_per_sparsity": seconds / len(args.sparsity),
    }


def print_figures(args: argparse.Namespace, figures: dict[str, Any], dtype: torch.dtype) -> None:
    scaled = figures["measured_seconds"] * args.full_layers / args.layers
    peak = "" if figures["peak_gib"] is None else f"; peak {figures['peak_gib']:.1f} GiB on the device"
    print(
        f"{figures['machine']['device']}: {args.layers} layers of {args.heads} heads of {args.head_dim}, "
        f"{args.tokens} tokens, {dtype}\n"
        f"measured {figures['measured_seconds']:.1f} s for {args.layers} layers and {len(args.sparsity)} sparsities, "
        f"one forward {figures['forward_seconds']:.3f} s; {figures['warm_up_seconds']:.0f} s before it for a short "
        f"calibration that compiles\n"
        f"scaled to {args.full_layers} layers: {scaled:.0f} s, and {figures['full_passes_seconds']:.0f} s more of "
        f"forward passes in {figures['full_groups']} groups: {figures['full_seconds'] / 60:.1f} minutes, "
        f"{figures['full_seconds_per_sparsity'] / 60:.1f} per sparsity{peak}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=2, help="layers to measure (default: 2)")
    parser.add_argument("--full-layers", type=int, default=FULL_LAYERS, help="layers to scale to (default: 30)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32760, help="sequence length (default: 32760, 480p)")
    parser.add_argument("--batches", type=int, default=12, help="timesteps (default: 12)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each site (default: 300)")
    parser.add_argument("--num-query-blocks", type=int, default=4, help="query blocks of a step (default: 4)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95])
    parser.add_argument("--forms", choices=("all", "default"), default="all", help="tails and mixings to compare")
    parser.add_argument("--memory-gib", type=float, default=32.0, help="bound of the captured samples (default: 32)")
    parser.add_argument("--store", choices=("host", "device"), help="where samples wait (default: device for cuda)")
    parser.add_argument("--save", action="store_true", help="write the figures to results/calibration.json")
    args = parser.parse_args()

    device = torch.device(args.device)
    args.store = args.store or ("device" if device.type == "cuda" else "host")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    width = args.heads * args.head_dim
    with device:
        model = Layers(args.layers, width, args.heads).to(dtype).eval()
        batches = [torch.randn(1, args.tokens, width, dtype=dtype) for _ in range(args.batches)]
    with torch.no_grad():
        model(batches[0])
        synchronize(device)
        begin = time.perf_counter()
        model(batches[0])
        synchronize(device)
        forward = time.perf_counter() - begin
    forms: dict[str, Any] = {} if args.forms == "all" else {"tails": ("pooled",), "mixings": ("row",)}
    settings: dict[str, Any] = {
        "sparsity": args.sparsity,
        "config": SLA2Config(min_seq_len=0),
        "num_query_blocks": args.num_query_blocks,
        "memory_gib": args.memory_gib,
        "store": args.store,
        **forms,
    }
    print(f"the held-out errors come from the {implementation(device)} implementation of the op", flush=True)
    begin = time.perf_counter()
    calibrate(copy.deepcopy(model), batches[:2], steps=4, **settings)
    synchronize(device)
    warm_up = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    report = calibrate(model, batches, steps=args.steps, **settings)
    synchronize(device)
    print(report)
    figures = scale_up(args, report.seconds, forward, dtype) | {
        "machine": describe_machine("benchmarks.calibration", device),
        "settings": vars(args),
        "implementation": implementation(device),
        "warm_up_seconds": warm_up,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    print_figures(args, figures, dtype)
    if args.save:
        save_record(RESULTS / "calibration.json", figures)


if __name__ == "__main__":
    main()
