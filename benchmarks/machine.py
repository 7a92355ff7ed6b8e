"""What a record says about where it was measured, and how the records are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "diffusers", "transformers", "sla2-compile")


def describe_machine(module: str, device: torch.device) -> dict[str, Any]:
    """Device, versions, date and command, for a record that stands alone.

    Args:
        module: the benchmark, as `python -m` takes it.
        device: what it ran on.
    """
    described: dict[str, Any] = {
        "command": f"python -m {module} {shlex.join(_arguments())}".strip(),
        "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "num_multiprocessors": properties.multi_processor_count,
            "cache_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return described


def _arguments() -> list[str]:
    """The command line without the folder of the results, which is of no interest elsewhere."""
    arguments, kept = iter(sys.argv[1:]), []
    for argument in arguments:
        if argument == "--out":
            next(arguments, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return kept


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, numbers to five digits; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
