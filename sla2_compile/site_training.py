"""Train router and mixing of one attention site: stage 1 of the paper, and the hard-mask error that decides."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sla2_compile.capture import Sample
from sla2_compile.config import SPARSITY_UNIT, SLA2Config
from sla2_compile.functional import config_arguments
from sla2_compile.kernels.reference import at_least_float32, interpolate_logit
from sla2_compile.kernels.soft_reference import (
    BlockedSample,
    Step,
    block_sample,
    hard_mask,
    router_scores,
    soft_attention,
    soft_mask,
    take_step,
)
from sla2_compile.learned_state import Entry, LearnedParameters

# The mixing has a handful of numbers and starts far from its optimum; the router has D^2 and starts at a good one.
ALPHA_LR_RATIO = 10.0

# The first and the last part of the steps train the mixing alone, with the hard mask that it will meet.
MIXING_STEPS_RATIO = 0.25
ROUTER_PHASE = 1


@dataclass(frozen=True)
class TrainingSettings:
    """How a site is trained; see `calibrate` for the meaning."""

    steps: int
    lr: float
    num_query_blocks: int
    tau: float


@dataclass
class Learner:
    """One sparsity and form of a site in training."""

    entry: Entry
    parameters: LearnedParameters
    mixing_only: LearnedParameters | None = None  # as it was before the router was trained
    losses: list[Tensor] = field(default_factory=list)

    def candidates(self) -> list[LearnedParameters]:
        """What the held-out batches choose from: with the trained router, and with the untrained one."""
        return [self.parameters] if self.mixing_only is None else [self.parameters, self.mixing_only]

    @property
    def curve(self) -> list[float]:
        """Squared error of every step, relative to the mean square of the dense output."""
        return torch.stack(self.losses).tolist() if self.losses else []


def new_learner(entry: Entry, sample: Sample, device: torch.device) -> Learner:
    """A learner at the neutral start."""
    heads, q_len, dim = sample.q.shape
    columns = -(-q_len // sample.config.block_q) if entry.mixing == "block" else 1
    return Learner(entry, LearnedParameters(heads, dim, columns, device=device))


def train_site(
    learners: Sequence[Learner],
    samples: Sequence[Sample],
    settings: TrainingSettings,
    generator: torch.Generator,
    device: torch.device,
    on_step: Callable[[], None],
) -> None:
    """Train all learners of a site on its samples, sharing what does not depend on them.

    The mixing comes first, with the untrained router's hard choice; then both, with the soft mask; then the mixing
    again, with the hard choice of the trained router.
    """
    blocked = [_to_blocks(sample, device) for sample in samples]
    usable = [sample for sample in blocked if len(sample.routed) > 0 and sample.num_choosable > 0]
    if not usable:
        return
    optimizer = _optimizer([learner.parameters for learner in learners], settings.lr)
    with_linear_tail = any(learner.entry.tail == "linear" for learner in learners)
    power = _mean_power(usable, generator)
    plan = _plan(usable, settings, generator, device)
    num_mixing_steps = int(settings.steps * MIXING_STEPS_RATIO)
    phases = (num_mixing_steps, settings.steps - 2 * num_mixing_steps, num_mixing_steps)
    for phase, num_steps in enumerate(phases):
        for i in range(num_steps):
            sample, rows = next(plan)
            step = take_step(sample, rows, with_linear_tail=with_linear_tail)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - i / num_steps)
            optimizer.zero_grad(set_to_none=True)
            for learner in learners:
                loss = _loss(step, learner, settings.tau, is_hard=phase != ROUTER_PHASE) / power
                loss.backward()
                _share_among_blocks(learner.parameters.alpha_logit)
                learner.losses.append(loss.detach())
            optimizer.step()
            on_step()
        if phase < ROUTER_PHASE:
            for learner in learners:
                learner.mixing_only = copy.deepcopy(learner.parameters)
    for learner in learners:
        for parameters in learner.candidates():
            parameters.proj_q.requires_grad_(False)
            parameters.proj_k.requires_grad_(False)
            parameters.zero_grad(set_to_none=True)


def held_out_error(
    parameters: LearnedParameters | None, entry: Entry, samples: Sequence[Sample], device: torch.device
) -> float:
    """Relative L2 error of the op itself against dense attention over all samples; None is the untrained router.

    Infinite where the output is not finite, so that what diverged in training never compares as the best.
    """
    difference = total = 0.0
    for stored in samples:
        sample = stored.to(device)
        assert sample.dense is not None
        out = run_op(parameters, entry, sample)
        difference += (out.double() - sample.dense.double()).square().sum().item()
        total += sample.dense.double().square().sum().item()
    if not math.isfinite(difference):
        return math.inf
    return (difference / total) ** 0.5 if total > 0 else 0.0


@torch.no_grad()
def run_op(parameters: LearnedParameters | None, entry: Entry, sample: Sample) -> Tensor:
    """`sla2::attention` on a sample, as the compiled model will call it: (H, N, D)."""
    config = entry_config(sample.config, entry)
    state: tuple[Tensor | None, ...] = (None, None, None, None)
    if parameters is not None:
        gain = parameters.alpha_gain if config.mixing == "row" else None
        state = (parameters.proj_q, parameters.proj_k, parameters.alpha_logit, gain)
    mask = None if sample.real is None else sample.real[None, None, None]
    inputs = (x[None] for x in (sample.q, sample.k, sample.v))
    settings = {"scale": sample.scale, "enable_gqa": sample.enable_gqa, **config_arguments(config)}
    out: Tensor = torch.ops.sla2.attention.default(*inputs, mask, *state, **settings)
    return out[0]


def entry_config(config: SLA2Config, entry: Entry) -> SLA2Config:
    """The site's config at the sparsity and in the form of an entry."""
    assert entry.sparsity_units is not None
    assert entry.tail is not None
    assert entry.mixing is not None
    sparsity = entry.sparsity_units / SPARSITY_UNIT
    return dataclasses.replace(config, sparsity=sparsity, tail=entry.tail, mixing=entry.mixing)


def _to_blocks(sample: Sample, device: torch.device) -> BlockedSample:
    sample = sample.to(device)
    q, k, v = sample.q, sample.k, sample.v
    if device.type == "cpu":
        # 16-bit matrix products are slow on most CPUs.
        q, k, v = (at_least_float32(x) for x in (q, k, v))
    return block_sample(q, k, v, sample.real, sample.scale, sample.config)


def _draw(upper: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(upper, generator=generator)[:count].tolist()


def _plan(
    samples: Sequence[BlockedSample], settings: TrainingSettings, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[BlockedSample, Tensor]]:
    """The sample and the query blocks of every step.

    Drawn ahead and copied at once: a copy in every step would make the host wait until the device has caught up.
    """
    chosen: list[BlockedSample] = []
    picked: list[list[int]] = []
    for _ in range(settings.steps):
        sample = samples[_draw(len(samples), 1, generator)[0]]
        chosen.append(sample)
        count = min(settings.num_query_blocks, len(sample.routed))
        picked.append([sample.routed[j] for j in _draw(len(sample.routed), count, generator)])
    rows = torch.tensor([row for each in picked for row in each], device=device).split([len(each) for each in picked])
    return zip(chosen, rows, strict=True)


def _optimizer(learned: Sequence[LearnedParameters], lr: float) -> torch.optim.Optimizer:
    """One for all: a step of it is few launches."""
    router = [x for each in learned for x in (each.proj_q, each.proj_k)]
    mixing = [x for each in learned for x in (each.alpha_logit, each.alpha_gain)]
    for parameter in router:
        parameter.requires_grad_()
    groups = [(router, lr), (mixing, lr * ALPHA_LR_RATIO)]
    options = [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in groups]
    return torch.optim.Adam(options, fused=router[0].is_cuda)


def _share_among_blocks(logit: Tensor) -> None:
    """Let what a step's few query blocks say about their head move the logits of all its blocks."""
    if logit.shape[1] > 1 and logit.grad is not None:
        logit.grad += logit.grad.sum(1, keepdim=True)


def _loss(step: Step, learner: Learner, tau: float, *, is_hard: bool) -> Tensor:
    """Mean squared error of the step's real rows."""
    entry, parameters, sample = learner.entry, learner.parameters, step.sample
    assert entry.sparsity_units is not None
    assert entry.tail is not None
    assert entry.mixing is not None
    wide = step.dense.dtype
    with torch.set_grad_enabled(not is_hard):
        scores = router_scores(step, parameters.proj_q.to(wide), parameters.proj_k.to(wide))
        if is_hard:
            mask = hard_mask(sample, scores, entry.sparsity_units)
        else:
            mask = soft_mask(sample, scores, entry.sparsity_units, tau)
    logit = interpolate_logit(parameters.alpha_logit.to(wide), sample.q.shape[1])[:, step.rows]
    gain = parameters.alpha_gain.to(wide) if entry.mixing == "row" else None
    out = soft_attention(step, mask, logit, gain, tail=entry.tail, mixing=entry.mixing)
    return _mean_square(out - step.dense, step)


def _mean_square(x: Tensor, step: Step) -> Tensor:
    """Mean of x (H, R, block_q, D) squared over the real rows."""
    real = step.sample.real_rows[step.rows]
    return (x * real[None, :, :, None]).square().sum() / (real.sum() * x.shape[0] * x.shape[3])


def _mean_power(samples: Sequence[BlockedSample], generator: torch.Generator) -> Tensor:
    """Mean square of the dense output, from one query block of each sample.

    One number for the site: dividing each step by its own would weigh samples otherwise than the held-out error does.
    """
    powers = []
    for sample in samples:
        row = sample.routed[_draw(len(sample.routed), 1, generator)[0]]
        step = take_step(sample, torch.tensor([row], device=sample.q.device), with_linear_tail=False)
        powers.append(_mean_square(step.dense, step))
    return torch.stack(powers).mean().clamp(min=1e-30)
