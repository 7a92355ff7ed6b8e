"""Give every attention the learned state that its owner sent along, and remove the markers that carried it.

    %m = call_function[sla2.bind](%x, [%proj_q, %proj_k, %alpha_logit, %alpha_gain], settings, name)
    ... %out = call_function[sla2.attention](%q, %k, %v, %mask, ...)
    ->  ... %out = call_function[sla2.attention](%q, %k, %v, %mask, %proj_q, %proj_k, %alpha_logit, %alpha_gain, ...)

A marker and the attention calls of one call of its owner were traced in the same module call; the n-th of these is the
n-th the state knows. The state also brings its sparsity and low-bit formats, where the user chose none, its tail and
its mixing.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

import sla2_compile.bind_op  # noqa: F401  (registers the marker)
from sla2_compile.config import SPARSITY_UNIT, SLA2Config
from sla2_compile.functional import config_arguments
from sla2_compile.learned_state import (
    CallSettings,
    Entry,
    LowBit,
    OwnerSettings,
    calibration_context,
    marked_tensors,
)
from sla2_compile.passes.carry_into import carry_into
from sla2_compile.passes.find_attention import walk
from sla2_compile.passes.sites import Binding, Site

_FORMATS = ("qk_format", "pv_format")


@dataclass
class _MarkedCall:
    """One call of an owner: its marker, and the attention sites traced in it in order."""

    marker: Node
    owner: GraphModule
    sites: list[Site] = field(default_factory=list)

    @property
    def settings(self) -> OwnerSettings | None:
        text = self.marker.args[2]
        return OwnerSettings.from_json(text) if text else None  # type: ignore[arg-type]


def bind_state(gm: GraphModule, sites: list[Site], config: SLA2Config, *, sparsity_is_default: bool = False) -> int:
    """Bind the learned state of `gm` to the rewritten sites.

    Args:
        gm: the graph, with attention already rewritten.
        sites: all its sites, also those left dense.
        config: the user's settings.
        sparsity_is_default: nobody chose a sparsity, so each site takes the one it was calibrated for.

    Returns:
        How many markers were removed.

    Raises:
        ValueError: under `config.strict`, where state cannot reach its attention or was learned for other settings.
    """
    calls = _marked_calls(gm, sites)
    problems: list[str] = []
    for call in calls:
        for ordinal, site in enumerate(call.sites):
            site.binding = Binding(name=str(call.marker.args[3]), ordinal=ordinal, num_calls=len(call.sites))
        settings = call.settings
        if settings is None:
            continue
        path = call.sites[0].name if call.sites else "an owner of learned state"
        if len(call.sites) != settings.num_calls:
            problems.append(
                f"{path}: expected {settings.num_calls} attention calls behind its learned state, found "
                f"{len(call.sites)} in the same graph (a graph break, or another way through the model than in prepare)"
            )
            continue
        for each in settings.calls:
            site = call.sites[each.ordinal]
            if site.verdict != "sla2":
                continue
            problems += _bind(site, call, settings, each, gm, sparsity_is_default=sparsity_is_default)
    for call in calls:
        call.marker.replace_all_uses_with(call.marker.args[0])  # type: ignore[arg-type]
        call.owner.graph.erase_node(call.marker)
    _tell(problems, config)
    return len(calls)


def _marked_calls(gm: GraphModule, sites: list[Site]) -> list[_MarkedCall]:
    """Every marker of `gm` with the sites that follow it in the same call of the same module."""
    by_node = {site.node: site for site in sites}
    latest: dict[str | None, _MarkedCall] = {}
    calls = []
    for owner, node in walk(gm):
        if node.target is torch.ops.sla2.bind.default:
            latest[_module_call(node)] = call = _MarkedCall(node, owner)
            calls.append(call)
        elif node in by_node and (marked := latest.get(_module_call(node))) is not None:
            marked.sites.append(by_node[node])
    return calls


def _module_call(node: Node) -> str | None:
    """Which call of which module a node was traced in; None for the compiled module itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    # The key tells the calls of one module apart, the path its place; together they are unique in a graph.
    key, (path, _) = list(stack.items())[-1]
    return f"{key} {path}"


def _bind(
    site: Site,
    marked: _MarkedCall,
    settings: OwnerSettings,
    call: CallSettings,
    gm: GraphModule,
    *,
    sparsity_is_default: bool,
) -> list[str]:
    """Move one call's state onto its attention; what the user should know about it."""
    assert site.config is not None
    assert site.binding is not None
    entry = call.entries[0]
    config, problems = _with_formats(site, settings.low_bit)
    if call.is_calibrated:
        entry, config, unfit = _choose(site, config, call, sparsity_is_default, settings.low_bit)
        problems += unfit
    tensors = marked_tensors(settings, list(marked.marker.args[1]), call, entry)  # type: ignore[arg-type]
    if site.owner is not marked.owner:
        carried = [carry_into(x, marked.owner, site.owner, gm) for x in tensors]
        if None in carried:
            return [f"{site.name}: its attention is in a graph nested inside its owner's, where state cannot follow"]
        tensors = carried
    proj_q, proj_k, logit, gain = tensors
    site.config = config
    if call.is_calibrated:
        site.binding.calibrated_sparsity = (entry.sparsity_units or 0) / SPARSITY_UNIT
    site.node.args = (*site.node.args[:4], proj_q, proj_k, logit, gain if config.mixing == "row" else None)
    site.node.kwargs = {**site.node.kwargs, **config_arguments(config)}
    return problems


def _with_formats(site: Site, low_bit: LowBit | None) -> tuple[SLA2Config, list[str]]:
    """The site's config with the formats of its state, where the user gave none; and where the two contradict."""
    config = site.config
    assert config is not None
    if low_bit is None:
        return config, []
    given, trained = (config.qk_format, config.pv_format), (low_bit.qk_format, low_bit.pv_format)
    if given not in ((None, None), trained):
        return config, [
            f"{site.name}: its state has the formats qk_format={trained[0]!r}, pv_format={trained[1]!r}, and is used "
            f"with {given[0]!r}, {given[1]!r}; leave them out of the options, or change the state with SLA2QATConfig"
        ]
    fake_quant = config.fake_quant or low_bit.step == "prepare"
    return dataclasses.replace(config, qk_format=trained[0], pv_format=trained[1], fake_quant=fake_quant), []


def _choose(
    site: Site, config: SLA2Config, call: CallSettings, sparsity_is_default: bool, low_bit: LowBit | None
) -> tuple[Entry, SLA2Config, list[str]]:
    """The entry for a site, its config with what the entry decides, and what does not fit."""
    units = config.sparsity_units
    if sparsity_is_default and not site.has_own_sparsity and call.default_units is not None:
        units = call.default_units
    entry = call.nearest(units)
    problems: list[str] = []
    if entry.sparsity_units != units:
        known = ", ".join(f"{(each.sparsity_units or 0) / SPARSITY_UNIT:g}" for each in call.entries)
        problems.append(
            f"{site.name}: expected a calibrated sparsity ({known}), got {units / SPARSITY_UNIT:g}; the state of "
            f"{(entry.sparsity_units or 0) / SPARSITY_UNIT:g} is used. Calibrate this sparsity or choose another"
        )
    now = dict(calibration_context(config))
    for name, value in call.context:
        # Formats that were chosen after the calibration, to train for them, are no surprise.
        if now[name] != value and (low_bit is None or name not in _FORMATS):
            problems.append(
                f"{site.name}: its state was calibrated with {name}={value!r}, and is used with {now[name]!r}"
            )
    return (
        entry,
        dataclasses.replace(
            config,
            sparsity=units / SPARSITY_UNIT,
            tail=entry.tail or config.tail,
            mixing=entry.mixing or config.mixing,
        ),
        problems,
    )


def _tell(problems: list[str], config: SLA2Config) -> None:
    if not problems:
        return
    text = "\n  ".join(problems)
    if config.strict:
        raise ValueError(f"strict: expected learned state to fit the attention it was learned for, but:\n  {text}")
    warnings.warn(f"sla2: learned state:\n  {text}", stacklevel=2)
