"""Write a video transformer with SLA2 attention as ONNX: standard operators, or a node that a runtime may replace.

The model is diffusers' own ``CogVideoXTransformer3DModel`` with a small configuration and random weights. Both files
run under onnxruntime on a CPU. With ``--int8`` the products of queries and keys go through QuantizeLinear and
DequantizeLinear. Takes half a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import CogVideoXTransformer3DModel

from sla2_compile import export


def make_inputs() -> dict[str, Any]:
    """Random latents of 9 frames of 32 x 32, that is 2,304 tokens, and a text of 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 9, 16, 32, 32, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, 64, generator=generator),
        "timestep": torch.tensor([500]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="key blocks that skip the exact branch")
    parser.add_argument("--int8", action="store_true", help="INT8 for the products of queries and keys")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=1,
        sample_width=32,
        sample_height=32,
        sample_frames=33,
        max_text_seq_length=32,
    ).eval()
    inputs, config = make_inputs(), {"sparsity": args.sparsity, "qk_format": "int8" if args.int8 else None}
    with tempfile.TemporaryDirectory() as folder:
        for onnx_op in ("standard", "custom"):
            path = Path(folder) / f"{onnx_op}.onnx"
            kwargs = {**inputs, "return_dict": False}
            print(export(model, (), path, kwargs=kwargs, format="onnx", onnx_op=onnx_op, config=config))
            operators = Counter(f"{node.domain}.{node.op_type}".strip(".") for node in onnx.load(path).graph.node)
            print(", ".join(f"{name} x {count}" for name, count in operators.most_common()))

        # What another program does: onnxruntime and NumPy only.
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        print("onnxruntime:", np.shape(out), "finite" if np.isfinite(out).all() else "not finite")


if __name__ == "__main__":
    main()
