"""Runs a saved artefact where this package is not imported: `python run_artefact.py kind path inputs outputs`.

`inputs` is a file of torch.save with the arguments of each call, `outputs` gets what came out. Imports nothing but
torch (and onnxruntime), and says whether anything imported `sla2_compile`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def load_program(path: str) -> Any:
    return torch.export.load(path).module()


def load_onnx(path: str) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*arguments: torch.Tensor) -> torch.Tensor:
        feed = {name: x.numpy() for name, x in zip(names, arguments, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def main(kind: str, path: str, inputs: str, outputs: str) -> None:
    run = {"aoti": torch._inductor.aoti_load_package, "pt2": load_program, "onnx": load_onnx}[kind](path)
    torch.save([run(*arguments) for arguments in torch.load(inputs)], outputs)
    print("sla2_compile" in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
