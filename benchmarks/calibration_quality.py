"""What calibration is worth on attention with structure: a small video transformer, trained here, then calibrated.

Trains the flow-matching transformer of `examples/video_dit` on clips made on the fly (a moving, zooming window over
three photographs, with a disc and a digit that move), calibrates it, and measures on clips that neither training nor
calibration saw: the error of every site's attention and of the model's output, untrained default against calibrated
state, with the paper's form (linear tail, block mixing) calibrated beside it.

    python -m benchmarks.calibration_quality --budget 0.95            print the tables (half an hour on a CPU)
    python -m benchmarks.calibration_quality --budget 0.95 --save     also write results/calibration_quality.json
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import RESULTS, describe_machine, save_record
from examples.video_dit.clips import ClipMaker, Split
from examples.video_dit.flow import noise_like, noisy, training_batch
from examples.video_dit.model import ModelConfig, VideoDiT
from examples.video_dit.photographs import NUM_WITHOUT_SKIMAGE, gather
from sla2_compile.calibrate import calibrate
from sla2_compile.calibration_report import CalibrationReport
from sla2_compile.capture import Capture
from sla2_compile.config import SLA2Config
from sla2_compile.learned_state import Entry
from sla2_compile.prepare import owner_state, prepare
from sla2_compile.site_training import held_out_error

CLIP = (8, 64, 64)
MODEL = ModelConfig(CLIP, patch=(2, 4, 4), width=128, num_heads=4, num_layers=4, num_labels=NUM_WITHOUT_SKIMAGE)
GRID = MODEL.grid

# Blocks are smaller than the default, because so is the sequence: 64 key blocks of 16 tokens.
CONFIG = SLA2Config(block_q=32, block_k=16, token_grid=GRID, min_seq_len=0)
SPARSITIES = (0.95, 0.97)

# Seeds of the clips, far apart.
TRAINING, CALIBRATION, TEST = 0, 1_000_000, 2_000_000


def train(maker: ClipMaker, num_steps: int) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    start, average = time.perf_counter(), 0.0
    for i in range(num_steps):
        clips = maker.make(TRAINING + i, 2)
        x, t, velocity = training_batch(clips, TRAINING + i)
        loss = F.mse_loss(model(x, t, clips.label), velocity)
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


def batches(maker: ClipMaker, count: int, seed: int, split: Split = "train") -> list[dict[str, Tensor]]:
    """Inputs of the model, two clips each, with times spread evenly from 0.05 to 0.95."""
    made = []
    for i in range(count):
        t = torch.full((2,), 0.05 + 0.9 * (i + 0.5) / count)
        clips = maker.make(seed + i, 2, split)
        made.append({"x": noisy(clips.video, noise_like(clips.video, seed + i), t), "t": t, "label": clips.label})
    return made


def measure(model: nn.Module, sparsity: float, test: list[dict[str, Tensor]], *, learned: bool) -> list[float]:
    """Error of each site's attention on test batches, with its learned state or without."""
    capture = Capture(model, CONFIG, "host")
    sizes = capture.measure([], test[:1])
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
    parser.add_argument("--train-steps", type=int, default=2400, help="training of the model (default: 2400)")
    parser.add_argument("--checkpoint", type=Path, help="keep the trained model here, and read it if it exists")
    parser.add_argument("--steps", type=int, default=300, help="calibration steps of each site (default: 300)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the router (default: 0.002)")
    parser.add_argument("--num-batches", type=int, default=48, help="batches for calibration (default: 48)")
    parser.add_argument("--budget", type=float, help="also spread kept blocks at this average sparsity")
    parser.add_argument("--save", action="store_true", help="write the figures to results/calibration_quality.json")
    args = parser.parse_args()
    maker = ClipMaker(gather(NUM_WITHOUT_SKIMAGE), CLIP)
    if args.checkpoint and args.checkpoint.exists():
        model = VideoDiT(MODEL).eval()
        model.load_state_dict(torch.load(args.checkpoint, weights_only=True))
    else:
        model = train(maker, args.train_steps)
        if args.checkpoint:
            torch.save(model.state_dict(), args.checkpoint)
    data, test = batches(maker, args.num_batches, CALIBRATION), batches(maker, 8, TEST, "held_out")
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
