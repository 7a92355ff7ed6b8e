"""Save a video transformer with SLA2 attention as an exported program, and run it on other numbers of frames.

The model is diffusers' own ``WanTransformer3DModel`` with a small configuration and random weights. The file is
portable: it holds the operations that attention is made of, so that it loads where this package is not installed.
Without ``portable`` it would hold the operator ``sla2::attention``, which runs the fastest code of the machine that
loads it. Takes half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.export import Dim

from sla2_compile import export


def make_inputs(num_frames: int) -> dict[str, Tensor]:
    """Random latents of 32 x 32, that is 256 tokens a frame, and a text of 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, num_frames, 32, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, 64, generator=generator),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12, help="frames of the example input (default: 12)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="key blocks that skip the exact branch")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, text_dim=64, ffn_dim=256, num_layers=2
    ).eval()
    inputs = make_inputs(args.frames)
    # From 2,048 tokens on, which is the default min_seq_len.
    shapes = {**dict.fromkeys(inputs), "hidden_states": {2: Dim("frames", min=8, max=40)}}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan.pt2"
        report = export(
            model,
            (),
            path,
            kwargs={**inputs, "return_dict": False},
            dynamic_shapes={**shapes, "return_dict": None},
            config={"sparsity": args.sparsity},
            portable=True,
        )
        print(report)
        loaded = torch.export.load(path).module()
    with torch.no_grad():
        for num_frames in (8, 20):
            inputs = make_inputs(num_frames)
            (out,) = loaded(**inputs, return_dict=False)
            (dense,) = model(**inputs, return_dict=False)
            error = ((out - dense).norm() / dense.norm()).item()
            print(f"{num_frames} frames: relative L2 difference from the dense model {error:.4f}")


if __name__ == "__main__":
    main()
