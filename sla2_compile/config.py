"""All settings of SLA2 attention, in one frozen dataclass checked when it is made.

The fields are also the keys of ``torch.compile(model, backend="sla2", options={...})``. Notation and equations:
"SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

FeatureMap = Literal["softmax", "elu", "relu"]
QKFormat = Literal["int8", "fp8"]
PVFormat = Literal["fp8"]
Tail = Literal["pooled", "linear"]
Mixing = Literal["row", "block"]

# Sparsity is carried through the op as an integer number of these, so that the number of kept blocks is exact integer
# arithmetic for plain and for symbolic lengths alike.
SPARSITY_UNIT = 1_000_000

_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class SLA2Config:
    """Settings of one SLA2 attention, or of every one that the backend converts.

    Args:
        sparsity: fraction of key blocks that skip the exact (sparse) branch, in [0, 1). 0 keeps all: dense attention.
        block_q: query tokens per block.
        block_k: key tokens per block.
        feature_map: phi of the linear tail, applied over the head dimension.
        qk_format: number format of Q K^T in the sparse branch and a pooled tail; None is the inputs' own.
        pv_format: number format of P V in the sparse branch, and in a pooled tail where both formats are "fp8"; None is
            the inputs' own. Where qk_format is set and either is "fp8", the kernels for Hopper hold a linear tail's
            states in FP8 as well, at head dim 128: sums over tails are then off by about 1 %.
        fake_quant: round to the formats but compute in wider arithmetic, which any device can, instead of with the
            device's low-bit kernels. Gradients are the same.
        tail: what stands for the blocks that are not kept: softmax over their means ("pooled") or linear attention.
        mixing: weight of the sparse branch: from each row's own probability mass ("row") or a logit per block.
        token_grid: (frames, height, width) of the video part of the sequence; its tokens are then visited in
            4 x 4 x 4 tiles. None keeps the model's order.
        min_seq_len: the backend leaves attention over fewer tokens dense.
        exact_prefix: tokens at the start of the sequence that stay exact (text).
        exact_suffix: tokens at its end that stay exact.
        infer_layout: where exact_prefix and exact_suffix are 0, or token_grid is None, take what the graph shows: the
            length of the text that is joined with a video or picture, and the grid its tokens come from.
        site_sparsity: sparsity by pattern of site names, {"blocks.0.*": 0.5}; the first pattern that matches decides,
            and sites that none matches have `sparsity`.
        include: patterns (fnmatch) of site names to convert; empty means all.
        exclude: patterns of site names to leave dense.
        strict: raise where a site that was asked for cannot be converted, instead of leaving it dense.

    Raises:
        ValueError: a value out of range, naming the field, what was expected, what came and what to do.
        TypeError: a value of the wrong type, likewise.
    """

    sparsity: float = 0.75
    block_q: int = 128
    block_k: int = 64
    feature_map: FeatureMap = "softmax"
    qk_format: QKFormat | None = None
    pv_format: PVFormat | None = None
    fake_quant: bool = False
    tail: Tail = "pooled"
    mixing: Mixing = "row"
    token_grid: tuple[int, int, int] | None = None
    min_seq_len: int = 2048
    exact_prefix: int = 0
    exact_suffix: int = 0
    infer_layout: bool = True
    site_sparsity: tuple[tuple[str, float], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        for name in ("block_q", "block_k"):
            _check_int(self, name, "a power of two from 16 to 256", _BLOCK_SIZES, "the defaults are 128 and 64")
        _check_int(self, "min_seq_len", "an integer >= 0", None, "0 converts attention of any length")
        for name in ("exact_prefix", "exact_suffix"):
            _check_int(self, name, "an integer >= 0", None, "0 keeps no token exact")
        _check_choice(self, "feature_map", get_args(FeatureMap), "the paper's is 'softmax'")
        _check_choice(self, "qk_format", (None, *get_args(QKFormat)), "None computes in the inputs' own format")
        _check_choice(self, "pv_format", (None, *get_args(PVFormat)), "None computes in the inputs' own format")
        _check_choice(self, "fake_quant", (False, True), "True rounds to the formats without low-bit kernels")
        _check_choice(self, "tail", get_args(Tail), "the default is 'pooled', the paper's is 'linear'")
        _check_choice(self, "mixing", get_args(Mixing), "the default is 'row', the paper's is 'block'")
        _check_choice(self, "strict", (False, True), "True raises where a site cannot be converted")
        _check_choice(self, "infer_layout", (False, True), "False takes only what is given")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _as_patterns(name, getattr(self, name)))
        object.__setattr__(self, "site_sparsity", _as_site_sparsity(self.site_sparsity))
        object.__setattr__(self, "token_grid", _as_grid(self.token_grid))

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> SLA2Config:
        """The config for torch.compile's ``options``; an unknown key is a ValueError that lists the known ones."""
        if options is not None and not isinstance(options, Mapping):
            _fail(TypeError, "options", "a mapping of settings", options, 'for example {"sparsity": 0.97}')
        options = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known), key=str)
        if unknown:
            raise ValueError(
                f"options: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; "
                f"expected any of {', '.join(known)}; a mode of Inductor's is given as mode=..., or here as mode"
            )
        return cls(**options)

    @property
    def sparsity_units(self) -> int:
        """The sparsity in millionths, as the op takes it."""
        return round(self.sparsity * SPARSITY_UNIT)


def _fail(kind: type[Exception], name: str, expected: str, got: object, remedy: str) -> NoReturn:
    raise kind(f"{name}: expected {expected}, got {got!r}; {remedy}")


def _as_site_sparsity(value: Any) -> tuple[tuple[str, float], ...]:
    expected, remedy = "a mapping of site-name patterns to sparsities", 'for example {"blocks.0.*": 0.5}'
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        _fail(TypeError, "site_sparsity", expected, value, remedy)
    for pattern, sparsity in pairs:
        if not isinstance(pattern, str):
            _fail(TypeError, "site_sparsity", expected, value, remedy)
        _check_sparsity(sparsity)
    return pairs


def _check_sparsity(value: Any) -> None:
    expected, remedy = "a fraction in [0, 1)", "0.97 skips 97 % of the blocks"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(TypeError, "sparsity", expected, value, remedy)
    if not 0 <= value < 1:
        _fail(ValueError, "sparsity", expected, value, remedy)


def _check_int(config: SLA2Config, name: str, expected: str, choices: tuple[int, ...] | None, remedy: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(TypeError, name, expected, value, remedy)
    if value < 0 if choices is None else value not in choices:
        _fail(ValueError, name, expected, value, remedy)


def _check_choice(config: SLA2Config, name: str, choices: tuple[Any, ...], remedy: str) -> None:
    value = getattr(config, name)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        _fail(ValueError, name, f"one of {', '.join(map(repr, choices))}", value, remedy)


def _as_patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(pattern, str) for pattern in patterns):
        _fail(TypeError, name, "site-name patterns", value, "for example ('blocks.*.attn1',)")
    return patterns


def _as_grid(value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and len(value) == 3:
        frames, height, width = value
        if all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value):
            return frames, height, width
    expected = "three positive integers (frames, height, width)"
    _fail(ValueError, "token_grid", expected, value, "count tokens, after patching; None keeps the model's order")
