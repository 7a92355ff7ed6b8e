"""What `calibrate` returns: errors of every site before and after, in a table, as plain values, and as a page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from tabulate import tabulate

from sla2_compile.site_training import MIXING_STEPS_RATIO

PAPER_FORM = "linear, block"

# Points of a curve on the page; more than a screen can show.
_CURVE_POINTS = 120


# The form of a site that keeps the default.
UNTRAINED = "untrained"


@dataclass
class SparsityResult:
    """One site at one sparsity. Errors are relative L2 of the op's output against dense attention, on held-out batches.

    Args:
        sparsity: asked for.
        delivered: after rounding to whole blocks, and exact tokens.
        before: error of the untrained default: identity router, pooled tail, row mixing.
        after: error of what was kept.
        form: "tail, mixing" of what was kept, or UNTRAINED.
        improved: whether anything learned was better than the untrained default.
        errors: error of every form that was trained.
        curves: training loss of every step, by form: squared error relative to the dense output's mean square.
    """

    sparsity: float
    delivered: float
    before: float
    after: float
    form: str
    improved: bool
    errors: dict[str, float]
    curves: dict[str, list[float]]


@dataclass
class SiteResult:
    """One calibrated site: q (B, H, N, D) and keys of the first batch, samples of both kinds, a result per sparsity."""

    name: str
    q_shape: tuple[int, ...]
    kv_len: int
    num_training_samples: int
    num_held_out_samples: int
    results: list[SparsityResult]


@dataclass
class BudgetResult:
    """Kept blocks spread over the sites, against the same sparsity everywhere.

    Args:
        sparsity: the average asked for.
        delivered: the average reached.
        uniform_error: summed held-out error with `sparsity` at every site.
        spread_error: the same with the sparsities in `per_site`.
        per_site: sparsity by the site's name.
    """

    sparsity: float
    delivered: float
    uniform_error: float
    spread_error: float
    per_site: dict[str, float]


@dataclass
class CalibrationReport:
    """The calibrated sites in the order of execution. Prints as a table.

    Args:
        sites: one result each.
        budget: how kept blocks were spread; None if that was not asked for.
        skipped: prepared sites that were not calibrated: reached by no training batch, by no held-out batch, or left
            when it was interrupted.
        interrupted: stopped by Ctrl-C.
        seconds: how long it took.
    """

    sites: list[SiteResult] = field(default_factory=list)
    budget: BudgetResult | None = None
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, and `not_improved`: [site name, sparsity]."""
        return {**dataclasses.asdict(self), "not_improved": self.not_improved()}

    def not_improved(self) -> list[tuple[str, float]]:
        """(site name, sparsity) wherever nothing learned was better than the untrained default."""
        return [(site.name, each.sparsity) for site in self.sites for each in site.results if not each.improved]

    def diverged(self) -> list[str]:
        """Which forms of which sites gave outputs that are not finite."""
        return [
            f"{form} at {site.name}, {_percent(each.sparsity)}"
            for site in self.sites
            for each in site.results
            for form, error in each.errors.items()
            if error == math.inf
        ]

    def totals(self) -> list[dict[str, Any]]:
        """For each sparsity, the mean error over the sites: before, after, and of every form."""
        totals = []
        for sparsity in dict.fromkeys(each.sparsity for site in self.sites for each in site.results):
            rows = [each for site in self.sites for each in site.results if each.sparsity == sparsity]
            forms = list(rows[0].errors)
            totals.append(
                {
                    "sparsity": sparsity,
                    "num_sites": len(rows),
                    "num_improved": sum(row.improved for row in rows),
                    "before": sum(row.before for row in rows) / len(rows),
                    "after": sum(row.after for row in rows) / len(rows),
                    "forms": {form: sum(row.errors[form] for row in rows) / len(rows) for form in forms},
                }
            )
        return totals

    def __str__(self) -> str:
        if not self.sites:
            return "\n".join(["no site was calibrated", *self.notes()])
        rows = [
            [site.name, _percent(each.sparsity), each.before, each.after, _change(each), each.form, _paper(each)]
            for site in self.sites
            for each in site.results
        ]
        headers = ["site", "sparsity", "before", "after", "change", "kept form", "paper's form"]
        align = ("left", "right", "decimal", "decimal", "right", "left", "decimal")
        return "\n".join([tabulate(rows, headers, floatfmt=".4f", colalign=align, missingval="-"), *self.notes()])

    def notes(self) -> list[str]:
        """Lines that sum up: per sparsity, the budget, what did not improve, what was skipped."""
        lines = [
            f"{_percent(total['sparsity'])}: mean error {total['before']:.4f} -> {total['after']:.4f}, "
            f"{total['num_improved']} of {total['num_sites']} sites improved; by form: "
            + ", ".join(f"{form} {error:.4f}" for form, error in total["forms"].items())
            for total in self.totals()
        ]
        if self.budget is not None:
            lines.append(
                f"budget {_percent(self.budget.sparsity)} (delivered {_percent(self.budget.delivered)}): summed error "
                f"{self.budget.uniform_error:.4f} with the same sparsity everywhere, "
                f"{self.budget.spread_error:.4f} spread: "
                + ", ".join(f"{name} {_percent(sparsity)}" for name, sparsity in self.budget.per_site.items())
            )
        for what, is_untrained in (
            ("kept at the untrained start", True),
            ("no better than the untrained default, whose form was not asked for", False),
        ):
            names = [
                f"{site.name} at {_percent(each.sparsity)}"
                for site in self.sites
                for each in site.results
                if not each.improved and (each.form == UNTRAINED) == is_untrained
            ]
            if names:
                lines.append(f"{what}: {', '.join(names)}")
        if diverged := self.diverged():
            lines.append("not finite, and so not kept: " + ", ".join(diverged))
        if self.interrupted:
            lines.append("interrupted: " + ("the sites above are calibrated" if self.sites else "no site was finished"))
        if self.skipped:
            lines.append("not calibrated: " + ", ".join(self.skipped))
        return [*lines, f"{self.seconds:.0f} s"]

    def to_html(self) -> str:
        """A self-contained page with the table and the training curves."""
        from jinja2 import Environment

        template = files("sla2_compile").joinpath("calibration.html.jinja").read_text(encoding="utf-8")
        sites = [
            {
                "name": site.name,
                "shape": " x ".join(map(str, site.q_shape)),
                "results": [
                    {
                        "sparsity": _percent(each.sparsity),
                        "before": f"{each.before:.4f}",
                        "after": f"{each.after:.4f}",
                        "change": _change(each),
                        "form": each.form,
                        "errors": {form: f"{error:.4f}" for form, error in each.errors.items()},
                        "figure": _figure(each.curves),
                    }
                    for each in site.results
                ],
            }
            for site in self.sites
        ]
        return Environment(autoescape=True).from_string(template).render(sites=sites, notes=self.notes())


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _change(result: SparsityResult) -> str:
    return f"{100 * (result.after / result.before - 1):+.1f} %" if result.before else "0.0 %"


def _paper(result: SparsityResult) -> float | None:
    return result.errors.get(PAPER_FORM)


def _figure(curves: dict[str, list[float]]) -> dict[str, Any]:
    """Curves as points of SVG lines in a 300 x 120 box on one common scale, averaged to few, and what its axes say."""
    smooth = {form: _average(curve) for form, curve in curves.items() if curve}
    top = max((value for curve in smooth.values() for value in curve), default=0.0) or 1.0
    num_steps = max(map(len, curves.values()), default=0)
    num_mixing_steps = int(num_steps * MIXING_STEPS_RATIO)
    return {
        "lines": {
            form: " ".join(
                f"{300 * i / max(1, len(curve) - 1):.1f},{120 - 115 * value / top:.1f}" for i, value in enumerate(curve)
            )
            for form, curve in smooth.items()
        },
        "top": f"{top:.3g}",
        "num_steps": num_steps,
        "phases": [f"{300 * n / max(1, num_steps):.1f}" for n in (num_mixing_steps, num_steps - num_mixing_steps)],
    }


def _average(curve: list[float]) -> list[float]:
    stride = -(-len(curve) // _CURVE_POINTS)
    parts = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    return [sum(part) / len(part) for part in parts]
