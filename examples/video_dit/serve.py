"""Keep a fine-tuned model in one file, and make clips with it in a process that has only that file.

python -m examples.video_dit.serve model.pt --output frames.png
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.video_dit.compiling import COMPILERS, Compiler, compile_blocks
from examples.video_dit.flow import noise_like, sample
from examples.video_dit.frames import save_frames
from examples.video_dit.model import ModelConfig, VideoDiT
from sla2_compile.config import SLA2Config
from sla2_compile.prepare import prepare


def save_model(model: VideoDiT, options: Mapping[str, Any], path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write sizes, weights with the learned state, and the options to compile with."""
    content = {"config": dataclasses.asdict(model.config), "options": dict(options), "weights": dict(weights)}
    torch.save(content, path)


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[VideoDiT, dict[str, Any]]:
    """The model, with its learned state and formats, and its options."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    model, options = VideoDiT(ModelConfig(**content["config"])), content["options"]
    prepare_model(model, options)
    # Also brings what the state was calibrated for, and the formats.
    model.load_state_dict(content["weights"])
    return model.to(device).eval(), options


def prepare_model(model: VideoDiT, options: Mapping[str, Any]) -> None:
    """Attach learned state to the attention of the model."""
    (frames, height, width), device = model.config.clip, model.cos.device
    video, t = torch.zeros(1, frames, 3, height, width, device=device), torch.zeros(1, device=device)
    prepare(model, video, t, t.long(), config=SLA2Config.from_options(options))


def autocast(device: torch.device | str) -> torch.autocast:
    """bfloat16 on a GPU; full precision on a CPU, where 16 bits are slower."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def make_clips(model: VideoDiT, count: int, num_steps: int, seed: int) -> Tensor:
    """(count, F, 3, H, W) clips of the first labels from the noise of a seed."""
    (frames, height, width), device = model.config.clip, model.cos.device
    noise = noise_like(torch.empty(count, frames, 3, height, width, device=device), seed)
    label = (torch.arange(count) % model.config.num_labels).to(device)
    with autocast(device):
        return sample(model, noise, label, num_steps)


def digest(video: Tensor) -> str:
    """A hash of the bits of a tensor."""
    return hashlib.sha256(video.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a file written by save_model")
    parser.add_argument("--count", type=int, default=2, help="clips to make (default: 2)")
    parser.add_argument("--steps", type=int, default=8, help="steps of the sampler (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", choices=COMPILERS, default="inductor")
    parser.add_argument("--output", type=Path, help="write frames to this PNG")
    args = parser.parse_args(arguments)
    # As where the model was trained.
    torch.set_float32_matmul_precision("high")
    compiler: Compiler = args.compiler
    model, options = load_model(args.model, args.device)
    compile_blocks(model, options, compiler)
    video = make_clips(model, args.count, args.steps, args.seed)
    if args.output:
        save_frames(video, args.output)
    print(digest(video))


if __name__ == "__main__":
    main()
