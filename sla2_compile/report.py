"""How a `Report` looks: an aligned table for the terminal, and a page with pictures."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from typing import Any

from tabulate import tabulate
from torch import Tensor


def report_table(sites: list[dict[str, Any]]) -> str:
    """An aligned table of the sites (see `Report.to_dict`) and a line that sums them up."""
    if not sites:
        return "no attention site was found"
    rows = [
        [
            _name(site),
            site["verdict"],
            "x".join(map(str, site["q_shape"])),
            site["kv_len"],
            _percent(site["requested_sparsity"], site["verdict"]),
            _percent(site["delivered_sparsity"], site["verdict"]),
            _giga(site["flops_dense"]),
            _giga(site["flops_sla2"]),
            site["reason"],
        ]
        for site in sites
    ]
    headers = ["site", "verdict", "q", "keys", "requested", "delivered", "GFLOP dense", "GFLOP sla2", "reason"]
    align = ("left", "left", "left", "right", "right", "right", "right", "right", "left")
    return f"{tabulate(rows, headers, colalign=align, disable_numparse=True)}\n{summary(sites)}"


def summary(sites: list[dict[str, Any]]) -> str:
    """One line: how many sites were converted and what that does to the work of attention."""
    num_converted = sum(site["verdict"] == "sla2" for site in sites)
    dense, sla2 = (
        sum(site[key] * max(site["num_calls"], 1) for site in sites) for key in ("flops_dense", "flops_sla2")
    )
    ratio = f": {dense / sla2:.1f} times fewer" if sla2 else ""
    return (
        f"{num_converted} of {len(sites)} sites converted; attention {_giga(dense)} GFLOP dense, {_giga(sla2)} GFLOP "
        f"with sla2{ratio} (estimated, one forward)"
    )


def report_page(sites: list[dict[str, Any]], masks: list[Tensor | None], note: str = "") -> str:
    """A self-contained HTML page: the table, a note below it, and each mask (M, T) as a picture."""
    from jinja2 import Environment

    template = files("sla2_compile").joinpath("report.html.jinja").read_text(encoding="utf-8")
    pictures = [None if mask is None else _picture(mask) for mask in masks]
    rows = [
        site
        | {
            "name": _name(site),
            "shape": " x ".join(map(str, site["q_shape"])),
            "requested": _percent(site["requested_sparsity"], site["verdict"]),
            "delivered": _percent(site["delivered_sparsity"], site["verdict"]),
            "dense": _giga(site["flops_dense"]),
            "sla2": _giga(site["flops_sla2"]),
            "picture": picture,
        }
        for site, picture in zip(sites, pictures, strict=True)
    ]
    environment = Environment(autoescape=True)
    return environment.from_string(template).render(sites=rows, summary=summary(sites) if sites else "", note=note)


def _picture(mask: Tensor) -> str:
    """`mask` (M, T) in [0, 1] as a base64 PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "to_html: expected matplotlib for the pictures; pip install 'sla2-compile[report]'"
        ) from error
    figure = Figure(figsize=(5.6, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(mask.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("key block")
    axes.set_ylabel("query block")
    figure.colorbar(image, ax=axes, label="share of heads that keep it")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _name(site: dict[str, Any]) -> str:
    """Its place in the model and, where they differ, the name that patterns match."""
    name, pattern_name = site["name"], site["pattern_name"]
    return str(name) if name == pattern_name else f"{name} ({pattern_name})"


def _percent(share: float, verdict: str) -> str:
    return f"{100 * share:.2f} %" if verdict == "sla2" else "-"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.2f}"
