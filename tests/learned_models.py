"""Models with several kinds of attention owners, and what they should give with learned state: shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL, Attention
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from sla2_compile.backend import build_backend
from sla2_compile.config import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.learned_state import LearnedParameters
from sla2_compile.prepare import owner_state


def compile_aot(model: Any, config: SLA2Config = SMALL, **kwargs: Any) -> Callable[..., Any]:
    """The model under our passes and AOTAutograd, without Inductor's code generation."""
    return torch.compile(model, backend=build_backend(config, aot_eager), **kwargs)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every learned parameter of a prepared model values of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".sla2." in f".{name}":
            parameter.data += torch.randn(parameter.shape, generator=generator)


def parameters(owner: nn.Module, ordinal: int = 0) -> LearnedParameters:
    """The learned parameters of one attention call of an owner that has a single entry per call."""
    state = owner_state(owner)
    (call,) = (call for call in state.settings.calls if call.ordinal == ordinal)
    (entry,) = call.entries
    return state.parameters_of(call, entry)


def with_learned_reference(
    model: nn.Module, states: Sequence[LearnedParameters | None], *args: Any, config: SLA2Config = SMALL, **kwargs: Any
) -> Tensor:
    """What the model gives, eager, with its n-th attention by the reference with the n-th state; None: dense."""
    remaining, dense = list(states), F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        state = remaining.pop(0)
        if state is None:
            return dense(query, key, value, attn_mask)
        learned: dict[str, Any] = {"router": (state.proj_q, state.proj_k), "alpha_logit": state.alpha_logit}
        if config.mixing == "row":
            learned["alpha_gain"] = state.alpha_gain
        return reference.attention(query, key, value, attn_mask=attn_mask, config=config, **learned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        out: Tensor = model(*args, **kwargs)
    assert not remaining
    return out


class CalledTwice(nn.Module):
    """One attention module that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x + self.attention(x))


class TwoSites(Attention):
    """One module with two attention calls, the second over its context, given by keyword."""

    def forward(self, *, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + super().forward(x), context)
