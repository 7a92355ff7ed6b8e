"""The passes in order. Everything the project does to a model's graph goes through `convert`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from torch.fx import GraphModule

from sla2_compile.config import SLA2Config
from sla2_compile.passes.absorb_layout import absorb_layout
from sla2_compile.passes.bind_state import bind_state
from sla2_compile.passes.decide import decide
from sla2_compile.passes.find_attention import find_attention
from sla2_compile.passes.find_broken_attention import find_broken_attention
from sla2_compile.passes.narrow_masks import narrow_masks
from sla2_compile.passes.normalize_flex import normalize_flex
from sla2_compile.passes.normalize_multi_head import normalize_multi_head
from sla2_compile.passes.normalize_packages import normalize_packages
from sla2_compile.passes.normalize_softmax import normalize_softmax
from sla2_compile.passes.proposals import settle_proposals
from sla2_compile.passes.read_layout import read_layouts, set_symbolic_sizes
from sla2_compile.passes.rewrite_attention import rewrite_attention
from sla2_compile.passes.sites import Site

log = logging.getLogger("sla2_compile")

# What proposes SDPA nodes for other spellings of attention, without changing what the graph computes.
NORMALIZERS = (normalize_softmax, normalize_multi_head, normalize_flex, normalize_packages)

# What runs on the sites that were found and decided, in this order.
SITE_PASSES = (settle_proposals, rewrite_attention, absorb_layout)


def convert(gm: GraphModule, config: SLA2Config, *, sparsity_is_default: bool = False) -> list[Site]:
    """Rewrite the attention of `gm` in place.

    Args:
        gm: a torch-level graph, as Dynamo hands it to a backend.
        config: the user's settings.
        sparsity_is_default: nobody chose a sparsity, so sites with learned state take the one they were calibrated for.

    Returns:
        Every attention site that was found, converted or not.

    Raises:
        ValueError: under `config.strict`, where a site that was asked for cannot be converted.
    """
    proposals = [proposal for owner in _graphs(gm) for normalize in NORMALIZERS for proposal in normalize(owner)]
    proposals += find_broken_attention(gm, proposals)
    sites = find_attention(gm, proposals)
    narrow_masks(sites)
    read_layouts(gm, sites, config)
    decide(sites, config)
    if config.strict:
        _insist(sites)
    for site_pass in SITE_PASSES:
        before = _targets(gm)
        num_rewrites = site_pass(sites)
        if num_rewrites:
            _clean_up(gm)
        log.debug("%s: %d rewrites; %s", site_pass.__name__, num_rewrites, _describe_change(before, _targets(gm)))
    if bind_state(gm, sites, config, sparsity_is_default=sparsity_is_default):
        _clean_up(gm)
    if set_symbolic_sizes(gm, sites):
        _clean_up(gm)
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
