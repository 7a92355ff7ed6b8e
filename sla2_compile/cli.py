"""The command `sla2`: `sla2 doctor` and `sla2 explain`."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sla2_compile.config import SLA2Config
from sla2_compile.doctor import diagnose
from sla2_compile.explain import explain

_EXPLAIN_EPILOG = """example:
  sla2 explain WanTransformer3DModel transformer/config.json \\
      --input hidden_states=1x16x21x60x104:bfloat16 --input timestep=1:int64 \\
      --input encoder_hidden_states=1x512x4096:bfloat16 --option sparsity=0.97
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, TypeError, ImportError, OSError) as error:
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
    explaining.add_argument("model_class", help="a class of diffusers, for example WanTransformer3DModel")
    explaining.add_argument("config_file", type=Path, help="its config.json")
    explaining.add_argument(
        "--input", action="append", default=[], metavar="NAME=SHAPE[:DTYPE]", help="an input of forward (repeatable)"
    )
    explaining.add_argument(
        "--option", action="append", default=[], metavar="FIELD=VALUE", help="a field of SLA2Config (repeatable)"
    )
    explaining.add_argument("--json", action="store_true", help="print JSON in place of the table")
    explaining.set_defaults(run=_run_explain)
    return parser


def _run_explain(args: argparse.Namespace) -> None:
    model = _build_model(args.model_class, args.config_file)
    inputs = dict(_parse_input(text) for text in args.input)
    _check_inputs(model, inputs)
    config = SLA2Config.from_options(dict(_parse_option(text) for text in args.option))
    report = explain(model, config=config, **inputs)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _build_model(class_name: str, config_file: Path) -> torch.nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("explain: expected diffusers; pip install 'sla2-compile[diffusers]'") from error
    diffusers.logging.set_verbosity_error()
    model_class = getattr(diffusers, class_name, None)
    if not (inspect.isclass(model_class) and hasattr(model_class, "from_config")):
        raise ValueError(
            f"model_class: expected a model class of diffusers {diffusers.__version__}, got {class_name!r}"
        )
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"config_file: expected JSON, got {config_file}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config_file: expected a JSON object of settings, got a {type(settings).__name__}")
    # bfloat16 as such models are run, unless an input says otherwise; without memory, since only shapes matter.
    with torch.device("meta"):
        model: torch.nn.Module = model_class.from_config(settings)
    return model.to(torch.bfloat16).eval()


def _parse_input(text: str) -> tuple[str, torch.Tensor]:
    name, equals, rest = text.partition("=")
    shape_text, _, dtype_name = rest.partition(":")
    dtype = getattr(torch, dtype_name or "bfloat16", None)
    try:
        shape = [int(size) for size in shape_text.split("x")]
    except ValueError:
        shape = []
    if not name or not equals or not shape or not isinstance(dtype, torch.dtype):
        raise ValueError(f"--input: expected NAME=SHAPE[:DTYPE] such as timestep=1:int64, got {text!r}")
    return name, torch.empty(shape, dtype=dtype, device="meta")


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option: expected FIELD=VALUE such as sparsity=0.97, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _check_inputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    parameters = inspect.signature(model.forward).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [name for name in required if name not in inputs]
    unknown = [name for name in inputs if name not in parameters]
    if missing or unknown:
        got = ", ".join(inputs) or "none"
        raise ValueError(
            f"--input: expected {', '.join(required)} for {type(model).__name__}.forward "
            f"(it also takes {', '.join(name for name in parameters if name not in required)}), got {got}"
        )
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise ValueError(
            f"--input: expected shapes and dtypes that {type(model).__name__}.forward can take, got "
            f"{', '.join(f'{name} {tuple(x.shape)}' for name, x in inputs.items())}, which raise: {error}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
