"""`sla2 doctor`: what this machine has, and which kernels and formats it can run."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch
from tabulate import tabulate

import sla2_compile
from sla2_compile.kernels.dispatch import missing_for_format, missing_for_triton

# Distribution, and what it is for.
_PACKAGES = {
    "triton": "GPU kernels: pip install 'sla2-compile[gpu]'",
    "torchao": "low-bit training: pip install 'sla2-compile[quant]'",
    "diffusers": "the example: pip install 'sla2-compile[diffusers]'",
    "onnx": "export to ONNX: pip install 'sla2-compile[export]'",
    "onnxruntime": "checks of exported ONNX models: pip install 'sla2-compile[export]'",
    "safetensors": "learned state: pip install 'sla2-compile[calibrate]'",
    "tqdm": "progress of calibration: pip install 'sla2-compile[calibrate]'",
    "matplotlib": "pictures in reports: pip install 'sla2-compile[report]'",
}


def diagnose() -> str:
    """The whole report as text."""
    sections = (
        ("Versions", _versions()),
        ("Devices", _devices()),
        ("Kernels", _kernels()),
        ("Backend", [_backend(), _compiler()]),
    )
    return "\n\n".join(
        f"{title}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}" for title, rows in sections
    )


def _versions() -> list[list[str]]:
    rows = [
        ["sla2-compile", sla2_compile.__version__, ""],
        ["python", platform.python_version(), ""],
        # Its own word, which also names the build; the metadata of a CUDA build may not.
        ["torch", torch.__version__, ""],
    ]
    for name, purpose in _PACKAGES.items():
        try:
            rows.append([name, importlib.metadata.version(name), ""])
        except importlib.metadata.PackageNotFoundError:
            rows.append([name, "not installed", purpose])
    return rows


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _devices() -> list[list[str]]:
    rows = [["cpu", f"{platform.machine()}, {torch.get_num_threads()} threads"]]
    for gpu in _gpus():
        properties = torch.cuda.get_device_properties(gpu)
        memory = properties.total_memory / 2**30
        rows.append([str(gpu), f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"])
    if not _gpus():
        rows.append(["cuda", "none: " + ("no GPU found" if torch.version.cuda else "this PyTorch is a CPU build")])
    return rows


def _kernels() -> list[list[str]]:
    rows = [
        ["cpu", "float32, bfloat16, float16, float64", "yes", "ATen in blocks; does the kept work only"],
        ["cpu", "qk_format int8, fp8; pv_format fp8", "emulated", "rounds as the format does, no faster"],
    ]
    for gpu in _gpus() or [torch.device("cuda")]:
        missing = missing_for_triton(gpu) if _gpus() else "no CUDA device"
        rows.append([str(gpu), "Triton: bfloat16, float16, float32", "no" if missing else "yes", missing or ""])
        for option, number_format in (("qk_format", "int8"), ("qk_format", "fp8"), ("pv_format", "fp8")):
            why = missing or missing_for_format(number_format, gpu)
            rows.append([str(gpu), f"Triton: {option} {number_format}", "no" if why else "yes", why or ""])
    return rows


def _backend() -> list[str]:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="sla2")
    if found:
        return ['backend="sla2"', "registered", ""]
    return [
        'backend="sla2"',
        "not registered",
        "install the package (pip install sla2-compile), a source path is not enough",
    ]


def _compiler() -> list[str]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return ["C++ compiler", compiler or "none", "" if compiler else "Inductor needs one on a CPU"]
