"""The main job, on real input: a video transformer compiled by plain Inductor and by ``backend="sla2"``.

The model is diffusers' own ``WanTransformer3DModel``, unedited, with a small configuration and random weights. Its
input is cut from real pictures: a window that pans across the photographs shipped inside scikit-learn. It runs on a CPU
in about three minutes, most of it compilation and dense attention.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from sklearn.datasets import load_sample_images

import sla2_compile

FRAME_SIZE = (256, 512)
LATENT_CHANNELS = 16
TEXT_DIM = 64
NUM_TEXT_TOKENS = 32
NUM_TIMED_RUNS = 2


class Progress:
    """Prints lines that begin with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, message: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.1f} s] {message}", flush=True)


def cut_latents(num_frames: int) -> torch.Tensor:
    """Latents of a clip that pans across real photographs.

    Args:
        num_frames: frames of the clip; the first half pans across one photograph, the rest across the other.

    Returns:
        (1, 16, num_frames, 64, 128): each 4 x 4 patch of a frame's luma becomes 16 channels, standardised.
    """
    photos = [torch.from_numpy(np.array(photo)) for photo in load_sample_images().images]
    luma_weights = torch.tensor([0.299, 0.587, 0.114])
    height, width = FRAME_SIZE
    frames = []
    for i in range(num_frames):
        photo = photos[i * len(photos) // num_frames]
        top, left = 8 * i, 12 * i % (photo.shape[1] - width)
        window = photo[top : top + height, left : left + width].float() @ luma_weights
        frames.append(F.pixel_unshuffle(window[None, None], 4)[0])
    latents = torch.stack(frames, dim=1)[None]
    return (latents - latents.mean()) / latents.std()


def build_model(num_layers: int) -> WanTransformer3DModel:
    """The real class with a small configuration, in bfloat16 except for what the class itself keeps in float32."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=128,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        ffn_dim=1024,
        num_layers=num_layers,
    )
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def time_compiled(compiled: Any, inputs: dict[str, Any], progress: Progress, label: str) -> tuple[float, torch.Tensor]:
    """Seconds of the median run after a first one that compiles, and the output."""
    begin = time.perf_counter()
    (output,) = compiled(**inputs)
    progress(f"{label}: compiled and ran once in {time.perf_counter() - begin:.1f} s")
    seconds = []
    for i in range(NUM_TIMED_RUNS):
        begin = time.perf_counter()
        compiled(**inputs)
        seconds.append(time.perf_counter() - begin)
        progress(f"{label}: run {i + 1} of {NUM_TIMED_RUNS} took {seconds[-1]:.2f} s")
    return median(seconds), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8, help="latent frames; each is 2048 tokens (default: 8)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (default: 2)")
    parser.add_argument("--sparsity", type=float, default=0.97, help="key blocks that skip the exact branch")
    parser.add_argument("--html", type=Path, help="also write the site report, with block masks, to this file")
    args = parser.parse_args()
    if not 1 <= args.frames <= 16 or args.layers < 1:
        parser.error("expected 1 to 16 frames (the photographs are no larger) and at least one layer")
    progress = Progress()

    model = build_model(args.layers)
    latents = cut_latents(args.frames).to(torch.bfloat16)
    # The patch size is (1, 2, 2), so a token covers 2 x 2 latents of one frame.
    token_grid = (args.frames, latents.shape[-2] // 2, latents.shape[-1] // 2)
    inputs = {
        "hidden_states": latents,
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, TEXT_DIM, dtype=torch.bfloat16),
        "return_dict": False,
    }
    progress(
        f"WanTransformer3DModel, {args.layers} layers, 4 heads of 128, bfloat16, {torch.get_num_threads()} threads; "
        f"latents of real photographs, {args.frames} frames, {math.prod(token_grid)} tokens"
    )

    options = {"sparsity": args.sparsity, "token_grid": token_grid}
    config = sla2_compile.SLA2Config(**options)
    with torch.no_grad():
        report = sla2_compile.explain(model, config=config, **inputs)
        progress("attention sites found in the graph:")
        print(report, flush=True)
        if args.html:
            args.html.write_text(report.to_html())
            progress(f"wrote {args.html}")

        dense_seconds, dense_output = time_compiled(torch.compile(model), inputs, progress, "plain Inductor")
        # The same module is compiled again: forget the code that belongs to the first backend.
        torch.compiler.reset()
        compiled = torch.compile(model, backend="sla2", options=options)
        sla2_seconds, sla2_output = time_compiled(compiled, inputs, progress, "sla2")

    error = ((sla2_output.float() - dense_output.float()).norm() / dense_output.float().norm()).item()
    delivered = [s["delivered_sparsity"] for s in report.to_dict()["sites"] if s["verdict"] == "sla2"]
    print(
        f"\nplain Inductor        {dense_seconds:8.2f} s"
        f"\nbackend=sla2          {sla2_seconds:8.2f} s"
        f"\nratio                 {dense_seconds / sla2_seconds:8.2f} x"
        f"\ndelivered sparsity    {100 * sum(delivered) / max(len(delivered), 1):8.2f} %  "
        f"({len(delivered)} sites; requested {100 * args.sparsity:g} %)"
        f"\noutput's relative L2 error {error:.4f} against plain Inductor"
        "\n\nThe weights are random, so the error is not a claim about the quality of samples."
        "\nThe times do not depend on the weights."
    )


if __name__ == "__main__":
    main()
