"""Compile an image transformer with SLA2 attention into a package, and run it in a process without this package.

The model is diffusers' own ``FluxTransformer2DModel`` with a small configuration and random weights. The package holds
compiled C++ (on a GPU: compiled Triton kernels) and the weights; the process that runs it imports nothing but torch,
and C++ programs can load it too. Needs a C++ compiler; takes a minute on a CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from sla2_compile import export

# What another program does: torch only.
RUN = """
import sys, time, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2])
package(**inputs)
begin = time.perf_counter()
(out,) = package(**inputs)
print(f"{tuple(out.shape)} in {time.perf_counter() - begin:.3f} s")
print("sla2_compile imported:", "sla2_compile" in sys.modules)
"""


def make_inputs(side: int, num_text_tokens: int = 64) -> dict[str, Any]:
    """Random inputs for an image of side x side tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    return {
        "hidden_states": torch.randn(1, side * side, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, num_text_tokens, 128, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(num_text_tokens, 3),
        "return_dict": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64, help="tokens along one side of the image (default: 64)")
    parser.add_argument("--sparsity", type=float, default=0.95, help="key blocks that skip the exact branch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    model = model.to(args.device).eval()
    inputs = make_inputs(args.side)
    inputs = {name: x.to(args.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        path, saved = Path(folder) / "flux.pt2", Path(folder) / "inputs"
        print(export(model, (), path, kwargs=inputs, format="aoti", config={"sparsity": args.sparsity}))
        torch.save(inputs, saved)
        subprocess.run([sys.executable, "-c", RUN, str(path), str(saved)], check=True)


if __name__ == "__main__":
    main()
