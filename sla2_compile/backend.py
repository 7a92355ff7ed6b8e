"""The torch.compile backend `sla2`: our passes on the graph, then Inductor.

Found by its name through the `torch_dynamo_backends` entry point, so that no import of ours is needed.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

import sla2_compile.ops  # noqa: F401  (registers the operators)
from sla2_compile.config import SLA2Config
from sla2_compile.dense import CompileGraph, copy_graph, with_dense_twin
from sla2_compile.passes.decide import check_patterns
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site
from sla2_compile.passes.whole_model import is_whole_model


def sla2(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its attention rewritten to SLA2.

    Args:
        gm: the graph.
        example_inputs: its fake inputs.
        mode: Inductor's, as for torch.compile: "default", "reduce-overhead", "max-autotune" and so on.
        options: fields of `SLA2Config`; and "mode", as torch.compile takes either a mode or options.

    Raises:
        ValueError: an unknown mode or option, an option out of range, or a site that `strict` insists on.
        TypeError: an option of the wrong type.
    """
    if isinstance(options, Mapping) and "mode" in options:
        mode = options["mode"]
        options = {name: value for name, value in options.items() if name != "mode"}
    config = SLA2Config.from_options(options)
    compile_graph = functools.partial(_compile_with_inductor, config_patches=_mode_options(mode))
    return build_backend(config, compile_graph, sparsity_is_default="sparsity" not in (options or {}))(
        gm, example_inputs
    )


def build_backend(
    config: SLA2Config, compile_graph: CompileGraph, *, sparsity_is_default: bool = False
) -> CompileGraph:
    """A Dynamo backend that converts a graph and hands it on to another backend.

    Args:
        config: the settings.
        compile_graph: what compiles the rewritten graph, for example Inductor or `aot_eager`.
        sparsity_is_default: nobody chose the sparsity: sites take what they were calibrated for, the others a cautious
            one, which is announced.
    """

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        original = copy_graph(gm)
        sites = convert(gm, config, sparsity_is_default=sparsity_is_default)
        report_conversion(gm, sites, config, sparsity_is_default=sparsity_is_default)
        compiled = compile_graph(gm, example_inputs)
        if not any(site.verdict == "sla2" for site in sites):
            return compiled
        return with_dense_twin(compiled, original, example_inputs, compile_graph)

    return backend


def report_conversion(gm: GraphModule, sites: list[Site], config: SLA2Config, *, sparsity_is_default: bool) -> None:
    """Tell what a user should know about a converted graph: patterns without a site, no conversion, no chosen sparsity.

    Raises:
        ValueError: a pattern of the config that matches no site; under `config.strict`, where nothing was converted.
    """
    if sites and is_whole_model(gm):
        check_patterns([site.name for site in sites], config)
    _report_unconverted(gm, sites, config)
    if sparsity_is_default and any(site.verdict == "sla2" and not _is_calibrated(site) for site in sites):
        warnings.warn(
            f"sla2: no sparsity was given, so the cautious default of {config.sparsity} is used; pass "
            'options={"sparsity": ...} to choose one, or let sla2_compile.calibrate learn the routing for it',
            stacklevel=3,
        )


def _is_calibrated(site: Site) -> bool:
    return site.binding is not None and site.binding.calibrated_sparsity is not None


def _report_unconverted(gm: GraphModule, sites: list[Site], config: SLA2Config) -> None:
    """Say that nothing became SLA2; under `strict` an error, except for a part of a model: another may have some."""
    is_whole = is_whole_model(gm)
    if any(site.verdict == "sla2" for site in sites) or (not sites and not is_whole):
        return
    if sites:
        reasons = "; ".join(sorted({site.reason for site in sites}))
        where = "the model" if is_whole else "a part of the model between graph breaks"
        what = f"none of the {len(sites)} attention sites of {where} was converted ({reasons})"
    else:
        what = "the model holds no attention that the backend knows"
    if config.strict and is_whole:
        raise ValueError(
            f"strict: expected at least one converted attention site, but {what}; drop strict or the backend"
        )
    warnings.warn(
        f"sla2: {what}; it runs as with Inductor. sla2_compile.explain(model, ...) lists the sites", stacklevel=2
    )


def _mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for a mode."""
    known = list_mode_options()
    if mode is not None and mode not in known:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, known))}, got {mode!r}")
    return known.get(mode or "default", {})


def _compile_with_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], *, config_patches: dict[str, Any]
) -> Callable[..., Any]:
    # Inductor's caches do not see the Python behind our operators; the tag makes them forget when it changes.
    tag = torch.compiler.config.cache_key_tag + source_hash()
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]  # installed at import time
        return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=config_patches))


@functools.cache
def source_hash() -> str:
    """A hash of every source file of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"sla2-{digest.hexdigest()[:16]}"
