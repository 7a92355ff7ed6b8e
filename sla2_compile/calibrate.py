"""`calibrate`: stage 1 of SLA2, learning router and mixing of every attention site on the model's own q, k, v."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import nn

from sla2_compile.calibration_report import UNTRAINED, BudgetResult, CalibrationReport, SiteResult, SparsityResult
from sla2_compile.capture import Capture, Sample, SiteKey, SiteSize, Store, group_sites, split_batch
from sla2_compile.config import SPARSITY_UNIT, Mixing, SLA2Config, Tail
from sla2_compile.kernels.blocks import delivered_sparsity, num_blocks
from sla2_compile.learned_state import CallSettings, Entry, LearnedParameters, calibration_context
from sla2_compile.prepare import owner_state, prepare, prepared_owners
from sla2_compile.site_training import (
    Learner,
    TrainingSettings,
    entry_config,
    held_out_error,
    new_learner,
    train_site,
)
from sla2_compile.sparsity_budget import Choice, spread_budget

# What a site can be given besides the budget itself, where the caller names no sparsities: multiples of the kept ratio.
_BUDGET_SPREAD = (0.5, 0.75, 1.0, 1.5, 2.0)


# Where the caller is in inference mode, the new parameters are to be trained all the same.
@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: float | Sequence[float] | None = None,
    budget: float | None = None,
    config: SLA2Config | None = None,
    tails: Sequence[Tail] = get_args(Tail),
    mixings: Sequence[Mixing] = get_args(Mixing),
    steps: int = 300,
    lr: float = 2e-3,
    num_query_blocks: int = 4,
    tau: float = 0.1,
    held_out_ratio: float = 0.25,
    memory_gib: float = 8.0,
    store: Store = "host",
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Learn router and mixing of every attention site from the model's own batches; the model's weights do not change.

    Each site is trained to give the dense attention's output, with a soft mask in place of the hard choice of blocks,
    for every sparsity and form (tail and mixing) asked for. The form with the least error on held-out batches, with the
    hard mask that the compiled op uses, is kept; where none beats the untrained default (pooled tail, row mixing), that
    stays, if its form is among those asked for.

    Args:
        model: prepared, or prepared here with the first batch.
        batches: at least two inputs of the model, each `(args, kwargs)`, a tuple, a dict or one tensor; for a diffusion
            model spread over the timesteps. About a quarter is held out. They are kept in memory.
        sparsity: one or several; compiled models use the first where their options name none. None is 0.95, or what
            suits the budget.
        budget: average sparsity at which kept blocks are spread over the sites so that the summed held-out error is
            least. Compiled models use each site's own sparsity where their options name none.
        config: settings, as the backend's options; sparsity, tail and mixing come from the other arguments.
        tails, mixings: the forms to compare: every pair of them.
        steps: training steps of each site, the first and the last quarter for the mixing alone.
        lr: learning rate of the router; that of the mixing is ten times as high. Both fall linearly.
        num_query_blocks: query blocks of a step. A step costs about this share of the dense attention's backward.
        tau: temperature of the soft mask.
        held_out_ratio: share of the batches that only measure.
        memory_gib: bound of the captured samples; the model runs all batches once for each group of sites that fits.
        store: where samples wait: "host" memory or on the "device".
        seed: of the sampling; the same seed gives the same state.
        progress: show progress bars.

    Returns:
        What was learned: `print(report)`, `report.to_dict()`, `report.to_html()`. After Ctrl-C the sites that were
        finished keep their state and the report has only these.

    Raises:
        ValueError: arguments out of range, or samples of one site that do not fit the memory.
        TypeError: a model, batches or config of another kind.

    Source: arXiv 2602.12675, algorithm 1, stage 1.
    """
    start = time.perf_counter()
    root = getattr(model, "_orig_mod", model)
    config = SLA2Config() if config is None else config
    levels = _levels(sparsity, budget)
    forms = _forms(tails, mixings)
    inputs = _inputs(root, batches, config)
    _check(steps, num_query_blocks, lr, tau, held_out_ratio, memory_gib, store)
    if not any(True for _ in prepared_owners(root)):
        args, kwargs = split_batch(inputs[0])
        prepare(root, *args, config=config, **kwargs)
    held_out, training = _split(inputs, held_out_ratio)
    settings = TrainingSettings(steps=steps, lr=lr, num_query_blocks=num_query_blocks, tau=tau)
    capture = Capture(root, config, store)
    sizes = capture.measure(training, held_out)
    if not sizes:
        raise ValueError(
            "batches: expected them to reach a prepared attention site, got none that do; "
            "use the config that the model was prepared with"
        )
    groups = group_sites(sizes, memory_gib)
    report = CalibrationReport(skipped=sorted(key.name for key in capture.known - {size.key for size in sizes}))
    try:
        with _bar(progress, len(sizes), "sites") as sites_bar, torch.enable_grad():
            for group in groups:
                keys = [size.key for size in group]
                train_samples = capture.run(training, keys, keep_dense=False)
                test_samples = capture.run(held_out, keys, keep_dense=True)
                for size in group:
                    train, test = train_samples.pop(size.key), test_samples.pop(size.key)
                    if train and test:
                        trained = _calibrate_site(size, train, test, levels, forms, settings, seed, progress)
                        report.sites.append(_keep(root, size, trained, levels))
                    else:
                        report.skipped.append(size.key.name)
                    sites_bar.update()
    except KeyboardInterrupt:
        report.interrupted = True
        done = {site.name for site in report.sites} | set(report.skipped)
        report.skipped += [size.key.name for size in sizes if size.key.name not in done]
    if budget is not None and report.sites:
        report.budget = _spread(root, report, sizes, budget)
    report.seconds = time.perf_counter() - start
    return report


def _levels(sparsity: float | Sequence[float] | None, budget: float | None) -> list[int]:
    """The sparsities in millionths, the default one first."""
    values: list[float]
    if sparsity is not None:
        values = [sparsity] if isinstance(sparsity, (int, float)) else list(sparsity)
    elif budget is not None:
        values = [1 - (1 - budget) * share for share in _BUDGET_SPREAD]
    else:
        values = [0.95]
    for name, each in [("sparsity", values), ("budget", [] if budget is None else [budget])]:
        if not all(isinstance(x, (int, float)) and 0 < x < 1 for x in each) or (name == "sparsity" and not each):
            raise ValueError(f"{name}: expected a fraction in (0, 1), got {each}; 0.95 skips 95 % of the key blocks")
    if budget is not None and budget not in values:
        # The same sparsity everywhere is what the spread is held against.
        values = [*values, budget]
    return list(dict.fromkeys(round(value * SPARSITY_UNIT) for value in values))


def _forms(tails: Sequence[Tail], mixings: Sequence[Mixing]) -> list[tuple[Tail, Mixing]]:
    for name, values, known in (("tails", tails, get_args(Tail)), ("mixings", mixings, get_args(Mixing))):
        if isinstance(values, str) or not values or not set(values) <= set(known):
            raise ValueError(f"{name}: expected some of {', '.join(map(repr, known))} in a tuple, got {values!r}")
    return [(tail, mixing) for tail in tails for mixing in mixings]


def _inputs(model: Any, batches: Any, config: Any) -> list[Any]:
    """The batches as a list, and what cannot be calibrated refused."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; state is attached to modules")
    if not isinstance(config, SLA2Config):
        raise TypeError(f"config: expected an SLA2Config or None, got {type(config).__name__}; see SLA2Config")
    if not isinstance(batches, Iterable) or isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError(
            f"batches: expected a list of the model's inputs, got {type(batches).__name__}; [batch, ...] makes one"
        )
    inputs = list(batches)
    if len(inputs) < 2:
        raise ValueError(
            f"batches: expected at least two, one to learn from and one to measure on, got {len(inputs)}; "
            "ten, spread over the timesteps, are a good start"
        )
    return inputs


def _check(
    steps: Any, num_query_blocks: Any, lr: Any, tau: Any, held_out_ratio: Any, memory_gib: Any, store: Any
) -> None:
    for name, count, default in (("steps", steps, 300), ("num_query_blocks", num_query_blocks, 4)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}; the default is {default}")
    for name, value, usual in (("lr", lr, 2e-3), ("tau", tau, 0.1), ("memory_gib", memory_gib, 8.0)):
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}; the default is {usual}")
    if not isinstance(held_out_ratio, (int, float)) or not 0 < held_out_ratio < 1:
        raise ValueError(f"held_out_ratio: expected a fraction in (0, 1), got {held_out_ratio!r}; the default is 0.25")
    if store not in get_args(Store):
        raise ValueError(f"store: expected 'host' or 'device', got {store!r}; the samples wait there for their turn")


def _split(inputs: list[Any], held_out_ratio: float) -> tuple[list[Any], list[Any]]:
    """Held-out and training batches; the held-out ones evenly spaced, as batches may come in order of timesteps."""
    count = min(len(inputs) - 1, max(1, round(held_out_ratio * len(inputs))))
    chosen = {(2 * j + 1) * len(inputs) // (2 * count) for j in range(count)}
    return [inputs[i] for i in sorted(chosen)], [x for i, x in enumerate(inputs) if i not in chosen]


def _bar(progress: bool, total: int, unit: str, **kwargs: Any) -> AbstractContextManager[Any]:
    if not progress:
        return nullcontext(SimpleNamespace(update=lambda: None))
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("calibrate: expected tqdm for its progress; pip install 'sla2-compile[calibrate]'") from error
    return tqdm(total=total, unit=unit, desc="calibrate", **kwargs)


def _calibrate_site(
    size: SiteSize,
    train: list[Sample],
    test: list[Sample],
    levels: list[int],
    forms: list[tuple[Tail, Mixing]],
    settings: TrainingSettings,
    seed: int,
    progress: bool,
) -> tuple[SiteResult, list[Learner]]:
    """Train every sparsity and form of a site; its result, and the best learner of each sparsity."""
    generator = torch.Generator().manual_seed(_site_seed(seed, size.key))
    entries = [Entry(units, tail, mixing) for units in levels for tail, mixing in forms]
    learners = [new_learner(entry, train[0], size.device) for entry in entries]
    with _bar(progress, settings.steps, "steps", leave=False) as bar:
        train_site(learners, train, settings, generator, size.device, bar.update)
    # Once, and not for every form that is measured.
    test = [sample.to(size.device) for sample in test]
    results, best = [], []
    for units in levels:
        start = Entry(units, "pooled", "row")
        before = held_out_error(None, start, test, size.device)
        candidates = [learner for learner in learners if learner.entry.sparsity_units == units]
        errors = [_keep_best(each, test, size.device) for each in candidates]
        after = min(errors)
        improved = after < before
        # Whoever asks for other forms gets one of them, unless none gives numbers.
        stays = not improved and ((start.tail, start.mixing) in forms or math.isinf(after))
        chosen = new_learner(start, train[0], size.device) if stays else candidates[errors.index(after)]
        best.append(chosen)
        results.append(
            SparsityResult(
                sparsity=units / SPARSITY_UNIT,
                delivered=delivered_sparsity(size.q_shape[2], size.kv_len, entry_config(size.config, start)),
                before=before,
                after=before if stays else after,
                form=UNTRAINED if stays else _form_name(chosen.entry),
                improved=improved,
                errors={_form_name(each.entry): error for each, error in zip(candidates, errors, strict=True)},
                curves={_form_name(each.entry): each.curve for each in candidates},
            )
        )
    result = SiteResult(size.key.name, size.q_shape, size.kv_len, len(train), len(test), results)
    return result, best


def _keep_best(learner: Learner, test: list[Sample], device: torch.device) -> float:
    """Leave a learner with the better of its candidates: its held-out error."""
    errors = [held_out_error(parameters, learner.entry, test, device) for parameters in learner.candidates()]
    best = min(range(len(errors)), key=errors.__getitem__)
    learner.parameters = learner.candidates()[best]
    return errors[best]


def _form_name(entry: Entry) -> str:
    return f"{entry.tail}, {entry.mixing}"


def _site_seed(seed: int, key: SiteKey) -> int:
    """A seed that does not depend on which sites share a group."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key.owner} {key.ordinal}".encode()).digest()[:6], "little")


def _keep(root: nn.Module, size: SiteSize, trained: tuple[SiteResult, list[Learner]], levels: list[int]) -> SiteResult:
    """Write what was learned at a site into its state."""
    result, learners = trained
    state = owner_state(root.get_submodule(size.key.owner))
    (old,) = (call for call in state.settings.calls if call.ordinal == size.key.ordinal)
    call = CallSettings(
        old.ordinal,
        old.num_heads,
        old.head_dim,
        entries=tuple(learner.entry for learner in learners),
        default_units=levels[0],
        context=calibration_context(size.config),
    )
    parameters: list[LearnedParameters] = [learner.parameters for learner in learners]
    state.replace_call(call, parameters)
    return result


def _spread(root: nn.Module, report: CalibrationReport, sizes: list[SiteSize], budget: float) -> BudgetResult:
    """Choose each site's sparsity and make it the default of its state."""
    by_name = {size.key.name: size for size in sizes}
    sites = [by_name[site.name] for site in report.sites]
    choices: list[list[Choice]] = []
    uniform: list[Choice] = []
    total_pairs = 0
    for size, site in zip(sites, report.sites, strict=True):
        batch, heads, q_len, _ = size.q_shape
        pairs = batch * heads * num_blocks(q_len, size.config.block_q) * num_blocks(size.kv_len, size.config.block_k)
        total_pairs += pairs
        options = [
            Choice(round(each.sparsity * SPARSITY_UNIT), round(pairs * (1 - each.delivered)), each.after)
            for each in site.results
        ]
        choices.append(options)
        uniform += [option for option in options if option.units == round(budget * SPARSITY_UNIT)]
    max_pairs = sum(choice.num_pairs for choice in uniform)
    best = spread_budget(choices, max_pairs)
    if best is None or sum(c.error for c in best) > sum(c.error for c in uniform):
        best = uniform
    for size, choice in zip(sites, best, strict=True):
        _set_default(root, size.key, choice.units)
    return BudgetResult(
        sparsity=budget,
        delivered=1 - sum(choice.num_pairs for choice in best) / max(1, total_pairs),
        uniform_error=sum(choice.error for choice in uniform),
        spread_error=sum(choice.error for choice in best),
        per_site={size.key.name: choice.units / SPARSITY_UNIT for size, choice in zip(sites, best, strict=True)},
    )


def _set_default(root: nn.Module, key: SiteKey, units: int) -> None:
    state = owner_state(root.get_submodule(key.owner))
    state.set_default(key.ordinal, units)
