"""`export`: a model with SLA2 attention as a file that runs elsewhere, checked against the model before it is kept."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

import sla2_compile
from sla2_compile.config import SLA2Config
from sla2_compile.explain import SiteReport

if TYPE_CHECKING:
    from sla2_compile.exporters.check import Check
    from sla2_compile.passes.sites import Site

Format = Literal["pt2", "aoti", "onnx"]
OnnxOp = Literal["standard", "custom"]

_SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_PACKAGES = ("triton", "onnx", "onnxscript")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares. Prints as a table.

    Args:
        path: of the file.
        metadata: as it is in the file: versions, sites, sparsity, formats.
        checks: one run on the example inputs, and one at another length where lengths are dynamic.
        tolerance: the largest difference that was allowed.
    """

    path: Path
    metadata: dict[str, Any]
    checks: tuple[Check, ...]
    tolerance: float

    def __str__(self) -> str:
        from tabulate import tabulate

        sites = self.metadata["sites"]
        converted = sum(site["verdict"] == "sla2" for site in sites)
        headers = ["input shapes", "difference", "from dense", "seconds", "dense eager, seconds", "speedup"]
        rows = [
            [
                ", ".join("x".join(map(str, shape)) for shape in each.input_shapes),
                f"{each.difference:.1e}",
                f"{each.difference_from_dense:.1e}",
                f"{each.seconds:.4f}",
                f"{each.dense_seconds:.4f}",
                f"{each.dense_seconds / each.seconds:.2f}x",
            ]
            for each in self.checks
        ]
        return (
            f"{self.path}: {self.metadata['format']}, {self.path.stat().st_size / 2**20:.1f} MiB, {converted} of "
            f"{len(sites)} sites converted; allowed difference {self.tolerance:g}\n"
            + tabulate(rows, headers, disable_numparse=True)
        )


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    format: Format = "pt2",
    dynamic_shapes: Any = None,
    config: SLA2Config | Mapping[str, Any] | None = None,
    portable: bool = False,
    onnx_op: OnnxOp = "standard",
    tolerance: float | None = None,
) -> ExportReport:
    """Write a model with its attention converted, as the backend converts it, to a file for inference.

    The file is loaded and run on the example inputs before it takes its place at `path`; where lengths are dynamic, at
    another length too. What was learned is in it under names such as `blocks.0.attn1.sla2.proj_q`.

    Args:
        model: in eval mode, prepared and calibrated or not.
        args: example inputs, of the shapes that the file will be used with.
        path: of the file, ending in ".pt2" or, for "onnx", ".onnx". Its folder must exist. A file there is replaced.
        kwargs: example keyword inputs. What is no tensor becomes a constant of the file.
        format: "pt2": a saved ExportedProgram. "aoti": an AOTInductor package for the device of the model.
            "onnx": an ONNX model.
        dynamic_shapes: sizes that may vary, as torch.export takes them.
        config: the settings, or a mapping of some of them as options of torch.compile. Where none or a mapping without
            a sparsity is given, calibrated sites run at what they were calibrated for.
        portable: for "pt2": with the operations that attention is made of, so that the file loads without this package.
        onnx_op: for "onnx": "standard" operators only, or a "custom" node `sla2.Attention` with a function of those as
            its body, for runtimes that have their own.
        tolerance: largest relative L2 difference from the converted model in eager PyTorch; None: by dtype and formats.

    Returns:
        The metadata that the file carries, and how it compares with the model in results and time.

    Raises:
        ValueError: a bad argument, a model that cannot be traced whole (with the reason and the line), lengths that the
            blocks forbid, or a difference beyond the tolerance. Nothing is written.
        TypeError: an argument of the wrong type.
        OSError: a path that cannot be written, or no C++ compiler for "aoti".
        ImportError: packages that the format needs, with the command that installs them.
        NotImplementedError: what a format or a device cannot do yet.
    """
    path = Path(path)
    settings = config if isinstance(config, SLA2Config) else SLA2Config.from_options(config)
    sparsity_is_default = not isinstance(config, SLA2Config) and "sparsity" not in (config or {})
    _check_arguments(model, args, path, format, portable=portable, onnx_op=onnx_op)

    from sla2_compile.backend import report_conversion
    from sla2_compile.exporters.check import at_another_length, check, default_tolerance
    from sla2_compile.exporters.program import Inputs, export_graph
    from sla2_compile.exporters.trace_model import trace_model

    exporter = importlib.import_module(f"sla2_compile.exporters.{format}")
    variants: dict[str, dict[str, Any]] = {"pt2": {"portable": portable}, "aoti": {}, "onnx": {"onnx_op": onnx_op}}
    variant = variants[format]
    inputs = Inputs(tuple(args), dict(kwargs or {}), dynamic_shapes)
    exporter.check_requirements(model, inputs)
    with _replacing(path) as unchecked:
        graph, sites = trace_model(model, inputs, settings, sparsity_is_default=sparsity_is_default)
        report_conversion(graph, sites, settings, sparsity_is_default=sparsity_is_default)
        program = export_graph(graph, inputs)
        metadata = _metadata(sites, {"format": format, **variant})
        exporter.write(program, inputs, unchecked, metadata, **variant)
        run, metadata = exporter.load(unchecked)
        limit = default_tolerance(model, inputs, sites) if tolerance is None else tolerance
        lengths = [inputs] if dynamic_shapes is None else [inputs, at_another_length(inputs, program)]
        checks = tuple(_insist(check(run, graph, model, each), limit) for each in lengths)
    return ExportReport(path, metadata, checks, limit)


def _insist(result: Check, limit: float) -> Check:
    # Not "greater than": a NaN is no agreement.
    if not result.difference <= limit:
        raise ValueError(
            f"tolerance: expected a relative difference of at most {limit:g} between the file and the converted model, "
            f"got {result.difference:.2e} for inputs of the shapes {', '.join(map(str, result.input_shapes))}; nothing "
            "was written. Where routing is close to a tie, pass a larger tolerance; otherwise please report this"
        )
    return result


def _check_arguments(model: Any, args: Any, path: Path, format: str, *, portable: bool, onnx_op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; wrap a function in a module")
    if model.training:
        raise ValueError(f"model: expected a {type(model).__name__} in eval mode, got one in training; call .eval()")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args: expected a tuple of example inputs, got {type(args).__name__}; write (x,)")
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {', '.join(map(repr, get_args(Format)))}, got {format!r}")
    if onnx_op not in get_args(OnnxOp):
        raise ValueError(f"onnx_op: expected one of {', '.join(map(repr, get_args(OnnxOp)))}, got {onnx_op!r}")
    if portable and format != "pt2":
        raise ValueError(f"portable: expected False for {format!r}, got True; only 'pt2' has a portable form")
    if onnx_op != "standard" and format != "onnx":
        raise ValueError(f"onnx_op: expected 'standard' for {format!r}, got {onnx_op!r}; it is a choice of 'onnx'")
    if path.suffix != _SUFFIXES[format]:
        raise ValueError(f"path: expected a name that ends in {_SUFFIXES[format]} for {format!r}, got {path.name!r}")
    if path.is_dir():
        raise OSError(f"path: expected a file, got the folder {path}; add a name")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to. What is there at the end, and beside it, moves to `path` unless something was raised."""
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".sla2-export-")
    except OSError as error:
        raise OSError(
            f"path: expected a folder that can be written, got {path.parent} ({error.strerror}); make it, or choose "
            "another"
        ) from error
    with folder as name:
        yield Path(name) / path.name
        for written in Path(name).iterdir():
            written.replace(path.parent / written.name)


def _metadata(sites: list[Site], what: dict[str, Any]) -> dict[str, Any]:
    return {
        **what,
        "versions": _versions(),
        "sites": [SiteReport(site, site.name).to_dict() | _settings(site) for site in sites],
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {"sla2-compile": sla2_compile.__version__, "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _settings(site: Site) -> dict[str, Any]:
    """The settings of a site that decide what it computes; symbolic ones as text."""
    names = ("block_q", "block_k", "feature_map", "qk_format", "pv_format", "tail", "mixing", "token_grid")
    if site.config is None or site.verdict == "dense":
        return {}
    values = {name: getattr(site.config, name) for name in (*names, "exact_prefix", "exact_suffix")}
    return {name: str(x) if isinstance(x, torch.SymInt) else x for name, x in values.items()}
