"""`explain`: every attention site of a model with its verdict, the reason, and what SLA2 would do there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

import sla2_compile.ops  # noqa: F401  (registers the operators)
from sla2_compile.config import SLA2Config
from sla2_compile.dry_run import with_own_code, without_trace
from sla2_compile.kernels.blocked_routing import kept_block_mask
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.passes.decide import check_patterns
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site, size_hint
from sla2_compile.whereabouts import Outside, full_name, in_graph, owners, place_of_graph, watch_outside


@dataclass
class SiteReport:
    """What `explain` found at one site.

    Args:
        site: the site and what was decided.
        name: where in the model it is; `site.name` is what patterns match, and differs where a graph is a part.
        mask: (M, T) share of the heads that keep each key block, from the first batch element of the example input;
            None where the site stays dense or the tensors hold no data.
        measured_sparsity: fraction of the block pairs with real keys that were skipped; None likewise.
        num_calls: how often it ran in one call of the model.
    """

    site: Site
    name: str
    mask: Tensor | None = None
    measured_sparsity: float | None = None
    num_calls: int = 0

    def to_dict(self) -> dict[str, Any]:
        site = self.site
        delivered = site.delivered_sparsity if self.measured_sparsity is None else self.measured_sparsity
        return {
            "name": self.name,
            "pattern_name": site.name,
            "verdict": site.verdict,
            "reason": ", ".join(part for part in (site.reason, site.formats) if part),
            "q_shape": tuple(size_hint(size) for size in site.q_shape),
            "kv_len": size_hint(site.kv_len),
            "requested_sparsity": site.requested_sparsity,
            "delivered_sparsity": delivered,
            "flops_dense": site.flops_dense,
            "flops_sla2": site.flops_sla2,
            "num_calls": self.num_calls,
        }


@dataclass
class Report:
    """The attention sites of a model in the order of execution. Prints as a table.

    Args:
        sites: one for each site of each compiled graph and each place in the model that the graph serves.
        outside: attention that ran in no compiled graph.
    """

    sites: list[SiteReport] = field(default_factory=list)
    outside: Outside = field(default_factory=Outside)

    def to_dict(self) -> dict[str, Any]:
        """`{"sites": [...], "num_calls_outside": 0}`, each site a dict of plain values.

        Keys: name, pattern_name (what include and exclude match), verdict ("sla2" or "dense"), reason, q_shape
        (B, H, N, D), kv_len, requested_sparsity, delivered_sparsity, flops_dense, flops_sla2 (both of one call,
        forward), num_calls.
        """
        return {"sites": [site.to_dict() for site in self.sites], "num_calls_outside": self.outside.num_calls}

    def __str__(self) -> str:
        from sla2_compile.report import report_table

        table = report_table(self.to_dict()["sites"])
        return f"{table}\n{self._note()}" if self._note() else table

    def to_html(self) -> str:
        """A page with the table and a picture of every converted site's block mask; needs the extra `report`."""
        from sla2_compile.report import report_page

        return report_page(self.to_dict()["sites"], [site.mask for site in self.sites], self._note())

    def _note(self) -> str:
        return str(self.outside) if self.outside.num_calls else ""


def explain(model: Callable[..., Any], *args: Any, config: SLA2Config | None = None, **kwargs: Any) -> Report:
    """Say what `torch.compile(model, backend="sla2")` would do with each attention of the model, and why.

    Runs the model once on the inputs, without gradients, with converted attention in place; weights, buffers and random
    states stay as they are. Models and inputs on the meta device work too and give
    everything but the pictures.

    Args:
        model: a module or function, not compiled or compiled.
        *args: its inputs.
        config: settings, as the backend's options; None is `SLA2Config()`.
        **kwargs: its keyword inputs.

    Returns:
        The report: `print(report)`, `report.to_dict()`, `report.to_html()`.

    Raises:
        ValueError: a pattern of the config that matches no site; under `config.strict`, where a site that was asked for
            cannot be converted.
    """
    report = Report()
    settings = SLA2Config() if config is None else config
    uncompiled = getattr(model, "_orig_mod", model)
    owner_of = owners(uncompiled)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return _ExplainedGraph(gm, settings, report, owner_of)

    with without_trace(uncompiled), watch_outside() as report.outside:
        torch.compile(with_own_code(uncompiled), backend=backend, dynamic=False)(*args, **kwargs)
    check_patterns([found.site.name for found in report.sites], settings)
    return report


class _ExplainedGraph:
    """A graph whose sites note in the report what happens at every place that the graph serves."""

    def __init__(self, gm: GraphModule, config: SLA2Config, report: Report, owner_of: dict[int, str]) -> None:
        self.gm, self.report, self.owner_of = gm, report, owner_of
        self.sites = convert(gm, config)
        self.found: dict[str, list[SiteReport]] = {}
        self.place = ""
        for i, site in enumerate(self.sites):
            if site.verdict == "sla2":
                _replace(site.node, functools.partial(self.run_sla2, i))
            else:
                _replace(site.node, functools.partial(self.run_dense, i, _callable(site.node)))
            site.owner.recompile()

    def __call__(self, *args: Any) -> Any:
        self.place = place_of_graph(self.gm, args, self.owner_of)
        if self.place not in self.found:
            found = [SiteReport(site, full_name(self.place, site.name)) for site in self.sites]
            self.found[self.place] = found
            self.report.sites += found
        return self.gm(*args)

    def run_dense(self, index: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.found[self.place][index].num_calls += 1
        with in_graph():
            return function(*args, **kwargs)

    def run_sla2(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Run the op of a site and keep what its router chose."""
        report = self.found[self.place][index]
        report.num_calls += 1
        with _KeptBlocks() as recorder, in_graph():
            out = torch.ops.sla2.attention(*args, **kwargs)
        kept = recorder.kept
        if report.mask is None and kept is not None and kept.device.type != "meta":
            config = report.site.config
            assert config is not None
            mask = kept_block_mask(kept, num_blocks(args[1].shape[2], config.block_k))
            report.mask = mask[0].float().mean(0).cpu()
            report.measured_sparsity = _measured_sparsity(mask, args[3], config.block_k)
        return out


def _callable(node: Node) -> Callable[..., Any]:
    """What a node calls, as a function of its arguments."""
    if node.op == "call_method":
        method = str(node.target)
        return lambda x, *args, **kwargs: getattr(x, method)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _replace(node: Node, function: Callable[..., Any]) -> None:
    # FX writes a function by its name, which a partial lacks.
    node.op, node.target = "call_function", functools.update_wrapper(function, _replace)


def _measured_sparsity(mask: Tensor, attn_mask: Tensor | None, block_k: int) -> float:
    """Share of the pairs with a real key that `mask` (B, H, M, T) does not keep."""
    is_real = torch.ones_like(mask)
    if attn_mask is not None:
        missing = -attn_mask.shape[3] % block_k
        padded = torch.nn.functional.pad(attn_mask, (0, missing))
        is_real = padded.unflatten(3, (-1, block_k)).any(-1).expand_as(mask)
    return 1 - ((mask & is_real).sum() / is_real.sum().clamp(min=1)).item()


class _KeptBlocks(TorchDispatchMode):
    """Catches the choice of kept blocks that the op makes inside."""

    kept: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.sla2.attention_forward.default:
            self.kept = out[4]
        return out
