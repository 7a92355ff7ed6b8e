"""Turn the words of the command line into models, inputs and settings."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim


def build_model(class_name: str, config_file: Path) -> nn.Module:
    """A model of diffusers with the settings of its config.json and random weights, in eval mode."""
    model_class = _model_class(class_name)
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"config_file: expected JSON, got {config_file}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config_file: expected a JSON object of settings, got a {type(settings).__name__}")
    model: nn.Module = model_class.from_config(settings)
    return model.eval()


def load_model(class_name: str, source: Path) -> nn.Module:
    """A model of diffusers from a folder with its weights, or from a config.json with random ones."""
    if not source.is_dir():
        return build_model(class_name, source)
    model: nn.Module = _model_class(class_name).from_pretrained(source, local_files_only=True)
    return model.eval()


def _model_class(class_name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("model_class: expected diffusers; pip install 'sla2-compile[diffusers]'") from error
    diffusers.logging.set_verbosity_error()
    model_class = getattr(diffusers, class_name, None)
    if not (inspect.isclass(model_class) and hasattr(model_class, "from_config")):
        raise ValueError(
            f"model_class: expected a model class of diffusers {diffusers.__version__}, got {class_name!r}"
        )
    return model_class


def parse_dtype(name: str) -> torch.dtype:
    """A floating dtype by its name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype: expected a floating dtype such as float32 or bfloat16, got {name!r}")
    return dtype


def parse_input(text: str, dtype: torch.dtype) -> tuple[str, Tensor]:
    """The name and a tensor without memory from NAME=SHAPE[:DTYPE]; `dtype` where none is given."""
    name, equals, rest = text.partition("=")
    shape_text, _, dtype_name = rest.partition(":")
    given = getattr(torch, dtype_name, None) if dtype_name else dtype
    try:
        shape = [int(size) for size in shape_text.split("x")]
    except ValueError:
        shape = []
    if not name or not equals or not shape or not isinstance(given, torch.dtype):
        raise ValueError(f"--input: expected NAME=SHAPE[:DTYPE] such as timestep=1:int64, got {text!r}")
    return name, torch.empty(shape, dtype=given, device="meta")


def parse_option(text: str) -> tuple[str, Any]:
    """A field of `SLA2Config` and its value from FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option: expected FIELD=VALUE such as sparsity=0.97, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def check_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raise ValueError where inputs are missing or unknown to the model's forward."""
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


def check_call(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raise ValueError where the model cannot be called with inputs."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
        raise ValueError(
            f"--input: expected shapes and dtypes that {type(model).__name__}.forward can take, got {shapes}, which "
            f"raise: {error}"
        ) from error


def example_inputs(model: nn.Module, shapes: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Random floats, and ones for the rest, of these shapes; the model returns tuples where it can be told to."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        name: torch.randn(x.shape, generator=generator).to(device, x.dtype)
        if x.is_floating_point()
        else torch.ones(x.shape, dtype=x.dtype, device=device)
        for name, x in shapes.items()
    }
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs["return_dict"] = False
    return inputs


def dynamic_shapes(inputs: dict[str, Any], texts: Sequence[str]) -> dict[str, Any] | None:
    """What torch.export takes, from NAME.DIM=MIN:MAX; None where no size varies."""
    if not texts:
        return None
    shapes: dict[str, Any] = dict.fromkeys(inputs)
    for text in texts:
        place, _, limits = text.partition("=")
        name, _, dim = place.rpartition(".")
        low, _, high = limits.partition(":")
        numbers = [part for part in (dim, low, high) if part.isdecimal()]
        if name not in inputs or len(numbers) != 3:
            raise ValueError(
                f"--dynamic: expected NAME.DIM=MIN:MAX of one of the inputs {', '.join(inputs)}, such as "
                f"hidden_states.2=5:41, got {text!r}"
            )
        variable = Dim(f"{name}_{dim}", min=int(low), max=int(high))
        shapes[name] = {**(shapes[name] or {}), int(dim): variable}
    return shapes
