"""`Family`: a model class of another library, small and with random weights, and what must become of its attention.

Every picture or video has at least 32 tokens and every text at most 16, so that with a minimal length of 24 the same
sites are eligible as in the real model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

TEXT, TEXT_WIDTH = 16, 32


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model and the expectations.

    Args:
        name: of the class, and what is special about it in brackets.
        library: the package it comes from, as it is imported.
        make: gives the model and its keyword inputs.
        converted: how many attention sites become SLA2.
        dense: how many stay dense, by kind: "short" (fewer than 24 tokens; cross-attention to text), "bias", "mask",
            "causal", "head dim".
        tokens: what is read of the sequences of converted sites, each in their order: numbers are text, `3x4x4` is
            the grid of the video or picture, `?` an unknown one, `-` where queries and keys are not the same tokens.
        outside: calls of scaled_dot_product_attention that Dynamo leaves to Python.
        other_softmaxes: how many are no attention, such as those of mixtures of experts.
        captures_shapes: needs `torch._dynamo.config.capture_dynamic_output_shape_ops` to be one graph.
        no_training: why gradients are not compared; None where they are.
        fast: runs in `make test`.
    """

    name: str
    library: str
    make: Callable[[], tuple[nn.Module, Inputs]]
    converted: int
    dense: dict[str, int] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    outside: int = 0
    other_softmaxes: int = 0
    captures_shapes: bool = False
    no_training: str | None = None
    fast: bool = False


def of_diffusers(
    name: str,
    *,
    config: Inputs,
    inputs: Callable[[], Inputs],
    processor: str | None = None,
    **expected: Any,
) -> Family:
    """A class of diffusers.

    Args:
        name: what follows the class in brackets is a remark.
        config: keyword arguments of the class.
        inputs: makes the keyword inputs.
        processor: the attention processor to use in place of the default one.
        **expected: fields of `Family`.
    """

    def make() -> tuple[nn.Module, Inputs]:
        import diffusers

        model = getattr(diffusers, name.partition(" ")[0])(**config)
        if processor is not None:
            model.set_attn_processor(getattr(diffusers.models.attention_processor, processor)())
        return model, inputs()

    return Family(name=name, library="diffusers", make=make, **expected)


# What inputs are made of.


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def long(*values: int) -> Tensor:
    return torch.tensor(values)


def text(num_tokens: int = TEXT, width: int = TEXT_WIDTH) -> Tensor:
    return noise(1, num_tokens, width)


def real(num_tokens: int, of: int = TEXT) -> Tensor:
    """(1, of) padding mask with `num_tokens` real tokens."""
    return (torch.arange(of) < num_tokens)[None]


def image(channels: int = 4, size: int = 16) -> Tensor:
    return noise(1, channels, size, size)


def video(channels: int = 4, size: int = 8) -> Tensor:
    """(1, channels, 3 frames, size, size): 48 tokens in patches of 2 x 2."""
    return noise(1, channels, 3, size, size)


# What configurations share.

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = (4, 6, 6)
