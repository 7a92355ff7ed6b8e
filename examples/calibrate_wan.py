"""Learn the routing of a video transformer's attention, keep it in a file, and compile with it.

The model is diffusers' own ``WanTransformer3DModel`` with a small configuration and random weights, its input noisy
latents of a window that pans over the photographs shipped inside scikit-learn, at several timesteps. With random
weights attention has little structure, so the errors are not a claim about a trained model; the steps are the same. It
runs on a CPU in a few minutes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from sklearn.datasets import load_sample_images

from sla2_compile.calibrate import calibrate
from sla2_compile.config import SLA2Config
from sla2_compile.state_io import load_state, save_state

CHANNELS, TEXT_DIM, NUM_TEXT_TOKENS = 16, 64, 32


def build_model(num_layers: int) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        ffn_dim=256,
        num_layers=num_layers,
    )
    return model.eval()


def make_batches(count: int, num_frames: int) -> list[dict[str, Any]]:
    """Inputs of the model: noisy latents at `count` timesteps from high to low, as a sampler visits them."""
    generator = torch.Generator().manual_seed(0)
    photos = [torch.from_numpy(np.array(photo)).float().mean(-1) for photo in load_sample_images().images]
    made = []
    for i in range(count):
        share = 1 - (i + 0.5) / count
        windows = [
            photos[i % 2][8 * f : 8 * f + 128, 12 * f + 20 * i : 12 * f + 20 * i + 256] for f in range(num_frames)
        ]
        latents = F.pixel_unshuffle(torch.stack(windows)[:, None], 4).transpose(0, 1)[None]
        latents = (latents - latents.mean()) / latents.std()
        noise = torch.randn(latents.shape, generator=generator)
        made.append(
            {
                "hidden_states": (1 - share) * latents + share * noise,
                "timestep": torch.tensor([1000 * share]),
                "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, TEXT_DIM, generator=generator),
                "return_dict": False,
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4, help="latent frames; each is 512 tokens (default: 4)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (default: 2)")
    parser.add_argument("--batches", type=int, default=8, help="timesteps to learn from and measure on (default: 8)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each site (default: 60)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="key blocks that skip the exact branch")
    parser.add_argument("--html", type=Path, help="also write the report with its curves to this file")
    args = parser.parse_args()
    if not 1 <= args.frames <= 16 or args.batches < 2:
        parser.error("expected 1 to 16 frames (the photographs are no larger) and at least two batches")

    model, batches = build_model(args.layers), make_batches(args.batches, args.frames)
    # The patch size is (1, 2, 2), so a token covers 2 x 2 latents of one frame.
    grid = (args.frames, batches[0]["hidden_states"].shape[-2] // 2, batches[0]["hidden_states"].shape[-1] // 2)
    options: dict[str, Any] = {"token_grid": grid, "min_seq_len": math.prod(grid)}

    report = calibrate(model, batches, sparsity=args.sparsity, config=SLA2Config(**options), steps=args.steps)
    print(report)
    if args.html:
        args.html.write_text(report.to_html())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan.safetensors"
        save_state(model, path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
        # Another process would build the model the same way and load its weights, then the learned state.
        fresh = build_model(args.layers)
        load_state(fresh, path)

    with torch.no_grad():
        (dense,) = model(**batches[0])
        outputs = {}
        for name, each in (("untrained", build_model(args.layers)), ("calibrated", model), ("loaded", fresh)):
            torch.compiler.reset()
            compiled = torch.compile(each, backend="sla2", options={"sparsity": args.sparsity, **options})
            (outputs[name],) = compiled(**batches[0])
            error = ((outputs[name] - dense).norm() / dense.norm()).item()
            print(f"{name:<10} relative L2 error of the model's output {error:.5f}", flush=True)
    print("loaded equals calibrated bit for bit:", torch.equal(outputs["loaded"], outputs["calibrated"]))


if __name__ == "__main__":
    main()
