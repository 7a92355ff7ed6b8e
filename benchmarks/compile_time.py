"""How much longer a model's first compilation takes with `sla2` than with Inductor alone, and our passes' part of it.

    python -m benchmarks.compile_time                 print the table
    python -m benchmarks.compile_time --check         also fail where it takes 10 % longer or more

The model is diffusers' Wan transformer with narrow layers: compile time depends on how many there are, not on their
width. Every self-attention becomes SLA2. Each compilation runs in a fresh process with empty caches and without
Inductor's pool of workers. Seconds are those that the processor computed, compilers included, as other work on the
machine hardly changes them; both sides alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.machine import RESULTS, describe_machine, save_record

MAX_RATIO = 1.1
OPTIONS = {"sparsity": 0.9, "min_seq_len": 512}


def make_model(num_layers: int, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and its inputs: 768 video tokens, 64 of text."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=64, ffn_dim=256,
        num_layers=num_layers,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 32, 32),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 64, 64),
    }
    return model.to(device), {name: x.to(device) for name, x in inputs.items()}


def call(run: Callable[..., Any], inputs: dict[str, torch.Tensor], training: bool) -> None:
    with torch.set_grad_enabled(training):
        out = run(**inputs).sample
        if training:
            out.square().mean().backward()


def processor_seconds() -> float:
    """Seconds that this process and its finished children have computed."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds_of_first_call(side: str, num_layers: int, training: bool, device: str) -> float:
    """Processor seconds of the first call, compilation included; for the side "passes", of our passes alone."""
    model, inputs = make_model(num_layers, device)
    call(model, inputs, training)
    if side == "passes":
        return seconds_of_passes(model, inputs, training)
    arguments: dict[str, Any] = {"backend": "sla2", "options": OPTIONS} if side == "sla2" else {}
    begin = processor_seconds()
    call(torch.compile(model, **arguments), inputs, training)
    return processor_seconds() - begin


def seconds_of_passes(model: torch.nn.Module, inputs: dict[str, torch.Tensor], training: bool) -> float:
    """Seconds of all that the backend does before and beside Inductor."""
    from sla2_compile.backend import build_backend
    from sla2_compile.config import SLA2Config

    seconds = 0.0

    def timed(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        nonlocal seconds
        begin = processor_seconds()
        run = build_backend(SLA2Config.from_options(OPTIONS), lambda gm, _: gm)(gm, example_inputs)
        seconds += processor_seconds() - begin
        return run

    call(torch.compile(model, backend=timed), inputs, training)
    return seconds


def in_a_fresh_process(side: str, args: argparse.Namespace, training: bool) -> float:
    """`seconds_of_first_call` with empty caches."""
    command = [
        sys.executable, "-m", "benchmarks.compile_time", "--side", side, "--layers", str(args.layers),
        "--device", args.device, *(["--training"] if training else []),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(args: argparse.Namespace, training: bool) -> dict[str, Any]:
    """Median seconds of each side, and the ratio of every round's pair."""
    rounds: dict[str, list[float]] = {"inductor": [], "sla2": [], "passes": []}
    for i in range(args.rounds):
        # The order changes from round to round, for what one process leaves to the next.
        for side in ("inductor", "sla2") if i % 2 == 0 else ("sla2", "inductor"):
            rounds[side].append(in_a_fresh_process(side, args, training))
        rounds["passes"].append(in_a_fresh_process("passes", args, training))
    ratios = [sla2 / inductor for sla2, inductor in zip(rounds["sla2"], rounds["inductor"], strict=True)]
    return {
        "what": "training" if training else "inference",
        **{f"{side}_s": median(seconds) for side, seconds in rounds.items()},
        "ratio": median(ratios),
        "ratios": ratios,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side (default: 5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true", help=f"fail at {MAX_RATIO:g} times Inductor's time or more")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--save", action="store_true", help="write compile_time.json")
    parser.add_argument("--training", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("inductor", "sla2", "passes"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(seconds_of_first_call(args.side, args.layers, args.training, args.device)))
        return 0
    rows = [measure(args, training) for training in (False, True)]
    columns = ["what", "inductor_s", "sla2_s", "ratio", "passes_s"]
    print(f"first call of {args.layers} layers, processor seconds, medians of {args.rounds} fresh processes")
    print(tabulate([[row[name] for name in columns] for row in rows], columns, floatfmt=".2f"))
    if args.save:
        machine = describe_machine("benchmarks.compile_time", torch.device(args.device))
        save_record(args.out / "compile_time.json", {"machine": machine, "rows": rows})
    return int(args.check and max(row["ratio"] for row in rows) >= MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
