"""What calibration is worth on attention with structure: a small video transformer, trained here, then calibrated.

Trains a flow-matching transformer on clips made on the fly (a moving, zooming window over the photographs that ship in
scikit-learn, with a moving digit), calibrates it, and measures on clips that neither training nor calibration saw:
the error of every site's attention and of the model's output, untrained default against calibrated state, with the
paper's form (linear tail, block mixing) calibrated beside it.

    python -m benchmarks.calibration_quality --budget 0.95            print the tables (about ten minutes on a CPU)
    python -m benchmarks.calibration_quality --budget 0.95 --save     also write results/calibration_quality.json
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine, save_record
from sla2_compile.calibrate import calibrate
from sla2_compile.calibration_report import CalibrationReport
from sla2_compile.capture import Capture
from sla2_compile.config import SLA2Config
from sla2_compile.learned_state import Entry
from sla2_compile.prepare import owner_state, prepare
from sla2_compile.site_training import held_out_error

FRAMES, HEIGHT, WIDTH = 8, 64, 64
PATCH_FRAMES, PATCH_SIZE = 2, 4
GRID = (FRAMES // PATCH_FRAMES, HEIGHT // PATCH_SIZE, WIDTH // PATCH_SIZE)
NUM_TOKENS = math.prod(GRID)
PATCH_DIM = 3 * PATCH_FRAMES * PATCH_SIZE**2
WIDTH_MODEL, NUM_HEADS, NUM_LAYERS = 128, 4, 4
HEAD_DIM = WIDTH_MODEL // NUM_HEADS

# Blocks are smaller than the default, because so is the sequence: 64 key blocks of 16 tokens.
CONFIG = SLA2Config(block_q=32, block_k=16, token_grid=GRID, min_seq_len=0)
SPARSITIES = (0.95, 0.97)


class Clips:
    """Random clips of moving pictures, in patches: (batch, tokens, patch)."""

    def __init__(self, seed: int) -> None:
        photos = [torch.from_numpy(np.array(photo)) for photo in load_sample_images().images]
        resized = [
            F.interpolate(
                photo.permute(2, 0, 1)[None].float() / 127.5 - 1, size=(256, 256), mode="bilinear", antialias=True
            )
            for photo in photos
        ]
        self.photos = torch.cat(resized)
        self.digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: int) -> Tensor:
        time_axis = torch.linspace(-1, 1, FRAMES)
        center, speed = self._uniform(batch, 2) * 0.6, self._uniform(batch, 2) * 0.3
        zoom = (0.3 + 0.15 * self._uniform(batch, 1)) * (0.2 * self._uniform(batch, 1) * time_axis).exp()
        angle = 3.14 * self._uniform(batch, 1) + 0.4 * self._uniform(batch, 1) * time_axis
        position = center[:, None] + speed[:, None] * time_axis[:, None]  # (batch, frames, 2)
        photo = self.photos[torch.randint(len(self.photos), (batch,), generator=self.generator)]
        clip = _warp(photo, zoom, angle, position, "reflection")
        digit = self.digits[torch.randint(len(self.digits), (batch,), generator=self.generator)]
        center, speed = self._uniform(batch, 2) * 0.6, self._uniform(batch, 2) * 0.5
        size = (3 + self._uniform(batch, 1)).expand(-1, FRAMES)
        position = -size[..., None] * (center[:, None] + speed[:, None] * time_axis[:, None])
        cover = _warp(digit, size, torch.zeros_like(size), position, "zeros").clamp(0, 1)
        clip = clip * (1 - cover) + cover * torch.tensor([1.0, 0.8, -0.5])[:, None, None]
        clip = clip.view(batch, GRID[0], PATCH_FRAMES, 3, GRID[1], PATCH_SIZE, GRID[2], PATCH_SIZE)
        return clip.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(batch, NUM_TOKENS, PATCH_DIM)

    def noisy(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy clips at the given times (batch,), and the velocity that the model should predict."""
        clean = self(len(timestep))
        noise = torch.randn(clean.shape, generator=self.generator)
        weight = timestep[:, None, None]
        return (1 - weight) * clean + weight * noise, noise - clean

    def _uniform(self, *shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=self.generator) - 1


def _warp(pictures: Tensor, zoom: Tensor, angle: Tensor, position: Tensor, padding: str) -> Tensor:
    """Each picture (batch, C, ...) seen through a moving window: (batch * frames, C, HEIGHT, WIDTH)."""
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    theta = torch.cat([theta, position[..., None]], -1).flatten(0, 1)
    pictures = pictures.repeat_interleave(FRAMES, 0)
    grid = F.affine_grid(theta, [len(pictures), pictures.shape[1], HEIGHT, WIDTH], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode=padding, align_corners=False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH_MODEL, 3 * WIDTH_MODEL)
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.to_out = nn.Linear(WIDTH_MODEL, WIDTH_MODEL)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q, k = _rotate(self.norm_q(q), cos, sin), _rotate(self.norm_k(k), cos, sin)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH_MODEL, elementwise_affine=False) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH_MODEL, 4 * WIDTH_MODEL), nn.GELU(), nn.Linear(4 * WIDTH_MODEL, WIDTH_MODEL)
        )
        self.modulation = nn.Linear(WIDTH_MODEL, 6 * WIDTH_MODEL)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class VideoTransformer(nn.Module):
    """Predicts the velocity of flow matching for clips in patches."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH_DIM, WIDTH_MODEL)
        self.time = nn.Sequential(nn.Linear(64, WIDTH_MODEL), nn.SiLU(), nn.Linear(WIDTH_MODEL, WIDTH_MODEL))
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH_MODEL), nn.Linear(WIDTH_MODEL, PATCH_DIM)
        axes = torch.meshgrid(*(torch.arange(n).float() for n in GRID), indexing="ij")
        sizes = (HEAD_DIM // 4, HEAD_DIM * 3 // 8, HEAD_DIM * 3 // 8)
        angles = [
            axis.reshape(-1, 1) * 100 ** (-torch.arange(0, size, 2) / size)
            for axis, size in zip(axes, sizes, strict=True)
        ]
        self.register_buffer("cos", torch.cat(angles, -1).cos())
        self.register_buffer("sin", torch.cat(angles, -1).sin())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        phase = 1000 * timestep[:, None] * torch.exp(-math.log(10_000) * torch.arange(32, device=x.device) / 32)
        condition = F.silu(self.time(torch.cat([phase.cos(), phase.sin()], -1)))
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, condition, self.cos, self.sin)
        return self.out(self.norm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def train(num_steps: int) -> VideoTransformer:
    torch.manual_seed(0)
    model, clips = VideoTransformer(), Clips(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    start, average = time.perf_counter(), 0.0
    for i in range(num_steps):
        timestep = torch.randn(2, generator=clips.generator).sigmoid()
        noisy, velocity = clips.noisy(timestep)
        loss = F.mse_loss(model(noisy, timestep), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (i + 1) / 100) * max(0.05, 1 - i / num_steps)
        optimizer.step()
        average += (loss.item() - average) * max(0.01, 1 / (i + 1))
        if (i + 1) % 100 == 0:
            print(f"[{time.perf_counter() - start:5.0f} s] step {i + 1}, loss {average:.4f}", flush=True)
    return model.eval()


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Inputs of the model, two clips each, with times spread evenly from 0.05 to 0.95."""
    clips, made = Clips(seed), []
    for i in range(count):
        timestep = torch.full((2,), 0.05 + 0.9 * (i + 0.5) / count)
        made.append({"x": clips.noisy(timestep)[0], "timestep": timestep})
    return made


def measure(model: nn.Module, sparsity: float, test: list[dict[str, Tensor]], *, learned: bool) -> list[float]:
    """Error of each site's attention on test batches, with its learned state or without."""
    capture = Capture(model, CONFIG, "host")
    sizes = capture.measure(test[0])
    samples = capture.run(test, [size.key for size in sizes], keep_dense=True)
    errors = []
    for size in sizes:
        entry, parameters = Entry(round(sparsity * 1e6), "pooled", "row"), None
        if learned:
            state = owner_state(model.get_submodule(size.key.owner))
            call = state.settings.calls[0]
            entry = call.nearest(round(sparsity * 1e6))
            parameters = state.parameters_of(call, entry)
        errors.append(held_out_error(parameters, entry, samples[size.key], size.device))
    return errors


def output_error(model: nn.Module, sparsity: float, test: list[dict[str, Tensor]]) -> float:
    """Relative L2 error of the compiled model's output against the dense model's."""
    torch.compiler.reset()
    options: dict[str, Any] = {"sparsity": sparsity, "block_q": 32, "block_k": 16, "token_grid": GRID, "min_seq_len": 0}
    compiled = torch.compile(model, backend="sla2", options=options)
    difference = total = 0.0
    with torch.no_grad():
        for batch in test:
            dense = model(**batch)
            difference += (compiled(**batch) - dense).square().sum().item()
            total += dense.square().sum().item()
    return math.sqrt(difference / total)


def site_errors(report: CalibrationReport) -> list[dict[str, Any]]:
    """What the report's table shows, as plain values."""
    return [
        {
            "name": site.name,
            "sparsity": each.sparsity,
            "before": each.before,
            "after": each.after,
            "form": each.form,
            "errors": each.errors,
        }
        for site in report.sites
        for each in site.results
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=600, help="training of the model (default: 600)")
    parser.add_argument("--checkpoint", type=Path, help="keep the trained model here, and read it if it exists")
    parser.add_argument("--steps", type=int, default=300, help="calibration steps of each site (default: 300)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the router (default: 0.002)")
    parser.add_argument("--num-batches", type=int, default=48, help="batches for calibration (default: 48)")
    parser.add_argument("--budget", type=float, help="also spread kept blocks at this average sparsity")
    parser.add_argument("--save", action="store_true", help="write the figures to results/calibration_quality.json")
    args = parser.parse_args()
    if args.checkpoint and args.checkpoint.exists():
        model = VideoTransformer().eval()
        model.load_state_dict(torch.load(args.checkpoint, weights_only=True))
    else:
        model = train(args.train_steps)
        if args.checkpoint:
            torch.save(model.state_dict(), args.checkpoint)
    data, test = batches(args.num_batches, seed=2), batches(8, seed=3)
    settings: dict[str, Any] = {"config": CONFIG, "steps": args.steps, "lr": args.lr, "progress": False}
    plain = prepare(copy.deepcopy(model), **data[0], config=CONFIG)
    learned, paper = copy.deepcopy(model), copy.deepcopy(model)
    report = calibrate(learned, data, sparsity=SPARSITIES, **settings)
    print(report, flush=True)
    paper_report = calibrate(paper, data, sparsity=SPARSITIES, tails=("linear",), mixings=("block",), **settings)
    print(f"the paper's form alone: {paper_report.seconds:.0f} s")
    record: dict[str, Any] = {"held_out": report.totals(), "sites": site_errors(report), "test": []}
    print("\non test clips: relative L2 error of the attention output, by layer; of the model's output")
    for sparsity in SPARSITIES:
        for name, each, is_learned in (
            ("untrained", plain, False),
            ("calibrated", learned, True),
            ("paper", paper, True),
        ):
            errors = measure(each, sparsity, test, learned=is_learned)
            mean, output = sum(errors) / len(errors), output_error(each, sparsity, test)
            record["test"].append(
                {"sparsity": sparsity, "state": name, "errors": errors, "mean": mean, "output": output}
            )
            shown = " ".join(f"{error:.4f}" for error in errors)
            print(f"{100 * sparsity:.0f} %  {name:<10}  {shown}  mean {mean:.4f}  output {output:.4f}", flush=True)
    if args.budget is not None:
        spread = copy.deepcopy(model)
        spread_report = calibrate(spread, data, budget=args.budget, tails=("pooled",), mixings=("row",), **settings)
        print("\n".join(spread_report.notes()))
        assert spread_report.budget is not None
        record["budget"] = vars(spread_report.budget)
    if args.save:
        machine = describe_machine("benchmarks.calibration_quality", torch.device("cpu"))
        save_record(RESULTS / "calibration_quality.json", {"machine": machine, **record})


if __name__ == "__main__":
    main()
