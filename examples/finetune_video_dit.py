"""Stage 2 of SLA2 in plain PyTorch: fine-tune a video diffusion transformer with sparse, low-bit attention.

A dense teacher is trained for a while, or read from the output folder; stage 1 learns router and mixing on it
(`calibrate`); then all weights train with the hard router frozen, at a sparsity that rises in steps, the forward
rounded to INT8 and FP8; at the end the attention is converted to low-bit kernels and the model is written to a file.
The clips are made on the fly (examples/video_dit). It needs `pip install '.[demo,quant]'` and, small as it is by
default, a few minutes on a CPU:

    python examples/finetune_video_dit.py
    torchrun --nproc-per-node 2 examples/finetune_video_dit.py      # the same, sharded by FSDP2

Started again with the same arguments it goes on from its last checkpoint, to the same bits on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Started by its path, a script sees its own folder alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.quantization import quantize_
from tqdm.auto import tqdm

from examples.video_dit.clips import ClipMaker, Clips
from examples.video_dit.compiling import COMPILERS, compile_blocks
from examples.video_dit.flow import held_out_loss, noisy, training_batch
from examples.video_dit.model import ModelConfig, VideoDiT
from examples.video_dit.photographs import NUM_WITHOUT_SKIMAGE, gather
from examples.video_dit.serve import autocast, prepare_model, save_model
from sla2_compile import SLA2Config, calibrate, load_state, save_state
from sla2_compile.quant import SLA2QATConfig, is_attention_site

# Blocks as small as the clips, so that there is something to choose from.
BLOCKS = {"block_q": 64, "block_k": 16}
# The mixing is a handful of numbers and far from its optimum; stage 1 trains it as much faster, too.
ALPHA_LR_RATIO = 10.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("finetune-output"), help="folder of all results")
    parser.add_argument("--steps", type=int, default=120, help="fine-tuning steps (default: 120; the paper's 500)")
    parser.add_argument("--batch", type=int, default=4, help="clips per step and process (default: 4)")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate of the weights (default: 3e-4)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="key blocks that skip exact attention, in the end")
    parser.add_argument("--ramp-start", type=float, default=0.7, help="sparsity of the first steps")
    parser.add_argument("--ramp-step", type=float, default=0.1, help="by which it rises")
    parser.add_argument("--ramp-every", type=int, default=30, help="steps between rises")
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="weight of the squared error to the teacher")
    parser.add_argument("--teacher-steps", type=int, default=150, help="training steps of the dense teacher")
    parser.add_argument("--calibration-steps", type=int, default=60, help="of every site; 0 leaves out stage 1")
    parser.add_argument("--qk-format", choices=("int8", "fp8", "none"), default="int8")
    parser.add_argument("--pv-format", choices=("fp8", "none"), default="fp8")
    parser.add_argument("--width", type=int, default=96, help="of the model, in heads of 32 (default: 96)")
    parser.add_argument("--layers", type=int, default=3, help="blocks of the model (default: 3)")
    parser.add_argument(
        "--clip", type=int, nargs=3, default=(8, 32, 48), metavar=("F", "H", "W"), help="pixels of a clip"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=30, help="steps between checkpoints (default: 30)")
    parser.add_argument("--evaluate-every", type=int, default=30, help="steps between held-out losses (default: 30)")
    parser.add_argument("--stop-after", type=int, help="stop, with a checkpoint, when this many steps are done")
    parser.add_argument("--compiler", choices=COMPILERS, default="inductor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def ramp(args: argparse.Namespace) -> list[float]:
    """The sparsities in the order in which they are trained, the last one wanted."""
    levels, level = [], args.ramp_start
    while level < args.sparsity - 1e-9:
        levels.append(round(level, 6))
        level += args.ramp_step
    return [*levels, args.sparsity]


def options_at(args: argparse.Namespace, model: VideoDiT, sparsity: float) -> dict[str, Any]:
    return {"sparsity": sparsity, "token_grid": model.config.grid, "min_seq_len": model.config.num_tokens, **BLOCKS}


# The dense teacher, and stage 1


def train_teacher(model: VideoDiT, maker: ClipMaker, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in tqdm(range(args.teacher_steps), desc="teacher", mininterval=1):
        clips = maker.make(1_000_000 + step, args.batch)
        x, t, target = training_batch(clips, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20)
        with autocast(args.device):
            loss = F.mse_loss(model(x, t, clips.label).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def learn_routing(model: VideoDiT, maker: ClipMaker, args: argparse.Namespace) -> None:
    """Attach router and mixing to the attention, calibrated for every level of the ramp."""
    options = options_at(args, model, args.sparsity)
    if args.calibration_steps == 0:
        prepare_model(model, options)
        return
    batches = []
    for i in range(12):
        clips = maker.make(2_000_000 + i, 1)
        t = torch.full((1,), (i + 0.5) / 12, device=clips.video.device)
        batches.append((noisy(clips.video, torch.randn_like(clips.video), t), t, clips.label))
    config = SLA2Config.from_options(options)
    with autocast(args.device):
        report = calibrate(model, batches, sparsity=ramp(args)[::-1], config=config, steps=args.calibration_steps)
    print(report)


# Stage 2


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The weights, and the mixing; the router's parameters need no gradient and are in neither."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    mixing = [p for name, p in named if ".sla2." in name]
    weights = [p for name, p in named if ".sla2." not in name]
    return [
        {"params": weights, "lr": lr, "peak_lr": lr, "weight_decay": 0.01},
        {"params": mixing, "lr": lr, "peak_lr": ALPHA_LR_RATIO * lr, "weight_decay": 0.0},
    ]


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


class Checkpoints:
    """Checkpoints of model and optimizer, of one process or of many; the last complete one counts."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main

    def last_step(self) -> int:
        """Steps that the last complete checkpoint has behind it; 0 without one."""
        return max((int(path.name) for path in self.folder.glob("*") if path.name.isdigit()), default=0)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        unfinished = self.folder / f"{step}.unfinished"
        weights, moments = get_state_dict(model, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)
        if self.is_main:
            # A name without a suffix is that of a whole checkpoint.
            old = [path for path in self.folder.iterdir() if path != unfinished]
            unfinished.rename(self.folder / str(step))
            for path in old:
                shutil.rmtree(path)
        barrier()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        weights, moments = get_state_dict(model, optimizer)
        content: dict[str, Any] = {"model": weights, "optimizer": moments}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(content, checkpoint_id=self.folder / str(step))
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])


class Log:
    """JSON lines, cut back to the step that training goes on from, and their curves."""

    def __init__(self, folder: Path, first_step: int, is_main: bool) -> None:
        self.path, self.is_main = folder / "log.jsonl", is_main
        kept = [line for line in self.lines() if line["step"] < first_step]
        if is_main:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def write(self, **values: Any) -> None:
        if self.is_main:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def draw(self) -> None:
        from matplotlib.figure import Figure

        lines = self.lines()
        figure = Figure(figsize=(7, 6), dpi=110, layout="constrained")
        losses, sparsities = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        for name, style in (("loss", "-"), ("teacher_error", "-"), ("held_out", "o-")):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                losses.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), markersize=4)
        losses.set(ylabel="mean squared error", yscale="log")
        losses.legend()
        sparsities.step([line["step"] for line in lines], [line["sparsity"] for line in lines], where="post")
        sparsities.set(xlabel="step", ylabel="sparsity")
        figure.savefig(self.path.with_name("curves.png"))


def fine_tune(
    model: VideoDiT, teacher: VideoDiT, maker: ClipMaker, held_out: list[Clips], args: argparse.Namespace
) -> bool:
    """Train; whether all steps are done."""
    rank, num_ranks = ranks()
    levels = ramp(args)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr), betas=(0.9, 0.95))
    checkpoints = Checkpoints(args.output / "checkpoints", rank == 0)
    first = checkpoints.last_step()
    if first:
        checkpoints.load(model, optimizer, first)
    log = Log(args.output, first, rank == 0)
    last = min(args.steps, args.steps if args.stop_after is None else args.stop_after)
    compiled_level = None
    bar = tqdm(desc="fine-tune", initial=first, total=args.steps, disable=rank > 0, mininterval=1)
    for step in range(first, last):
        start = time.perf_counter()
        level = levels[min(step // args.ramp_every, len(levels) - 1)]
        if level != compiled_level:
            compile_blocks(model, options_at(args, model, level), args.compiler)
            compiled_level = level
        # Every process its own clips; their seeds depend on the step alone, so that resuming needs no random state.
        seed = (args.seed * 1_000_003 + step) * num_ranks + rank
        clips = maker.make(seed, args.batch)
        x, t, target = training_batch(clips, seed)
        warm_up, decay = min(1, (step + 1) / 10), 1 - step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * warm_up * decay
        with autocast(args.device):
            velocity = model(x, t, clips.label).float()
            loss = F.mse_loss(velocity, target)
            teacher_error = torch.zeros_like(loss)
            if args.teacher_weight:
                with torch.no_grad():
                    wanted = teacher(x, t, clips.label).float()
                teacher_error = F.mse_loss(velocity, wanted)
        (loss + args.teacher_weight * teacher_error).backward()
        for parameter in optimizer_parameters(optimizer):
            # The mixing of other levels takes no part; with state for it from the start, checkpoints are all alike.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        evaluated = None
        if done % args.evaluate_every == 0 or done == args.steps:
            with autocast(args.device):
                evaluated = held_out_loss(model, held_out)
        log.write(
            step=step,
            loss=loss.item(),
            teacher_error=teacher_error.item() if args.teacher_weight else None,
            held_out=evaluated,
            sparsity=level,
            seconds=round(time.perf_counter() - start, 3),
        )
        if done % args.checkpoint_every == 0 or done == last:
            checkpoints.save(model, optimizer, done)
        bar.update()
    bar.close()
    if rank == 0:
        log.draw()
    return last == args.steps


# Processes


def ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started know each other."""
    if "RANK" not in os.environ:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: VideoDiT, device: str) -> None:
    """Split parameters, gradients and optimizer state over the processes."""
    _, num_ranks = ranks()
    if num_ranks == 1:
        return
    mesh = init_device_mesh(device, (num_ranks,))
    # No mixed-precision policy: that would round the router to 16 bits. Autocast does not touch it.
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build(args: argparse.Namespace, num_labels: int) -> VideoDiT:
    torch.manual_seed(args.seed)
    clip = (args.clip[0], args.clip[1], args.clip[2])
    config = ModelConfig(clip, (2, 4, 4), args.width, args.width // 32, args.layers, num_labels)
    return VideoDiT(config).to(args.device)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    # A step that Dynamo would silently run uncompiled, that is dense, is an error.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    with processes(args.device):
        run(args)


def run(args: argparse.Namespace) -> None:
    is_main = ranks()[0] == 0
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "checkpoints").mkdir(exist_ok=True)
    maker = ClipMaker(gather(NUM_WITHOUT_SKIMAGE), tuple(args.clip), args.device)
    held_out = [maker.make(i, 4, "held_out") for i in range(4)]
    teacher = build(args, maker.num_labels)
    weights, routing = args.output / "teacher.pt", args.output / "routing.safetensors"
    if is_main and not weights.exists():
        train_teacher(teacher, maker, args)
        torch.save(teacher.state_dict(), weights)
    barrier()
    teacher.load_state_dict(torch.load(weights, weights_only=True))
    teacher.requires_grad_(False).eval()
    if is_main and not routing.exists():
        student = copy.deepcopy(teacher)
        learn_routing(student, maker, args)
        save_state(student, routing)
    barrier()

    model = build(args, maker.num_labels)
    model.load_state_dict(teacher.state_dict())
    load_state(model, routing)
    formats = {"qk_format": args.qk_format, "pv_format": args.pv_format}
    formats = {name: None if value == "none" else value for name, value in formats.items()}
    quantize_(model, SLA2QATConfig(**formats, step="prepare"), filter_fn=is_attention_site)
    shard(model, args.device)
    if not fine_tune(model, teacher, maker, held_out, args):
        return

    options = options_at(args, model, args.sparsity)
    quantize_(model, SLA2QATConfig(**formats, step="convert"), filter_fn=is_attention_site)
    compile_blocks(model, options, args.compiler)
    with autocast(args.device):
        dense, converted = held_out_loss(teacher, held_out), held_out_loss(model, held_out)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=gathered)
    if is_main:
        save_model(model, options, args.output / "model.pt", whole)
        print(
            f"held-out loss: {dense:.4f} dense teacher before fine-tuning, {converted:.4f} fine-tuned at "
            f"{100 * args.sparsity:g} % sparsity, {args.qk_format} and {args.pv_format}\n"
            f"{args.output}: model.pt, log.jsonl, curves.png; make clips with it:\n"
            f"python -m examples.video_dit.serve {args.output / 'model.pt'} --output frames.png"
        )


if __name__ == "__main__":
    main()
