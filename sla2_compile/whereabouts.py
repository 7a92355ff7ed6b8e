"""Where in a model the attention is that runs: the place of a compiled graph, and calls that no graph holds.

After a graph break, and where parts of a model are compiled on their own, Dynamo names modules from the function that
it compiles (`attn1`), and blocks of the same code share one graph. What tells them apart are the parameters that come
in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sla2_compile.passes.find_attention import ROOT_NAME, module_path

_SDPA = "aten::scaled_dot_product_attention"
_IN_GRAPH = "sla2: attention of a graph"


def owners(model: Callable[..., Any]) -> dict[int, str]:
    """The path of the module that owns each parameter and buffer of a model, by the tensor's id."""
    if not isinstance(model, nn.Module):
        return {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {id(x): name.rpartition(".")[0] for name, x in tensors}


def place_of_graph(gm: GraphModule, args: Sequence[Any], owner_of: dict[int, str]) -> str:
    """The path in the model of what a graph names its modules from; empty for the model itself.

    Args:
        gm: the graph.
        args: what it is called with, parameters included.
        owner_of: of `owners`.
    """
    votes: Counter[str] = Counter()
    for placeholder, arg in zip(gm.graph.find_nodes(op="placeholder"), args, strict=False):
        owner = owner_of.get(id(arg)) if isinstance(arg, Tensor) else None
        if owner is None:
            continue
        for path in {module_path(user) for user in placeholder.users}:
            if path == ROOT_NAME:
                # The function itself reads the parameter: perhaps as its owner, perhaps from afar.
                votes[owner] += 1
            elif f".{owner}".endswith(f".{path}"):
                votes[owner.removesuffix(path).removesuffix(".")] += 1000
    return votes.most_common(1)[0][0] if votes else ""


def full_name(place: str, name: str) -> str:
    """The name of a site of a graph, in the model: `attn1` at `blocks.0` is `blocks.0.attn1`."""
    own, hash_sign, ordinal = name.partition("#")
    parts = [part for part in (place, own) if part and part != ROOT_NAME]
    return (".".join(parts) or ROOT_NAME) + hash_sign + ordinal


@dataclass
class Outside:
    """Calls of F.scaled_dot_product_attention that ran in no compiled graph.

    Args:
        num_calls: how many.
        reasons: what Dynamo said of its graph breaks meanwhile, one line each.
    """

    num_calls: int = 0
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        times = "once" if self.num_calls == 1 else f"{self.num_calls} times"
        said = "".join(["Dynamo says:", *(f"\n  {reason}" for reason in self.reasons)]) if self.reasons else ""
        return (
            f"scaled_dot_product_attention ran {times} outside of every compiled graph, where no backend sees it; a "
            f"graph break in a loop leaves all of a function to Python. {said}"
        )


@contextmanager
def watch_outside() -> Iterator[Outside]:
    """Count attention that runs, inside the context, neither in a graph's site (`in_graph`) nor while tracing."""
    # Loaded here: Dynamo imports optional packages that it finds.
    counters = torch._dynamo.utils.counters
    outside, before = Outside(), Counter(counters["graph_break"])
    with torch.autograd.profiler.profile() as profile:
        yield outside
    for event in profile.function_events:
        if event.name == _SDPA and not _is_expected(event):
            outside.num_calls += 1
    outside.reasons = [_one_line(text) for text in Counter(counters["graph_break"]) - before]


def in_graph() -> torch.profiler.record_function:
    """The context in which the sites of a graph run."""
    return torch.profiler.record_function(_IN_GRAPH)


def _is_expected(event: Any) -> bool:
    while event is not None:
        # Dynamo, too, calls attention, with fake tensors.
        if event.name == _IN_GRAPH or event.name.endswith("(dynamo_timed)"):
            return True
        event = event.cpu_parent
    return False


def _one_line(text: str) -> str:
    """The title of a graph break and its hint where that names a setting."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    hints = [line.removeprefix("Hint: ") for line in lines if "torch._dynamo.config" in line]
    return "; ".join(lines[:1] + hints[:1])
