"""The passes in order. Everything the project does to a model's graph goes through `convert`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from torch.fx import GraphModule

from sla2_compile.config import SLA2Config
from sla2_compile.passes.absorb_layout import absorb_layout
from sla2_compile.passes.decide import decide
from sla2_compile.passes.find_attention import find_attention
from sla2_compile.passes.rewrite_attention import rewrite_attention
from sla2_compile.passes.sites import Site

log = logging.getLogger("sla2_compile")

# What runs on the sites that were found and decided, in this order.
SITE_PASSES = (rewrite_attention, absorb_layout)


def convert(gm: GraphModule, config: SLA2Config) -> list[Site]:
    """Rewrite the attention of `gm` in place.

    Args:
        gm: a torch-level graph, as Dynamo hands it to a backend.
        config: the user's settings.

    Returns:
        Every attention site that was found, converted or not.

    Raises:
        ValueError: under `config.strict`, where a site that was asked for cannot be converted.
    """
    sites = find_attention(gm)
    decide(sites, config)
    if config.strict:
        _insist(sites)
    for site_pass in SITE_PASSES:
        before = _targets(gm)
        num_rewrites = site_pass(sites)
        if num_rewrites:
            _clean_up(gm)
        log.debug("%s: %d rewrites; %s", site_pass.__name__, num_rewrites, _describe_change(before, _targets(gm)))
    for site in sites:
        log.info("%s: %s (%s)", site.name, site.verdict, site.reason)
    return sites


def _insist(sites: list[Site]) -> None:
    missed = [f"{site.name}: {site.reason}" for site in sites if site.asked_for and site.verdict == "dense"]
    if missed:
        raise ValueError(
            "strict: expected every site that was asked for to be converted, but these cannot be:\n  "
            + "\n  ".join(missed)
            + "\nLeave them out with exclude=[...], or drop strict to keep them dense."
        )


def _graphs(gm: GraphModule) -> Iterator[GraphModule]:
    return (module for module in gm.modules() if isinstance(module, GraphModule))


def _clean_up(gm: GraphModule) -> None:
    for graph_module in _graphs(gm):
        graph_module.graph.eliminate_dead_code()
        graph_module.graph.lint()
        graph_module.recompile()


def _targets(gm: GraphModule) -> Counter[str]:
    nodes = (node for graph_module in _graphs(gm) for node in graph_module.graph.nodes)
    return Counter(getattr(node.target, "__name__", str(node.target)) for node in nodes)


def _describe_change(before: Counter[str], after: Counter[str]) -> str:
    changed = [
        f"{name}: {before[name]} -> {after[name]}" for name in sorted(before | after) if before[name] != after[name]
    ]
    return "; ".join([f"{before.total()} -> {after.total()} nodes", *changed])
