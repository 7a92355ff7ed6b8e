"""Times AOTInductor packages in a process of their own, which has nothing but PyTorch: no package of ours.

    python benchmarks/run_packages.py INPUT OUTPUT PACKAGE...

INPUT is a tensor of torch.save; the packages are called on it in turns, so that drift of the machine meets all of them.
OUTPUT gets their results; printed is a JSON object with the seconds of every call.
"""

from __future__ import annotations

import json
import sys
import time

import torch

NUM_ROUNDS = 5


def main(input_path: str, output_path: str, *paths: str) -> None:
    x = torch.load(input_path)
    packages = [torch._inductor.aoti_load_package(path) for path in paths]
    # The first call allocates and loads kernels.
    outputs = [package(x) for package in packages]
    seconds: list[list[float]] = [[] for _ in packages]
    for _ in range(NUM_ROUNDS):
        for package, times in zip(packages, seconds, strict=True):
            synchronize(x)
            begin = time.perf_counter()
            package(x)
            synchronize(x)
            times.append(time.perf_counter() - begin)
    torch.save([out[0] if isinstance(out, (list, tuple)) else out for out in outputs], output_path)
    assert "sla2_compile" not in sys.modules
    print(json.dumps(seconds))


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
