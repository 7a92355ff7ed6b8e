"""Write the page of the comparison from the results that exist, and say what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from examples.paper_table.measures import mean_and_spread
from examples.paper_table.pictures import draw_curves, draw_frames
from examples.paper_table.presets import Preset
from examples.paper_table.rows import DEFAULT, FORMS, PAPER, SPARSITIES, Row, all_rows
from examples.paper_table.schedule import all_jobs, pending
from examples.paper_table.storage import Storage
from sla2_compile.config import SLA2Config
from sla2_compile.kernels.blocks import num_blocks, num_kept_blocks

Results = dict[str, dict[str, Any]]

MEASURES = {
    "held_out_loss": "held-out loss",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "feature_distance": "feature distance",
    "kernel_distance": "kernel distance",
}
AFTERWARDS = "quantised_afterwards"


def write_report(preset: Preset, storage: Storage, docs: Path) -> str:
    """Write `paper_table.md` and its pictures; a line that says so."""
    docs.mkdir(parents=True, exist_ok=True)
    results = storage.all_results()
    drawn = [draw_frames(storage.results, docs), draw_curves(results, docs)]
    path = docs / "paper_table.md"
    path.write_text(page(preset, storage, [name for name in drawn if name is not None]))
    return f"{path}: from {len(results)} results"


def page(preset: Preset, storage: Storage, pictures: list[str]) -> str:
    """The whole page in Markdown."""
    from jinja2 import Environment, StrictUndefined

    results, jobs = storage.all_results(), all_jobs(preset)
    num_key_blocks = num_blocks(preset.model.num_tokens, preset.block_k)
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.md.jinja").read_text()
    )
    return template.render(
        preset=preset,
        num_done=len(results),
        num_jobs=len(jobs),
        missing=[f"`{job.name}`" for job in pending(preset, storage, ("*",))],
        devices="; ".join(sorted({f"{result['device']}, torch {result['torch']}" for result in results.values()})),
        claims=_claims(results),
        served=_served(results),
        trained=_rows_table(results, [row for row in all_rows() if row.trained and not _is_only_in_grid(row)]),
        grid=_rows_table(results, _grid()),
        untrained=_rows_table(results, [row for row in all_rows() if not row.trained]),
        cost=_cost(results),
        minutes=sum(result["seconds"] for result in results.values()) / 60,
        pictures=pictures,
        num_key_blocks=num_key_blocks,
        num_kept=num_kept_blocks(num_key_blocks, SLA2Config(sparsity=0.97).sparsity_units),
    )


# Claims


@dataclass(frozen=True)
class Side:
    """A row's measurements: its own, or those after quantising what was trained without."""

    row: Row
    key: str = "measures"

    def losses(self, results: Results) -> dict[int, float]:
        return by_seed(results, self.row, "held_out_loss", self.key)


@dataclass(frozen=True)
class Claim:
    """That one side has a lower held-out loss than the other, or none that differs."""

    text: str
    left: Side
    right: Side
    equal: bool = False


def _sla2(sparsity: float, form: tuple[Any, Any] = PAPER, *, low_bit: bool, router: Any = "learned") -> Row:
    return Row("sla2", sparsity, form, router, low_bit=low_bit)


def claims() -> list[Claim]:
    full = Side(Row("full"))
    listed = [
        Claim("SLA2 at 97 % is as good as full attention", Side(_sla2(0.97, low_bit=True)), full, equal=True),
        Claim(
            "so are the pooled tail and row mixing, this project's default",
            Side(_sla2(0.97, DEFAULT, low_bit=True)),
            full,
            equal=True,
        ),
    ]
    for sparsity in (0.95, 0.97):
        share, trained = f"{100 * sparsity:g} %", Side(_sla2(sparsity, low_bit=True))
        means = Side(_sla2(sparsity, low_bit=True, router="means"))
        after = Side(_sla2(sparsity, low_bit=False), AFTERWARDS)
        listed += [
            Claim(f"the learned router is better than block means, {share}", trained, means),
            Claim(f"low-bit training is better than quantising afterwards, {share}", trained, after),
        ]
    sixteen = Side(_sla2(0.95, low_bit=False))
    return [
        *listed,
        Claim("SLA2 is better than SLA, 95 %, both in 16 bit", sixteen, Side(Row("sla", 0.95))),
        Claim("SLA2 is better than the sparse branch alone, 95 %, both in 16 bit", sixteen, Side(Row("sparse", 0.95))),
    ]


def _claims(results: Results) -> str:
    table = []
    for claim in claims():
        left, right = claim.left.losses(results), claim.right.losses(results)
        sides = (_spread(list(side.values()), 5) for side in (left, right))
        table.append([claim.text, *sides, _difference(left, right), verdict(left, right, equal=claim.equal)])
    return _markdown(table, ["claim", "left", "right", "left less right, 95 %", "here"])


def _served(results: Results) -> str:
    found = [result["served"]["same_bits"] for result in results.values() if "served" in result]
    return ("yes" if all(found) else "no") if found else "not measured"


def verdict(left: dict[int, float], right: dict[int, float], *, equal: bool) -> str:
    """What the losses of two sides, by seed, say about "left is lower", or "they are equal"."""
    found = paired_difference(left, right)
    if found is None:
        return "not measured"
    mean, margin = found
    if margin is None:
        return f"one seed: left is {'lower' if mean < 0 else 'not lower'}, by {abs(mean):.2g}"
    differs = abs(mean) > margin
    if equal:
        return "holds: within noise" if not differs else f"does not hold: {'better' if mean < 0 else 'worse'}"
    if not differs:
        return "undecided: within noise"
    return "holds" if mean < 0 else "does not hold"


def paired_difference(left: dict[int, float], right: dict[int, float]) -> tuple[float, float | None] | None:
    """Mean difference over the seeds that both sides have, and half the width of its 95 % interval (Student's t).

    A seed gives both sides the same clips and noise, so that most of what it does is the same for both. The width is
    None with one seed; nothing is found where they have none in common.
    """
    from scipy import stats

    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if not differences:
        return None
    mean, spread = mean_and_spread(differences)
    if len(differences) < 2:
        return mean, None
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * spread / math.sqrt(len(differences))


def _difference(left: dict[int, float], right: dict[int, float]) -> str:
    found = paired_difference(left, right)
    if found is None:
        return "-"
    mean, margin = found
    return f"{mean:+.5f}" if margin is None else f"{mean:+.5f} ± {margin:.5f}"


# Tables


def values(results: Results, row: Row, measure: str, key: str = "measures") -> list[float]:
    """A measure of a row, one value per seed that was run."""
    return list(by_seed(results, row, measure, key).values())


def by_seed(results: Results, row: Row, measure: str, key: str = "measures") -> dict[int, float]:
    """The same by seed."""
    found = {seed: results.get(f"{row.name}-s{seed}", {}) for seed in range(100)}
    return {seed: result[key][measure] for seed, result in found.items() if key in result}


def _grid() -> list[Row]:
    return [_sla2(sparsity, form, low_bit=False) for sparsity in (0.95, 0.97) for form in FORMS]


def _is_only_in_grid(row: Row) -> bool:
    return dataclasses.replace(row, decides=False) in _grid() and row.form not in (PAPER, DEFAULT)


def describe(row: Row) -> str:
    """A row in words."""
    if row.kind == "full":
        return "full attention" if row.trained else "the teacher"
    names = {"sla": "SLA, O_s + proj(O_l)", "sparse": "sparse branch only", "sla2": "SLA2"}
    parts = [names[row.kind]]
    if row.kind == "sla2":
        form = {PAPER: "the paper's form", DEFAULT: "pooled tail, row mixing"}
        parts.append(form.get(row.form, f"{row.form[0]} tail, {row.form[1]} mixing"))
        parts += ["block-mean router"] if row.router == "means" and row.trained else []
    parts += ["low bit"] if row.low_bit else []
    parts += [] if row.tiles else ["raster order"]
    return ", ".join(parts)


def _rows_table(results: Results, rows: list[Row]) -> str:
    def line(row: Row, key: str, note: str = "") -> list[str]:
        sparsity = f"{100 * row.sparsity:g} %" if row.kind != "full" else "0"
        digits = {"held_out_loss": 5, "psnr": 2, "ssim": 3, "feature_distance": 4, "kernel_distance": 4}
        cells = [_spread(values(results, row, measure, key), digits[measure]) for measure in MEASURES]
        return [describe(row) + note, sparsity, *cells]

    table = []
    for row in rows:
        table.append(line(row, "measures"))
        if row.measures_quantised:
            table.append(line(row, AFTERWARDS, ", quantised afterwards"))
    return _markdown(table, ["attention", "sparsity", *MEASURES.values()])


def _cost(results: Results) -> str:
    def mean(row: Row, find: Callable[[dict[str, Any]], float | None]) -> str:
        seeds = [result for name, result in results.items() if name.rpartition("-s")[0] == row.name]
        alone = [result for result in seeds if result.get("alone", True)]
        known = [value for value in map(find, alone or seeds) if value]
        return f"{1000 * sum(known) / len(known):.1f}{'' if alone else '*'}" if known else "-"

    forms = itertools.product(SPARSITIES, (PAPER, DEFAULT), (True, False))
    rows = [Row("full"), *(_sla2(sparsity, form, low_bit=low_bit) for sparsity, form, low_bit in forms)]
    rows += [Row("sla", 0.95), Row("sparse", 0.95)]
    known_rows = {row.name for row in all_rows()}
    table = [
        [
            describe(row),
            f"{100 * row.sparsity:g} %" if row.kind != "full" else "0",
            mean(row, lambda result: result.get("seconds_per_step")),
            mean(row, lambda result: result["measures"]["seconds_per_clip"]),
        ]
        for row in rows
        if row.name in known_rows
    ]
    return _markdown(table, ["attention", "sparsity", "training step, ms", "clip sampled, ms"])


def _spread(found: list[float], digits: int) -> str:
    if not found:
        return "-"
    mean, spread = mean_and_spread(found)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(found) > 1 else "")


def _markdown(table: list[list[str]], headers: list[str]) -> str:
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)
