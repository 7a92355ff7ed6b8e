"""The training loop that the teacher's stages and all rows share: steps that depend on their seeds alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.video_dit.clips import ClipMaker
from examples.video_dit.flow import training_batch
from examples.video_dit.model import VideoDiT
from examples.video_dit.serve import autocast

# As in stage 1: the mixing is a handful of numbers, and further from its optimum than the weights.
ALPHA_LR_RATIO = 10.0
EMA_DECAY = 0.998
REPORT_EVERY = 20


class OutOfTimeError(Exception):
    """The time given to a call is spent; what was begun goes on in the next one."""


@dataclass
class Trained:
    """What training left beside the weights."""

    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss since the one before)
    seconds_per_step: float = 0.0
    averaged: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Args:
        steps: how many.
        batch: clips of each.
        lr: learning rate of a step.
        seed: of the clips and noise; step i uses seed + i.
        shift: of the times; see `flow.later`.
        checkpoint: where an interrupted training waits; it holds everything and may be large.
        deadline: when to stop, on time.monotonic's clock.
        uses_muon: the blocks' matrices learn by Muon, from fewer steps than by AdamW; for training from nothing.
        stop_after: stop when this many steps are done, as a deadline does; for tests.
    """

    steps: int
    batch: int
    lr: Callable[[int], float]
    seed: int
    shift: float
    checkpoint: Path
    deadline: float
    uses_muon: bool = False
    stop_after: int | None = None


def train(model: VideoDiT, maker: ClipMaker, plan: Plan) -> Trained:
    """Train a model in place, going on from the plan's checkpoint if there is one.

    Raises:
        OutOfTimeError: at the deadline, with a checkpoint.
    """
    device = model.cos.device
    optimizers = _optimizers(model, plan.uses_muon)
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    result, first, total, timed = Trained(averaged=averaged), 0, 0.0, []
    if plan.checkpoint.exists():
        saved = torch.load(plan.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, x in saved["averaged"].items():
            averaged[name].copy_(x)
        first, total, result.losses = saved["step"], saved["total"], saved["losses"]
    running = torch.full((), total, device=device)
    start = time.monotonic()
    for step in range(first, plan.steps):
        if time.monotonic() > plan.deadline or step == plan.stop_after:
            saved = {"model": model.state_dict(), "averaged": averaged}
            saved |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            saved |= {"step": step, "total": running.item(), "losses": result.losses}
            torch.save(saved, plan.checkpoint)
            raise OutOfTimeError
        clips = maker.make(plan.seed + step, plan.batch)
        x, t, target = training_batch(clips, plan.seed + step, plan.shift)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = plan.lr(step) * group["ratio"]
        with autocast(device):
            loss = F.mse_loss(model(x, t, clips.label).float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            weights = [p.detach() for p in model.parameters()]
            torch._foreach_lerp_(list(averaged.values()), weights, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        running += loss.detach()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == plan.steps:
            now = running.item() / ((step % REPORT_EVERY) + 1)
            result.losses.append((step, now))
            running.zero_()
            timed.append((time.monotonic() - start, step + 1))
            print(f"  step {step + 1} of {plan.steps}: loss {now:.4f}, {timed[-1][0]:.0f} s", flush=True)
    # The first report has the compilation in it.
    if len(timed) > 1:
        result.seconds_per_step = (timed[-1][0] - timed[0][0]) / (timed[-1][1] - timed[0][1])
    with suppress(FileNotFoundError):
        plan.checkpoint.unlink()
    return result


def _optimizers(model: VideoDiT, uses_muon: bool) -> list[torch.optim.Optimizer]:
    linears = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)] if uses_muon else []
    matrices = [layer.weight for layer in linears]
    fused = model.cos.device.type == "cuda"
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(_groups(model, matrices), betas=(0.9, 0.95), fused=fused)
    ]
    if matrices:
        group = {"params": matrices, "ratio": 1.0}
        # Its steps are as large as AdamW's, so the same learning rate serves both.
        optimizers.append(torch.optim.Muon([group], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _groups(model: nn.Module, apart: list[Tensor]) -> list[dict[str, Any]]:
    """Parameters that train, but for those `apart`, in groups for AdamW."""
    others = {id(parameter) for parameter in apart}

    def named(mixing: bool) -> Iterator[nn.Parameter]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (".sla2." in name) == mixing and id(parameter) not in others:
                yield parameter

    groups = [{"params": list(named(False)), "ratio": 1.0, "weight_decay": 0.01}]
    mixing = list(named(True))
    return [*groups, {"params": mixing, "ratio": ALPHA_LR_RATIO, "weight_decay": 0.0}] if mixing else groups
