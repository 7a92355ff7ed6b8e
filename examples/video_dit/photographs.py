"""The pictures that clips are cut from: photographs and handwritten digits that ship inside Python packages.

`python -m examples.video_dit.photographs FILE` packs them into one NumPy file, so that a machine which trains needs
none of these packages. Nothing of them is part of this repository. Who made them, as the packages say: china and
flower, scikit-learn, CC BY 2.0, by danielbuechele and vultilion; grace_hopper, matplotlib, public domain; those of
scikit-image are public domain or CC0 (its data's README names each author).
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# (package, path in it); the first three come with what the examples need anyway.
SOURCES = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/ihc.png"),
)
NUM_WITHOUT_SKIMAGE = 3

# The shorter side of a stored photograph: a clip shows at most this much detail.
SHORT_SIDE = 256


@dataclass(frozen=True)
class Pictures:
    """What clips are cut from, uint8."""

    photographs: list[Tensor]  # each (3, H, W)
    digits: Tensor  # (1797, 8, 8), ink from 0 to 16


def gather(num_photographs: int = len(SOURCES)) -> Pictures:
    """Read the pictures from the packages that ship them, scaled so that their shorter side is `SHORT_SIDE`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    photographs = []
    for package, path in SOURCES[:num_photographs]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"expected {package}, which ships {Path(path).name}; pip install 'sla2-compile[paper]'")
        image = Image.open(Path(spec.origin).parent / path).convert("RGB")
        share = SHORT_SIDE / min(image.size)
        image = image.resize((round(share * image.width), round(share * image.height)), Image.Resampling.LANCZOS)
        photographs.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    return Pictures(photographs, torch.from_numpy(load_digits().images.astype(np.uint8)))


def pack(pictures: Pictures, path: Path) -> None:
    """Write the pictures to a NumPy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = {f"photograph_{i:02}": x.numpy() for i, x in enumerate(pictures.photographs)}
    np.savez_compressed(path, digits=pictures.digits.numpy(), **named)


def unpack(path: Path) -> Pictures:
    """Read a file that `pack` wrote."""
    with np.load(path) as file:
        names = sorted(name for name in file.files if name != "digits")
        return Pictures([torch.from_numpy(file[name]) for name in names], torch.from_numpy(file["digits"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to write")
    args = parser.parse_args()
    pack(gather(), args.path)
    print(f"{args.path}: {len(SOURCES)} photographs, {args.path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
