"""How long calibration takes: a few layers of a Wan-1.3B-sized model at 480p length, scaled to all of them.

Random weights, a batch per timestep. What is measured on the layers that are there is multiplied by the layers of the
full model over those measured, and the forward passes that the full model needs besides are added; all is printed. On a
CPU choose tiny sizes:

    python -m benchmarks.calibration
    python -m benchmarks.calibration --device cpu --heads 2 --head-dim 32 --tokens 1024 --steps 20 --batches 4
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine, save_record
from sla2_compile.calibrate import calibrate
from sla2_compile.config import SLA2Config

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
    parser.add_argument("--store", choices=("host", "device"), default="host", help="where samples wait")
    parser.add_argument("--save", action="store_true", help="write the figures to results/calibration.json")
    args = parser.parse_args()

    device = torch.device(args.device)
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
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    report = calibrate(
        model,
        batches,
        sparsity=args.sparsity,
        config=SLA2Config(min_seq_len=0),
        steps=args.steps,
        num_query_blocks=args.num_query_blocks,
        memory_gib=args.memory_gib,
        store=args.store,
        **forms,
    )
    synchronize(device)
    print(report)
    # In the full model every group of sites runs all layers, not only the measured ones: the number of groups and the
    # length of each pass both grow with the layers.
    group_bytes = 3.5 * args.tokens * width * dtype.itemsize * args.batches
    num_groups = max(1, -(-args.full_layers * group_bytes // (args.memory_gib * 2**30)))
    scale = args.full_layers / args.layers
    passes = args.batches * forward * scale * num_groups
    scaled = report.seconds * scale + passes
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    machine = describe_machine("benchmarks.calibration", device)
    figures = {
        "machine": machine,
        "settings": vars(args),
        "forward_seconds": forward,
        "measured_seconds": report.seconds,
        "full_groups": num_groups,
        "full_passes_seconds": passes,
        "full_seconds": scaled,
        "full_seconds_per_sparsity": scaled / len(args.sparsity),
        "peak_gib": peak,
    }
    print(
        f"{machine['device']}: {args.layers} layers of {args.heads} heads of {args.head_dim}, {args.tokens} tokens, "
        f"{dtype}\n"
        f"measured {report.seconds:.1f} s for {args.layers} layers and {len(args.sparsity)} sparsities, one forward "
        f"{forward:.3f} s\n"
        f"scaled to {args.full_layers} layers: {report.seconds * scale:.0f} s, and {passes:.0f} s more of forward "
        f"passes in {num_groups:.0f} groups: {scaled / 60:.1f} minutes, "
        f"{scaled / 60 / len(args.sparsity):.1f} per sparsity"
        + ("" if peak is None else f"; peak {peak:.1f} GiB on the device")
    )
    if args.save:
        save_record(RESULTS / "calibration.json", figures)


if __name__ == "__main__":
    main()
