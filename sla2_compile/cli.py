"""The command `sla2`: `sla2 doctor`, `sla2 explain` and `sla2 export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sla2_compile.cli_arguments import (
    build_model,
    check_call,
    check_inputs,
    dynamic_shapes,
    example_inputs,
    load_model,
    parse_dtype,
    parse_input,
    parse_option,
)
from sla2_compile.config import SLA2Config
from sla2_compile.doctor import diagnose
from sla2_compile.explain import explain
from sla2_compile.export import export
from sla2_compile.state_io import load_state

_EXPLAIN_EPILOG = """example:
  sla2 explain WanTransformer3DModel transformer/config.json \\
      --input hidden_states=1x16x21x60x104:bfloat16 --input timestep=1:int64 \\
      --input encoder_hidden_states=1x512x4096:bfloat16 --option sparsity=0.97
"""

_EXPORT_EPILOG = """example:
  sla2 export WanTransformer3DModel transformer/ wan.onnx --format onnx --state wan.safetensors \\
      --input hidden_states=1x16x21x60x104 --input timestep=1:int64 --input encoder_hidden_states=1x512x4096 \\
      --option sparsity=0.97 --dynamic hidden_states.2=5:41
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
        print(f"sla2: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sla2", description="SLA2 attention for any PyTorch model.")
    commands = parser.add_subparsers(required=True, metavar="command")
    doctor = commands.add_parser("doctor", help="versions, devices, and which kernels and formats this machine can run")
    doctor.set_defaults(run=lambda args: print(diagnose()))
    explaining = commands.add_parser(
        "explain",
        help="every attention site of a diffusers model class, its verdict and why",
        description="Builds the model without weights (on the meta device) and lists its attention sites.",
        epilog=_EXPLAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_arguments(explaining)
    explaining.add_argument("config_file", type=Path, help="its config.json")
    explaining.add_argument("--json", action="store_true", help="print JSON in place of the table")
    explaining.set_defaults(run=_run_explain)
    exporting = commands.add_parser(
        "export",
        help="write a diffusers model with converted attention to a .pt2 or .onnx file",
        description="Loads the model, writes it, and compares the file with the model on random inputs.",
        epilog=_EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_arguments(exporting)
    exporting.add_argument(
        "source", type=Path, help="a folder with config.json and weights, or config.json alone for random weights"
    )
    exporting.add_argument("path", type=Path, help="the file to write")
    exporting.add_argument("--format", choices=("pt2", "aoti", "onnx"), default="pt2", help="default: pt2")
    exporting.add_argument("--state", type=Path, help="learned state, as save_state writes it")
    exporting.add_argument(
        "--dynamic", action="append", default=[], metavar="NAME.DIM=MIN:MAX", help="a size that may vary (repeatable)"
    )
    exporting.add_argument("--dtype", default="float32", help="of the model and its floating inputs (default: float32)")
    exporting.add_argument("--device", default="cpu", help="where to load and check it (default: cpu)")
    exporting.add_argument("--portable", action="store_true", help="pt2 that loads without this package")
    exporting.add_argument("--onnx-op", choices=("standard", "custom"), default="standard", help="default: standard")
    exporting.add_argument("--json", action="store_true", help="print the file's metadata in place of the table")
    exporting.set_defaults(run=_run_export)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_class", help="a class of diffusers, for example WanTransformer3DModel")
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=SHAPE[:DTYPE]", help="an input of forward (repeatable)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="FIELD=VALUE", help="a field of SLA2Config (repeatable)"
    )


def _run_explain(args: argparse.Namespace) -> None:
    # bfloat16 as such models are run, unless an input says otherwise; without memory, since only shapes matter.
    with torch.device("meta"):
        model = build_model(args.model_class, args.config_file).to(torch.bfloat16)
    inputs = dict(parse_input(text, torch.bfloat16) for text in args.input)
    check_inputs(model, inputs)
    check_call(model, inputs)
    config = SLA2Config.from_options(dict(parse_option(text) for text in args.option))
    report = explain(model, config=config, **inputs)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _run_export(args: argparse.Namespace) -> None:
    dtype = parse_dtype(args.dtype)
    model = load_model(args.model_class, args.source).to(args.device, dtype)
    if args.state is not None:
        load_state(model, args.state)
    shapes = dict(parse_input(text, dtype) for text in args.input)
    check_inputs(model, shapes)
    inputs = example_inputs(model, shapes, torch.device(args.device))
    check_call(model, inputs)
    report = export(
        model,
        (),
        args.path,
        kwargs=inputs,
        format=args.format,
        dynamic_shapes=dynamic_shapes(inputs, args.dynamic),
        config=dict(parse_option(text) for text in args.option),
        portable=args.portable,
        onnx_op=args.onnx_op,
    )
    print(json.dumps(report.metadata, indent=2) if args.json else report)


if __name__ == "__main__":
    sys.exit(main())
