"""Every user error is a ValueError or TypeError that names the argument, what was expected, what came and a remedy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import BLOCKS
from torch import Tensor

from sla2_compile import SLA2Config, attention


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q = zeros(2, 4, 40, 16)
KEYS = zeros(2, 2, 40, 16)
REAL = torch.ones(2, 1, 1, 40, dtype=torch.bool)
EYE = torch.eye(16)

WRONG_ARGUMENTS: dict[str, tuple[str, type[Exception], dict[str, Any]]] = {
    # Kinds
    "q is an array": ("q", TypeError, {"q": np.zeros((2, 4, 40, 16))}),
    "k is None": ("k", TypeError, {"k": None}),
    "v is a list": ("v", TypeError, {"v": [1.0]}),
    "mask is a list": ("attn_mask", TypeError, {"attn_mask": [True] * 40}),
    "logit is a number": ("alpha_logit", TypeError, {"alpha_logit": 0.5}),
    "gain is a number": ("alpha_gain", TypeError, {"alpha_gain": 1}),
    "scale is text": ("scale", TypeError, {"scale": "auto"}),
    "enable_gqa is text": ("enable_gqa", TypeError, {"enable_gqa": "yes"}),
    "config is a dict": ("config", TypeError, {"config": {"sparsity": 0.5}}),
    "router is one tensor": ("router", TypeError, {"router": EYE}),
    "router has three parts": ("router", TypeError, {"router": (EYE, EYE, EYE)}),
    "router holds numbers": ("router", TypeError, {"router": (1, 2)}),
    # Dtypes and devices
    "integers": ("q", TypeError, {name: zeros(2, 4, 40, 16, dtype=torch.int64) for name in "qkv"}),
    "complex numbers": ("q", TypeError, {name: zeros(2, 4, 40, 16, dtype=torch.complex64) for name in "qkv"}),
    "8 bits": ("q", TypeError, {name: zeros(2, 4, 40, 16, dtype=torch.float8_e4m3fn) for name in "qkv"}),
    "k in another dtype": ("k", TypeError, {"k": Q.bfloat16()}),
    "v in another dtype": ("v", TypeError, {"v": Q.double()}),
    "k elsewhere": ("k", ValueError, {"k": Q.to("meta")}),
    "v elsewhere": ("v", ValueError, {"v": Q.to("meta")}),
    "mask elsewhere": ("attn_mask", ValueError, {"attn_mask": REAL.to("meta")}),
    "router elsewhere": ("router", ValueError, {"router": (EYE, EYE.to("meta"))}),
    "logit elsewhere": ("alpha_logit", ValueError, {"alpha_logit": zeros(4, 1, device="meta")}),
    "gain elsewhere": ("alpha_gain", ValueError, {"alpha_gain": zeros(4, device="meta")}),
    "router of integers": ("router", TypeError, {"router": (EYE.long(), EYE)}),
    "logit of integers": ("alpha_logit", TypeError, {"alpha_logit": zeros(4, 1).long()}),
    "gain of booleans": ("alpha_gain", TypeError, {"alpha_gain": zeros(4).bool()}),
    # Shapes
    "q without a batch": ("q", ValueError, {"q": zeros(4, 40, 16)}),
    "k of five dimensions": ("k", ValueError, {"k": zeros(1, 2, 4, 40, 16)}),
    "v without heads": ("v", ValueError, {"v": zeros(2, 40, 16)}),
    "batches differ": ("k", ValueError, {"k": zeros(1, 4, 40, 16), "v": zeros(1, 4, 40, 16)}),
    "head dims differ": ("k", ValueError, {"k": zeros(2, 4, 40, 32), "v": zeros(2, 4, 40, 32)}),
    "v's head dim differs": ("v", ValueError, {"v": zeros(2, 4, 40, 32)}),
    "v's length differs": ("v", ValueError, {"v": zeros(2, 4, 41, 16)}),
    "head dim too small": ("q", ValueError, {name: zeros(2, 4, 40, 8) for name in "qkv"}),
    "head dim too large": ("q", ValueError, {name: zeros(2, 4, 40, 264) for name in "qkv"}),
    "grouped heads without asking": ("k", ValueError, {"k": KEYS, "v": KEYS}),
    "heads that do not divide": (
        "k",
        ValueError,
        {"k": zeros(2, 3, 40, 16), "v": zeros(2, 3, 40, 16), "enable_gqa": True},
    ),
    "no heads to share": ("k", ValueError, {"k": zeros(2, 0, 40, 16), "v": zeros(2, 0, 40, 16), "enable_gqa": True}),
    # Masks
    "additive mask": ("attn_mask", TypeError, {"attn_mask": zeros(2, 1, 1, 40)}),
    "mask of integers": ("attn_mask", TypeError, {"attn_mask": REAL.int()}),
    "mask per query": ("attn_mask", ValueError, {"attn_mask": REAL.expand(2, 1, 40, 40)}),
    "mask per head": ("attn_mask", ValueError, {"attn_mask": REAL.expand(2, 4, 1, 40)}),
    "mask of another batch": ("attn_mask", ValueError, {"attn_mask": REAL[:1].expand(3, 1, 1, 40)}),
    "mask of another length": ("attn_mask", ValueError, {"attn_mask": REAL[..., :39]}),
    "mask of two dimensions": ("attn_mask", ValueError, {"attn_mask": REAL[:, 0, 0]}),
    # Learned state
    "half a router": ("router", ValueError, {"router": (EYE, None)}),
    "the other half of a router": ("router", ValueError, {"router": (None, EYE)}),
    "router per head": ("router", ValueError, {"router": (EYE.expand(4, 16, 16), EYE)}),
    "router of another head dim": ("router", ValueError, {"router": (EYE, torch.eye(32))}),
    "logit per head only": ("alpha_logit", ValueError, {"alpha_logit": zeros(4)}),
    "logit of other heads": ("alpha_logit", ValueError, {"alpha_logit": zeros(2, 1)}),
    "logit of no block": ("alpha_logit", ValueError, {"alpha_logit": zeros(4, 0)}),
    "one gain": ("alpha_gain", ValueError, {"alpha_gain": zeros(1)}),
    "gain per block": ("alpha_gain", ValueError, {"alpha_gain": zeros(4, 1)}),
    "gain with block mixing": (
        "alpha_gain",
        ValueError,
        {"alpha_gain": zeros(4), "config": SLA2Config(mixing="block")},
    ),
    # Settings that do not fit the sequence
    "more exact tokens than keys": (
        "exact_prefix",
        ValueError,
        {"config": SLA2Config(exact_prefix=30, exact_suffix=11)},
    ),
    "grid of another length": ("token_grid", ValueError, {"config": SLA2Config(token_grid=(1, 4, 8))}),
    "grid that leaves no room for text": (
        "token_grid",
        ValueError,
        {"config": SLA2Config(token_grid=(1, 5, 8), exact_prefix=4)},
    ),
    "grid for cross-attention": (
        "token_grid",
        ValueError,
        {"q": zeros(2, 4, 30, 16), "config": SLA2Config(token_grid=(1, 5, 8))},
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_named_with_what_was_expected_what_came_and_a_remedy(wrong: str) -> None:
    name, kind, arguments = WRONG_ARGUMENTS[wrong]
    with pytest.raises(kind) as error:
        attention(**{"q": Q, "k": Q, "v": Q, **arguments})
    # Two arguments may share an error: "exact_prefix and exact_suffix: ...".
    assert re.search(rf"^[^:]*\b{name}\b[^:]*: expected .+, got .+; \S", str(error.value)), str(error.value)


WRONG_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tail": ("tail", {"tail": "none"}),
    "mixing": ("mixing", {"mixing": "head"}),
    "feature map": ("feature_map", {"feature_map": "gelu"}),
    "format of Q K^T": ("qk_format", {"qk_format": "int4"}),
    "format of P V": ("pv_format", {"pv_format": "int8"}),
    "negative sparsity": ("sparsity_units", {"sparsity_units": -1}),
    "sparsity above 1": ("sparsity_units", {"sparsity_units": 1_000_001}),
    "block of queries": ("block_q", {"block_q": 0}),
    "block of keys": ("block_k", {"block_k": 100}),
    "grid of one number": ("token_grid", {"token_grid": [40]}),
    "grid of negative numbers": ("token_grid", {"token_grid": [-1, -5, 8]}),
    "negative prefix": ("exact_prefix", {"exact_prefix": -1}),
    "negative suffix": ("exact_suffix", {"exact_suffix": -1}),
}


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_bare_operator_refuses_settings_that_the_config_refuses(wrong: str, device: str) -> None:
    name, settings = WRONG_SETTINGS[wrong]
    x = zeros(1, 1, 40, 16, device=device)
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+; \w+"):
        torch.ops.sla2.attention(x, x, x, **settings)


def test_errors_inside_torch_compile_say_the_same() -> None:
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="k: expected q's 4 heads, got 2; pass enable_gqa=True"):
        compiled(Q, KEYS, KEYS)


def test_what_fits_is_not_refused() -> None:
    config = SLA2Config(**BLOCKS, token_grid=(2, 3, 5), exact_prefix=6, exact_suffix=4)
    out = attention(
        Q,
        KEYS,
        KEYS,
        attn_mask=REAL[:1],
        scale=1,
        enable_gqa=True,
        router=[EYE, EYE.bfloat16()],  # type: ignore[arg-type]
        alpha_logit=zeros(4, 7, dtype=torch.float64),
        alpha_gain=zeros(4, dtype=torch.bfloat16),
        config=config,
    )
    assert out.dtype == torch.float32
