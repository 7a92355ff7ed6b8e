"""What is checked of every model family: what is converted, and that at sparsity 0 nothing but speed can change."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from family import Family
from tolerances import MODEL_GRADIENT, MODEL_OUTPUT, relative_error
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from sla2_compile.config import SLA2Config
from sla2_compile.passes.find_attention import ROOT_NAME
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.read_node import op_name
from sla2_compile.passes.sites import Site

# Text of 16 tokens is too short, a picture of 32 is not. At sparsity 0 the op is dense attention.
CONFIG = SLA2Config(sparsity=0, block_q=16, block_k=16, min_seq_len=24)
NOTHING = SLA2Config(sparsity=0, min_seq_len=1 << 40)

_KINDS = {
    "fewer than min_seq_len": "short", "additive mask or bias": "bias", "a mask of shape": "mask",
    "head dim": "head dim", "causal": "causal", "a block mask": "block mask",
}  # fmt: skip


@dataclass
class Coverage:
    """What became of one family's attention.

    Args:
        sites: all of them, in the order of the graphs.
        num_graphs: how many graphs the model fell into.
        other_softmaxes: softmaxes over three dimensions or more that belong to no site.
        outside: calls of scaled_dot_product_attention that no graph held.
        output_error: largest relative L2 error of an output at sparsity 0.
        gradient_error: the same of the gradient of a parameter.
    """

    sites: list[Site] = field(default_factory=list)
    num_graphs: int = 0
    other_softmaxes: int = 0
    outside: int = 0
    output_error: float = 0.0
    gradient_error: float = 0.0

    @property
    def num_converted(self) -> int:
        return sum(site.verdict == "sla2" for site in self.sites)

    @property
    def reasons(self) -> Counter[str]:
        """Why sites stay dense."""
        return Counter(site.reason for site in self.sites if site.verdict == "dense")

    @property
    def dense(self) -> Counter[str]:
        """The same by kind."""
        kinds: Counter[str] = Counter()
        for reason, count in self.reasons.items():
            kinds[next((kind for text, kind in _KINDS.items() if text in reason), reason)] += count
        return kinds

    @property
    def tokens(self) -> set[str]:
        """What was read of the sequences of converted sites, as `Family.tokens` writes it."""
        return {describe_tokens(site) for site in self.sites if site.verdict == "sla2"}


def describe_tokens(site: Site) -> str:
    config = site.config
    assert config is not None
    unknown = "?" if site.q_shape[2] == site.kv_len else "-"
    grid = "x".join(map(str, config.token_grid)) if config.token_grid else unknown
    parts = [config.exact_prefix or "", grid, config.exact_suffix or ""]
    return " + ".join(str(part) for part in parts if part)


def check_family(family: Family) -> Coverage:
    """Compile a family's model at sparsity 0 and compare it with what it is eager, and with its expectations."""
    torch.manual_seed(0)
    model, inputs = family.make()
    model.eval()
    randomise(model)
    coverage = Coverage()
    with CountAttention() as eager, torch.set_grad_enabled(family.no_training is None):
        expected = floats(model(**inputs))
    coverage.outside = eager.num_calls
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=functools.partial(_compile, coverage), dynamic=False)
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=family.captures_shapes),
        torch.set_grad_enabled(family.no_training is None),
    ):
        out = floats(compiled(**inputs))
    coverage.output_error = max(relative_error(x, y) for x, y in zip(out, expected, strict=True))
    assert coverage.output_error < MODEL_OUTPUT, coverage.output_error
    if family.no_training is None:
        coverage.gradient_error = _compare_gradients(gradients(model, out), gradients(model, expected))
        assert coverage.gradient_error < MODEL_GRADIENT, coverage.gradient_error
    _assert_named(coverage, model)
    assert coverage.num_converted == family.converted, coverage.reasons
    assert coverage.dense == family.dense, coverage.reasons
    assert coverage.tokens == set(family.tokens), coverage.tokens
    assert coverage.outside == family.outside, coverage.outside
    assert coverage.other_softmaxes == family.other_softmaxes, coverage.other_softmaxes
    return coverage


def _assert_named(coverage: Coverage, model: nn.Module) -> None:
    """Sites have the paths of modules; in a part of a broken model, from where that part begins."""
    paths = [path for path, _ in model.named_modules()]
    for name in (site.name.partition("#")[0] for site in coverage.sites):
        is_end = any(path.endswith(f".{name}") for path in paths) or name == ROOT_NAME
        assert name in paths or (is_end and coverage.num_graphs > 1), f"{name} is no module of the model"


def _compile(coverage: Coverage, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    before = _text(gm)
    convert(gm, NOTHING)
    assert _text(gm) == before, "a graph in which nothing is converted changed"
    originals = {node: (node.target, node.args, dict(node.kwargs)) for node in _nodes(gm)}
    softmaxes = {node for node in originals if op_name(node) == "softmax" and node.meta["example_value"].dim() > 2}
    sites = convert(gm, CONFIG)
    for site in sites:
        if site.verdict == "dense":
            chain = [] if site.proposal is None else site.proposal.chain
            for node in (site.node, *chain):
                _assert_untouched(node, *originals[node])
        softmaxes -= set() if site.proposal is None else set(site.proposal.chain)
    coverage.sites += sites
    coverage.num_graphs += 1
    coverage.other_softmaxes += len(softmaxes)
    num_calls = sum(site.proposal is None for site in sites)
    compiled = aot_eager_decomp_partition(gm, example_inputs)

    def run(*args: Any) -> Any:
        coverage.outside -= num_calls
        return compiled(*args)

    return run


def _text(gm: GraphModule) -> list[str]:
    return [str(module.graph) for module in gm.modules() if isinstance(module, GraphModule)]


def _nodes(gm: GraphModule) -> list[Node]:
    return [node for module in gm.modules() if isinstance(module, GraphModule) for node in module.graph.nodes]


def _assert_untouched(node: Node, target: Any, args: Any, kwargs: Any) -> None:
    """A dense site computes what it did, from the same nodes or from what took the place of converted attention."""

    def without_nodes(x: Any) -> str:
        return str(map_arg(x, lambda _: "node"))  # type: ignore[arg-type, return-value]

    def inputs(x: Any) -> list[Node]:
        found: list[Node] = []
        map_arg(x, found.append)  # type: ignore[arg-type]
        return found

    assert not node._erased, f"{node} is dense and gone"
    assert node.target is target, f"{node} is dense and changed"
    assert without_nodes((node.args, node.kwargs)) == without_nodes((args, kwargs)), f"{node} is dense and changed"
    for now, then in zip(inputs((node.args, node.kwargs)), inputs((args, kwargs)), strict=True):
        assert now is then or then._erased, f"{node} reads {now} in place of {then}"


class CountAttention(TorchFunctionMode):
    """Counts the calls of F.scaled_dot_product_attention."""

    num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def randomise(model: nn.Module) -> None:
    """Random weights everywhere: what starts at zero would hide what lies behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, max(parameter.shape[1:].numel(), 1) ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return floats(list(output.values()))
    if isinstance(output, (tuple, list)):
        return [x for item in output for x in floats(item)]
    if dataclasses.is_dataclass(output):
        return floats([getattr(output, item.name) for item in dataclasses.fields(output)])
    return floats(list(vars(output).values())) if hasattr(output, "__dict__") and output is not None else []


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradient of the mean square of all outputs, by parameter."""
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    loss = torch.stack([x.float().square().mean() for x in outputs if x.requires_grad]).sum()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


def _compare_gradients(grads: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Largest relative L2 error of a parameter's gradient."""
    # A gradient that is zero for certain may be None in either.
    pairs = [
        [torch.zeros(1) if x is None or not x.numel() else x for x in (grads[name], expected[name])] for name in grads
    ]
    # Below this, both are what rounding left of sums that cancel.
    floor = 1e-6 * max(y.norm().item() for _, y in pairs)
    return max(relative_error(x, y) for x, y in pairs if max(x.norm().item(), y.norm().item()) > floor)
