"""All model families that coverage is counted over, and the classes of diffusers that are not among them."""

from __future__ import annotations

import functools
import importlib

import audio_families
import other_families
import picture_families
import unet_families
import video_families

FAMILIES = [
    family
    for module in (video_families, picture_families, audio_families, unet_families, other_families)
    for family in module.FAMILIES
]

# Transformers and UNets of diffusers that are not built here, and why.
NOT_BUILT = {
    "Cosmos3OmniTransformer": "its pipeline packs text, video and sound into index tensors that were not rebuilt here",
    "MotionAdapter": "holds weights for UNetMotionModel and has no forward of its own",
    "RFD4ProteinaTransformer": "of proteins: attention with a bias of residue pairs, over features of a pipeline",
    "SanaWMTransformer3DModel": "takes camera rays and masks of its pipeline; its self-attention is mostly linear",
    "WanAnimate2Transformer3DModel": "cannot run without the caches of keys and values that its pipeline makes",
}


@functools.cache
def missing_package(library: str) -> str | None:
    """Why a library cannot be imported here; None where it can."""
    try:
        importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        # timm needs torchvision, whose wheels on PyPI are for another build of torch than the CPU one.
        return f"{library} does not import here: {error}"
    return None


def class_names() -> set[str]:
    """The classes of diffusers that are covered."""
    return {family.name.partition(" ")[0] for family in FAMILIES if family.library == "diffusers"}
