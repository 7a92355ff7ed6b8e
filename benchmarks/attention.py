"""The whole SLA2 op on a GPU against PyTorch's dense attention and FlexAttention, in one run on one machine.

    python -m benchmarks.attention                       about five minutes
    python -m benchmarks.attention --preset full         under ten minutes
    python -m benchmarks.attention --sections sweeps     one part of it

Everything is called on strided views of (B, N, H, D) storage, as models hand it over. Prints tables and writes
attention.json and attention.png. A case that raises, or for which no time is left, stays in the tables as "not run"
with its reason. README.md in this folder says what each column means.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention_cases as cases
from benchmarks.attention_report import failed_checks, plot, print_report
from benchmarks.floors import Ceilings, Work, attention_backward_work, attention_forward_work, dense_work
from benchmarks.floors import measure_ceilings as ceilings_of
from benchmarks.machine import RESULTS, describe_machine, save_record
from benchmarks.rivals import CUDNN, FLASH, FLEX, dense_attention, flex_attentions
from benchmarks.stages import BACKWARD, FORWARD, group
from benchmarks.timing import (
    Function,
    InputSets,
    measure,
    measure_kernels,
    measure_peak_extra_bytes,
    measure_replay,
    num_input_sets,
    short_error,
)
from sla2_compile import SLA2Config, attention
from sla2_compile.functional import config_arguments
from sla2_compile.kernels import blocked
from sla2_compile.kernels.settings import Settings

SECTIONS = ("shapes", "training", "agreement", "sweeps")
AGREEMENT_SHAPE = (1, 2, 4088, 128)
TINY_AGREEMENT_SHAPE = (1, 2, 504, 32)


class Run:
    """One run of the benchmark: where it runs, what it may spend, and the rows measured so far."""

    def __init__(self, device: torch.device, preset: cases.Preset, ceilings: Ceilings, path: Path) -> None:
        self.device, self.preset, self.ceilings, self.path = device, preset, ceilings, path
        self.start = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {}

    def case(self, measure_case: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """Measure one case into a row, or put the reason why not; the record is saved either way."""
        row = dict(labels)
        spent = time.perf_counter() - self.start
        if spent > self.preset.limit_s:
            row["not_run"] = f"the run's time was spent ({self.preset.limit_s:g} s)"
        else:
            try:
                row |= measure_case()
            except Exception as error:  # one variant must not take the others along
                row["not_run"] = short_error(error)
        self.rows.append(row)
        label = ", ".join(str(value) for value in labels.values())
        what = f"{row['ms']:.3f} ms" if "ms" in row else row.get("not_run", "done")
        print(f"[{time.perf_counter() - self.start:6.1f} s] {label}: {what}", flush=True)
        self.save()
        free_memory(self.device)
        return row

    def part(self, part: Callable[[], None], section: str) -> None:
        """Run a part of the benchmark; what stops it before its cases, such as a fault of the device, is a row too."""
        try:
            part()
        except Exception as error:
            self.rows.append({"section": section, "name": "the rest of it", "not_run": short_error(error)})
            print(f"{section}: {short_error(error)}", flush=True)
            self.save()
            free_memory(self.device)

    def save(self) -> None:
        save_record(self.path, {**self.record, "rows": self.rows})


def free_memory(device: torch.device) -> None:
    """Give back what a case left, a failed one too. After a fault of the device even this raises; the rows say so."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def make_input_sets(shape: cases.Shape, device: torch.device, *, grad: bool = False) -> list[tuple[Tensor, ...]]:
    """Sets of standard normal bf16 (q, k, v), each (B, H, N, D) over (B, N, H, D) storage."""
    batch, heads, length, dim = shape
    num_bytes = 3 * batch * heads * length * dim * 2
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        x = torch.randn(batch, length, heads, dim, device=device, dtype=torch.bfloat16, generator=generator)
        return x.transpose(1, 2).requires_grad_(grad)

    return [(draw(), draw(), draw()) for _ in range(num_input_sets(num_bytes, device))]


def sla2(config: SLA2Config, gain: Tensor | None = None) -> Function:
    """The op with one config, and with a learned gain (H,) if there is one."""
    return lambda q, k, v: attention(q, k, v, alpha_gain=gain, config=config)


def measure_forward(run: Run, function: Function, input_sets: InputSets, work: Work) -> dict[str, Any]:
    """Every figure of one forward."""
    with torch.no_grad():
        timing = measure(function, input_sets, budget_s=run.preset.budget_s)
        row = figures(run, vars(timing), work)
        qkv_bytes = sum(x.nbytes for x in input_sets[0][:3])
        extra_bytes = measure_peak_extra_bytes(function, input_sets[0])
        if extra_bytes is not None:
            row |= {"extra_bytes": extra_bytes, "extra_over_qkv": extra_bytes / qkv_bytes}
        row["kernels_ms"] = measure_kernels(function, input_sets)
        row["stages_ms"] = group(row["kernels_ms"], FORWARD)
        row |= try_replay(function, input_sets, timing.num_runs)
    return row


def try_replay(function: Function, input_sets: InputSets, num_runs: int) -> dict[str, Any]:
    """The time as a CUDA graph, or why there is none."""
    try:
        return {"replay_ms": measure_replay(function, input_sets, num_runs)}
    except Exception as error:
        return {"replay_not_run": short_error(error)}


def measure_time(run: Run, function: Function, input_sets: InputSets, work: Work) -> dict[str, Any]:
    """Time alone, for the sweeps."""
    with torch.no_grad():
        timing = measure(function, input_sets, budget_s=run.preset.budget_s / 2, min_runs=3)
        return figures(run, vars(timing), work) | try_replay(function, input_sets, timing.num_runs)


def measure_training(
    run: Run, function: Function, input_sets: InputSets, works: tuple[Work, ...], *, stages: bool
) -> dict[str, Any]:
    """Forward and backward together, with the backward's kernels on their own."""
    grad_out = torch.randn_like(input_sets[0][0].detach())

    def step(*inputs: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs[:3], grad_out)

    timing = measure(step, input_sets, budget_s=run.preset.budget_s)
    row = figures(run, vars(timing), *works)
    extra_bytes = measure_peak_extra_bytes(step, input_sets[0])
    if extra_bytes is not None:
        qkv_bytes = sum(x.nbytes for x in input_sets[0][:3])
        row |= {"extra_bytes": extra_bytes, "extra_over_qkv": extra_bytes / qkv_bytes}
    # Before any profile: after one a capture may fail.
    row |= try_replay(step, input_sets, timing.num_runs)
    if stages:
        outputs = [(function(*inputs), *inputs[:3]) for inputs in input_sets]

        def backward(out: Tensor, *inputs: Tensor) -> Any:
            return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

        row["kernels_ms"] = measure_kernels(backward, outputs, num_runs=3)
        row["stages_ms"] = group(row["kernels_ms"], BACKWARD)
    return row


def figures(run: Run, timing: dict[str, Any], *works: Work) -> dict[str, Any]:
    """A timing with the rates that it means and its share of the floor; `works` run one after the other."""
    seconds = timing["ms"] / 1e3
    floor_ms = sum(work.floor_ms(run.ceilings) for work in works)
    return {
        **timing,
        "tflops": sum(work.total_flops for work in works) / seconds / 1e12,
        "gbytes_per_s": sum(work.num_bytes for work in works) / seconds / 1e9,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / timing["ms"],
    }


def run_agreement(run: Run, shape: cases.Shape) -> None:
    """Relative L2 error of each variant against the blocked implementation in float32 on the same bf16 values."""
    ((q, k, v), *_) = make_input_sets(shape, run.device)

    def error(config: SLA2Config) -> dict[str, Any]:
        arguments = config_arguments(config) | {"qk_format": None, "pv_format": None}
        settings = Settings(scale=shape[3] ** -0.5, **arguments)
        gain = torch.ones(shape[1], device=run.device) if config.mixing == "row" else None
        expected, *_ = blocked.forward(
            q.float(), k.float(), v.float(), None, None, None, None, gain, False, settings
        )  # fmt: skip
        with torch.no_grad():
            out = attention(q, k, v, config=config).float()
        return {"error": float((out - expected).norm() / expected.norm()), "finite": bool(out.isfinite().all())}

    for form in cases.FORMS:
        for number_format in run.preset.formats:
            config = cases.config_of(form, number_format, 0.9)
            name = cases.sla2_name(form, number_format)
            run.case(lambda config=config: error(config), section="agreement", shape=shape, name=name)  # type: ignore[misc]


def run_shape(run: Run, label: str, shape: cases.Shape) -> None:
    """The forward at one shape: the rivals first, then every form and format of the op."""
    input_sets = make_input_sets(shape, run.device)

    def case(name: str, measure_case: Callable[[], dict[str, Any]], sparsity: float = cases.SPARSITY) -> None:
        run.case(measure_case, section=cases.FORWARD, label=label, name=name, shape=shape, sparsity=sparsity)

    for name in (FLASH, CUDNN):
        attend = dense_attention(name)
        case(name, lambda attend=attend: measure_forward(run, attend, input_sets, dense_work(shape)), 0.0)  # type: ignore[misc]

    plain = cases.config_of("pooled, row", cases.PLAIN)

    def flex() -> dict[str, Any]:
        with torch.no_grad():
            attend, masks = flex_attentions(input_sets, plain)
        sets = [(*inputs, mask) for inputs, mask in zip(input_sets, masks, strict=True)]
        return measure_forward(run, attend, sets, attention_forward_work(shape, plain))

    for form in cases.FORMS:
        for number_format in run.preset.formats:
            config = cases.config_of(form, number_format)
            work = attention_forward_work(shape, config)
            case(
                cases.sla2_name(form, number_format),
                lambda config=config, work=work: measure_forward(run, sla2(config), input_sets, work),  # type: ignore[misc]
            )
    for option in cases.OPTIONS:
        optional = cases.option_config(option, shape)
        if optional is not None:
            gain = torch.ones(shape[1], device=run.device) if "gain" in option else None
            function, work = sla2(optional, gain), attention_forward_work(shape, optional)
            case(
                f"{cases.sla2_name('pooled, row', cases.PLAIN)}, {option}",
                lambda function=function, work=work: measure_forward(run, function, input_sets, work),  # type: ignore[misc]
            )
    case(FLEX, flex)


def run_training(run: Run, label: str, shape: cases.Shape) -> None:
    """Forward and backward at one shape, in 16 bit."""
    input_sets = make_input_sets(shape, run.device, grad=True)

    def case(name: str, measure_case: Callable[[], dict[str, Any]], sparsity: float = cases.SPARSITY) -> None:
        run.case(measure_case, section=cases.TRAINING, label=label, name=name, shape=shape, sparsity=sparsity)

    for name in (FLASH, CUDNN):
        attend, work = dense_attention(name), (dense_work(shape, backward=True),)
        case(
            name,
            lambda attend=attend, work=work: measure_training(run, attend, input_sets, work, stages=False),  # type: ignore[misc]
            0.0,
        )
    for form in cases.FORMS:
        config = cases.config_of(form, cases.PLAIN)
        works = attention_forward_work(shape, config), attention_backward_work(shape, config)
        case(
            cases.sla2_name(form, cases.PLAIN),
            lambda config=config, works=works: measure_training(run, sla2(config), input_sets, works, stages=True),  # type: ignore[misc]
        )


def run_sweeps(run: Run, shape: cases.Shape) -> None:
    """Over N at the sparsities that have targets, dense attention beside; then over sparsity at the shape itself."""
    batch, heads, _, dim = shape
    for length in run.preset.lengths:
        at_length = (batch, heads, length, dim)
        sweep_rivals(run, "sweep of N", at_length)
        sweep_point(run, "sweep of N", at_length, cases.NEVER_SLOWER_SPARSITY)
        sweep_point(run, "sweep of N", at_length, cases.SPARSITY)
    sweep_rivals(run, "sweep of sparsity", shape)
    for sparsity in run.preset.sparsities:
        sweep_point(run, "sweep of sparsity", shape, sparsity)


def sweep_rivals(run: Run, section: str, shape: cases.Shape) -> None:
    input_sets = make_input_sets(shape, run.device)
    for name in (FLASH, CUDNN):
        run.case(
            lambda name=name: measure_time(run, dense_attention(name), input_sets, dense_work(shape)),  # type: ignore[misc]
            section=section, name=name, shape=shape, sparsity=0.0,
        )  # fmt: skip


def sweep_point(run: Run, section: str, shape: cases.Shape, sparsity: float) -> None:
    input_sets = make_input_sets(shape, run.device)
    for form, number_format in (
        *((form, cases.PLAIN) for form in cases.FORMS),
        ("pooled, row", cases.FASTEST_EXPECTED),
    ):
        config = cases.config_of(form, number_format, sparsity)
        run.case(
            lambda config=config: measure_time(  # type: ignore[misc]
                run, sla2(config), input_sets, attention_forward_work(shape, config)
            ),
            section=section, name=cases.sla2_name(form, number_format), shape=shape, sparsity=sparsity,
        )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(cases.PRESETS), default="quick")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--shapes", nargs="+", choices=tuple(cases.SHAPES), help="default: the preset's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for attention.json and attention.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or was not measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the script and say nothing about speed")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; --device cpu --tiny only tests the script")

    preset = cases.TINY if args.tiny else cases.PRESETS[args.preset]
    shapes = cases.TINY_SHAPES if args.tiny else cases.SHAPES
    run = Run(device, preset, ceilings_of(device, tiny=args.tiny), args.out / "attention.json")
    run.record = {"machine": describe_machine("benchmarks.attention", device), "ceilings": vars(run.ceilings)}
    run.save()
    agreement_shape = TINY_AGREEMENT_SHAPE if args.tiny else AGREEMENT_SHAPE
    parts: dict[str, list[Callable[[], None]]] = {
        "agreement": [lambda: run_agreement(run, agreement_shape)],
        "shapes": [partial(run_shape, run, label, shapes[label]) for label in args.shapes or preset.shapes],
        "training": [
            partial(run_training, run, label, shapes[label]) for label in args.shapes or preset.training_shapes
        ],
        "sweeps": [lambda: run_sweeps(run, shapes[cases.SMALL])],
    }
    for section in SECTIONS:
        for part in parts[section] if section in args.sections else ():
            run.part(part, section)
    print_report(run.record, run.rows)
    plot(run.record, run.rows, args.out / "attention.png")
    return int(args.check and failed_checks(run.rows) > 0)


if __name__ == "__main__":
    sys.exit(main())
