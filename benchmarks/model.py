"""One denoising step of Wan2.1-1.3B at 480p and 81 frames, compiled by plain Inductor and by the backend "sla2".

    python -m benchmarks.model

The model is diffusers' own WanTransformer3DModel with random bf16 weights: its speed does not depend on them, its
samples would. Inductor runs with one backend of dense attention and no other, once with flash and once with cuDNN.
Prints a table and writes model.json. What raises stays in the table as "not run" with its reason.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.nn.attention import sdpa_kernel

from benchmarks.machine import RESULTS, describe_machine, save_record
from benchmarks.rivals import CUDNN, FLASH, SDPA_BACKENDS
from benchmarks.stages import MODEL, group
from benchmarks.timing import measure, measure_kernels, measure_peak_extra_bytes, short_error
from sla2_compile.backend import sla2

SPARSITY = 0.97
LATENT_SHAPE = (1, 16, 21, 60, 104)
NUM_TEXT_TOKENS = 512
WAN_1_3B: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
TINY_LATENT_SHAPE = (1, 16, 2, 16, 16)
TINY_WAN = WAN_1_3B | {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 64,
    "ffn_dim": 64,
    "num_layers": 1,
}
# Each with the options of the backend "sla2", or the dense attention of plain Inductor.
VARIANTS: dict[str, str | dict[str, Any]] = {
    f"Inductor, {FLASH}": FLASH,
    f"Inductor, {CUDNN}": CUDNN,
    "sla2: pooled, row": {"tail": "pooled", "mixing": "row"},
    "sla2: linear, block": {"tail": "linear", "mixing": "block"},
    "sla2: pooled, row, qk int8": {"qk_format": "int8"},
    "sla2: pooled, row, qk fp8, pv fp8": {"qk_format": "fp8", "pv_format": "fp8"},
    "sla2: pooled, row, 3D tiles": {"token_grid": "of the latents"},
}
TARGETS = {FLASH: 3.2, CUDNN: 2.2}
TARGET_VARIANTS = ("sla2: pooled, row", "sla2: linear, block")


def build_model(config: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """The model in bf16, except for what its class itself keeps in float32."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with device:
        model = WanTransformer3DModel(**config)
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def make_input_sets(
    latent_shape: tuple[int, ...], text_dim: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Two sets of latents, timestep and text, random; one pass over the model leaves nothing of them in a cache."""
    sets = []
    for seed in range(2):
        generator = torch.Generator(device).manual_seed(seed)
        latents, text = (
            torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
            for shape in (latent_shape, (latent_shape[0], NUM_TEXT_TOKENS, text_dim))
        )
        sets.append((latents, torch.tensor([500], device=device), text))
    return sets


def token_grid(latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Tokens along frames, height and width: a patch covers 1 x 2 x 2 latents."""
    return latent_shape[2], latent_shape[3] // 2, latent_shape[4] // 2


def compiled(model: torch.nn.Module, options: dict[str, Any] | None) -> Callable[..., Any]:
    """The model compiled by plain Inductor (no options) or by the backend "sla2", all its self-attention or raises."""
    if options is None:
        return torch.compile(model, dynamic=False)
    # The name is registered where the package is installed; from a bare checkout the function itself does.
    backend: Any = "sla2" if "sla2" in torch._dynamo.list_backends() else sla2
    settings: Any = {"sparsity": SPARSITY, "include": ("*.attn1",), "min_seq_len": 0, "strict": True, **options}
    return torch.compile(model, backend=backend, options=settings, dynamic=False)


@contextmanager
def no_caches() -> Iterator[None]:
    """Compile afresh: no cache key holds the choice of the dense attention's backend, and compile times are honest."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def measure_variant(model: torch.nn.Module, variant: str | dict[str, Any], input_sets: Any, budget_s: float) -> Any:
    """Figures of one variant, and its output on the first inputs."""
    latent_shape = tuple(input_sets[0][0].shape)
    attention: AbstractContextManager[Any]
    if isinstance(variant, str):
        options, attention = None, sdpa_kernel(SDPA_BACKENDS[variant])
    else:
        options, attention = dict(variant), nullcontext()
        if "token_grid" in options:
            options["token_grid"] = token_grid(latent_shape)
    with no_caches(), attention, torch.no_grad():
        step = compiled(model, options)

        def function(latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
            return step(
                hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False
            )[0]  # fmt: skip

        timing = measure(function, input_sets, budget_s=budget_s)
        kernels = measure_kernels(function, input_sets, num_runs=2)
        figures = {
            **vars(timing),
            "peak_extra_bytes": measure_peak_extra_bytes(function, input_sets[0]),
            "kernels_ms": dict(list(kernels.items())[:40]),
            "stages_ms": group(kernels, MODEL),
        }
        output = function(*input_sets[0]).float()
    busy = sum(figures["stages_ms"].values())
    if busy:
        attending = sum(ms for stage, ms in figures["stages_ms"].items() if "attention" in stage)
        figures["attention_share"] = attending / busy
    return figures, output


def table_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    extra = row.get("peak_extra_bytes")
    return {
        "variant": row["name"],
        "ms": row.get("ms"),
        **{f"x {rival}": ratio(row, rival, rows) for rival in TARGETS},
        "extra GB": None if extra is None else extra / 1e9,
        "attention": row.get("attention_share"),
        "first s": row.get("first_s"),
        "difference": row.get("difference"),
        "note": f"not run: {row['not_run'][:80]}" if "not_run" in row else "",
    }


def ratio(row: dict[str, Any], rival: str, rows: list[dict[str, Any]]) -> float | None:
    dense = next((other.get("ms") for other in rows if other["name"] == f"Inductor, {rival}"), None)
    return dense / row["ms"] if dense is not None and "ms" in row else None


def print_report(record: dict[str, Any]) -> bool:
    """Print the tables; whether every target is met."""
    rows = record["rows"]
    print(f"\n{record['machine']['device']}, torch {record['machine']['torch']}, {record['num_tokens']} tokens")
    print(tabulate([table_row(row, rows) for row in rows], headers="keys", floatfmt=".3g", missingval="-"))
    print("difference: relative L2 distance of the output from the first one that ran; the weights are random")
    for row in rows:
        if row.get("stages_ms"):
            print(f"  {row['name']}, ms: {', '.join(f'{stage} {ms:.1f}' for stage, ms in row['stages_ms'].items())}")
    checks = []
    for row in (row for row in rows if row["name"] in TARGET_VARIANTS):
        for rival, least in TARGETS.items():
            value = ratio(row, rival, rows)
            verdict = "not run" if value is None else "pass" if value >= least else "FAIL"
            checks.append(
                {"target": f"{row['name']} over {rival}", "measured": value, "must": least, "verdict": verdict}
            )
    print("\nTargets")
    print(tabulate(checks, headers="keys", floatfmt=".3g", missingval="-"))
    return all(check["verdict"] == "pass" for check in checks)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for model.json")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds to time each variant (default: 5)")
    parser.add_argument("--limit", type=float, default=480.0, help="no variant starts after these seconds")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or was not measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the script and say nothing about speed")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; --device cpu --tiny only tests the script")
    start = time.perf_counter()

    config, latent_shape = (TINY_WAN, TINY_LATENT_SHAPE) if args.tiny else (WAN_1_3B, LATENT_SHAPE)
    model = build_model(config, device)
    input_sets = make_input_sets(latent_shape, config["text_dim"], device)
    rows: list[dict[str, Any]] = []
    record = {
        "machine": describe_machine("benchmarks.model", device),
        "config": config,
        "latent_shape": latent_shape,
        "num_tokens": math.prod(token_grid(latent_shape)),
        "sparsity": SPARSITY,
        "weights_bytes": sum(x.nbytes for x in model.parameters()),
        "rows": rows,
    }
    first_output = None
    for name in args.variants:
        row: dict[str, Any] = {"name": name}
        if time.perf_counter() - start > args.limit:
            row["not_run"] = f"the run's time was spent ({args.limit:g} s)"
        else:
            try:
                figures, output = measure_variant(model, VARIANTS[name], input_sets, args.budget)
                row |= figures
                first_output = output if first_output is None else first_output
                row["difference"] = float((output - first_output).norm() / first_output.norm())
            except Exception as error:  # one variant must not take the others along
                row["not_run"] = short_error(error)
        rows.append(row)
        what = f"{row['ms']:.1f} ms" if "ms" in row else row["not_run"]
        print(f"[{time.perf_counter() - start:6.1f} s] {name}: {what}", flush=True)
        save_record(args.out / "model.json", record)
        gc.collect()
    return int(not print_report(record) and args.check)


if __name__ == "__main__":
    sys.exit(main())
