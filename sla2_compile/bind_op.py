"""The marker `sla2::bind`: an identity through which learned state enters a traced graph as ordinary inputs.

`prepare` makes the module that owns an attention pass its input through it, and `passes/bind_state.py` moves the state
from the marker onto the attention it belongs to. Everyone else sees no operator at all: it is composite, returns its
first argument itself, and disappears where a graph is lowered to ATen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

_library = torch.library.Library("sla2", "FRAGMENT")
_library.define("bind(Tensor(a) x, Tensor[] state, str settings, str name) -> Tensor(a)")


def _bind(x: Tensor, state: list[Tensor], settings: str, name: str) -> Tensor:
    return x


_library.impl("bind", _bind, "CompositeImplicitAutograd")

# Its output may be unused where the model ignores the marked input; the state on it must reach the pass all the same.
has_side_effect(torch.ops.sla2.bind.default)
