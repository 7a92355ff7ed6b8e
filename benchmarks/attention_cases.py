"""What `attention.py` measures: shapes, variants of the op, what each preset covers, and the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.rivals import CUDNN, FLASH
from sla2_compile.config import SLA2Config

Shape = tuple[int, int, int, int]

SPARSITY = 0.97
SMALL, LARGE = "480p", "720p"
SHAPES: dict[str, Shape] = {SMALL: (1, 12, 32760, 128), LARGE: (1, 40, 75600, 128)}
TINY_SHAPES: dict[str, Shape] = {SMALL: (1, 2, 200, 32), LARGE: (1, 2, 264, 32)}

FORMS: dict[str, dict[str, Any]] = {
    "pooled, row": {"tail": "pooled", "mixing": "row"},
    "linear, block": {"tail": "linear", "mixing": "block"},
}
# Frames, height and width of the tokens of these lengths.
GRIDS = {32760: (21, 30, 52), 75600: (21, 45, 80)}
# What models that were calibrated, or have a video's token grid, use beside the plain forms: no target names them.
OPTIONS = ("3D tiles", "learned gain", "3D tiles, learned gain")
PLAIN = "16-bit"
FORMATS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "qk int8": {"qk_format": "int8"},
    "qk fp8": {"qk_format": "fp8"},
    "qk int8, pv fp8": {"qk_format": "int8", "pv_format": "fp8"},
    "qk fp8, pv fp8": {"qk_format": "fp8", "pv_format": "fp8"},
}
LOW_BIT = tuple(name for name in FORMATS if name != PLAIN)
FASTEST_EXPECTED = "qk fp8"

# The shapes of the sweep over N have the heads of the small shape.
NEVER_SLOWER_SPARSITY, NEVER_SLOWER_LENGTH = 0.9, 8192
MAX_MEMORY_RATIO = 1.5
MAX_FIRST_CALL_S = 60.0


@dataclass(frozen=True)
class Preset:
    """What a run covers. `budget_s` is per timed function; `limit_s` for the whole run."""

    shapes: tuple[str, ...]
    training_shapes: tuple[str, ...]
    formats: tuple[str, ...]
    lengths: tuple[int, ...]
    sparsities: tuple[float, ...]
    budget_s: float
    limit_s: float


PRESETS = {
    "quick": Preset(
        (SMALL, LARGE),
        (SMALL,),
        (PLAIN, "qk int8", FASTEST_EXPECTED, "qk fp8, pv fp8"),
        (8192, 32768),
        (0.9, 0.97),
        0.3,
        300,
    ),
    "full": Preset(
        (SMALL, LARGE),
        (SMALL, LARGE),
        tuple(FORMATS),
        (4096, 8192, 16384, 32768, 65536, 131072, 262144),
        (0.5, 0.75, 0.85, 0.9, 0.95, 0.97),
        0.5,
        500,
    ),
}
TINY = Preset((SMALL, LARGE), (SMALL,), (PLAIN, FASTEST_EXPECTED), (128,), (0.5,), 0.0, 60)


@dataclass(frozen=True)
class Target:
    """A speed that must be reached: at least these ratios, in one run, in each form of the op."""

    section: str
    shape: str
    low_bit: bool
    min_ratios: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        return f"{self.shape} {self.section}, {'best low-bit' if self.low_bit else PLAIN}"


FORWARD, TRAINING = "forward", "forward + backward"
TARGETS = (
    Target(FORWARD, SMALL, False, ((FLASH, 24), (CUDNN, 14))),
    Target(FORWARD, SMALL, True, ((FLASH, 30), (CUDNN, 17))),
    Target(FORWARD, LARGE, False, ((FLASH, 30), (CUDNN, 17))),
    Target(FORWARD, LARGE, True, ((FLASH, 42), (CUDNN, 24))),
    Target(TRAINING, SMALL, False, ((FLASH, 18), (CUDNN, 10))),
)


def sla2_name(form: str, number_format: str) -> str:
    return f"SLA2 {form}, {number_format}"


def config_of(form: str, number_format: str, sparsity: float = SPARSITY) -> SLA2Config:
    return SLA2Config(sparsity=sparsity, **FORMS[form], **FORMATS[number_format])


def option_config(option: str, shape: Shape) -> SLA2Config | None:
    """The config of an option in the first form; None where the shape has no grid of tokens."""
    tiles = "3D tiles" in option
    if tiles and shape[2] not in GRIDS:
        return None
    return SLA2Config(sparsity=SPARSITY, **FORMS["pooled, row"], token_grid=GRIDS[shape[2]] if tiles else None)
