"""What `attention.py` prints, draws and checks, from its rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import attention_cases as cases
from benchmarks.rivals import CUDNN, FLASH

Row = dict[str, Any]


def print_report(record: dict[str, Any], rows: list[Row]) -> None:
    """All tables, the targets last."""
    machine, ceilings = record["machine"], record["ceilings"]
    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in ceilings["flops_per_s"].items())
    print(f"\n{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}")
    print(f"measured ceilings: copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s; matmul {rates} TFLOP/s")
    for number_format, reason in ceilings["missing"].items():
        print(f"no {number_format} matmul rate, the 16-bit one stands in: {reason}")
    for section in dict.fromkeys((row["section"], row.get("label", "")) for row in rows):
        _print_section(section, rows)
    print("\nTargets")
    print(tabulate(check_targets(rows), headers="keys", floatfmt=".3g", missingval="-"))


def _print_section(section: tuple[str, str], rows: list[Row]) -> None:
    chosen = [row for row in rows if (row["section"], row.get("label", "")) == section]
    print(f"\n{' '.join(filter(None, section))}")
    print(tabulate([_table_row(row, rows) for row in chosen], headers="keys", floatfmt=".3g", missingval="-"))
    for row in chosen:
        stages = {stage: ms for stage, ms in row.get("stages_ms", {}).items() if row["name"].startswith("SLA2")}
        if stages:
            idle = row["ms"] - sum(stages.values())
            parts = [f"{stage} {ms:.3f}" for stage, ms in stages.items()]
            if row["section"] == cases.FORWARD:
                parts.append(f"no kernel running {idle:.3f}")
            print(f"  {row['name']}, ms: {', '.join(parts)}")


def _table_row(row: Row, rows: list[Row]) -> dict[str, Any]:
    if row["section"] == "agreement":
        table: dict[str, Any] = {"name": row["name"], "rel. L2 error": row.get("error"), "finite": row.get("finite")}
    else:
        table = {
            "name": row["name"],
            "N": row["shape"][2] if "shape" in row else None,
            "sparsity": row.get("sparsity"),
            "ms": row.get("ms"),
            "spread": row.get("spread"),
            "replay ms": row.get("replay_ms"),
            "x flash": ratio(row, FLASH, rows),
            "x cuDNN": ratio(row, CUDNN, rows),
            "TFLOP/s": row.get("tflops"),
            "GB/s": row.get("gbytes_per_s"),
            "of floor": row.get("floor_fraction"),
            "extra/qkv": row.get("extra_over_qkv"),
            "first s": row.get("first_s"),
        }
    reason = row.get("not_run")
    table["note"] = f"not run: {reason[:80]}" if reason else _replay_note(row)
    return table


def _replay_note(row: Row) -> str:
    return f"no replay: {row['replay_not_run'][:60]}" if "replay_not_run" in row else ""


def find(rows: Iterable[Row], **labels: Any) -> Row | None:
    """The first row with these labels."""
    return next((row for row in rows if all(row.get(key) == value for key, value in labels.items())), None)


def ratio(row: Row, rival: str, rows: list[Row], key: str = "ms") -> float | None:
    """How many times faster than dense attention on the same inputs in the same section; None if either is missing."""
    dense = find(rows, section=row["section"], name=rival, shape=row["shape"])
    return None if dense is None or key not in dense or key not in row else dense[key] / row[key]


def check_targets(rows: list[Row]) -> list[Row]:
    """One row per target: what was measured, what is needed, and pass, fail or not run."""
    checks = [_check_ratio(target, form, rows) for target in cases.TARGETS for form in cases.FORMS]
    never_slower = [
        _check_never_slower(rows, "replay_ms", "as graphs"),
        _check_never_slower(rows, "ms", "called from Python"),
    ]
    return [*checks, *never_slower, _check_memory(rows), _check_first_call(rows)]


def _check_ratio(target: cases.Target, form: str, rows: list[Row]) -> Row:
    """The fastest of the variants that the target allows, in one form of the op.

    As CUDA graphs, the rivals too, if they could be captured: what the device takes, whatever the host.
    """
    names = [cases.sla2_name(form, name) for name in (cases.LOW_BIT if target.low_bit else (cases.PLAIN,))]
    here = [row for row in rows if row["section"] == target.section and row.get("label") == target.shape]
    timed = [row for row in here if row["name"] in names and "ms" in row]
    check: Row = {"target": f"{target.name}, {form}"}
    must = " / ".join(f"{least:g}x" for _, least in target.min_ratios)
    if not timed:
        return {**check, "must": must, "verdict": "not run"}
    key = "replay_ms" if all("replay_ms" in row for row in timed) else "ms"
    best = min(timed, key=lambda row: row[key])
    ratios, called = ([ratio(best, rival, here, kind) for rival, _ in target.min_ratios] for kind in (key, "ms"))
    measured, from_python = (
        " / ".join("-" if value is None else f"{value:.1f}x" for value in values) for values in (ratios, called)
    )
    needed = [least for _, least in target.min_ratios]
    if any(value is not None and value < least for value, least in zip(ratios, needed, strict=True)):
        verdict = _verdict(False)
    else:
        verdict = "not run" if None in ratios else _verdict(True)
    return {
        **check, "measured": measured, "must": must, "verdict": verdict, "from Python": from_python, "by": best["name"]
    }  # fmt: skip


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _check_never_slower(rows: list[Row], key: str, how: str) -> Row:
    chosen = [
        row
        for row in rows
        if row["section"] == "sweep of N"
        and row["sparsity"] == cases.NEVER_SLOWER_SPARSITY
        and row["shape"][2] >= cases.NEVER_SLOWER_LENGTH
    ]
    loops = [row["host_loop_ms"] for row in rows if "host_loop_ms" in row]

    def label(row: Row) -> str:
        name = f"{row['name']} at N = {row['shape'][2]}"
        if key != "ms" or "host_loop_ms" not in row:
            return name
        # The host's share of a call is as slow as the host was just then.
        return f"{name}, host {row['host_loop_ms'] / min(loops):.1f} times as slow as at best"

    ratios = {label(row): ratio(row, CUDNN, rows, key) for row in chosen}
    return _check_extreme(f"over cuDNN at 90 %, N >= 8192, {how}", ratios, at_least=1.0)


def _check_memory(rows: list[Row]) -> Row:
    values = _own(rows, "extra_over_qkv")
    return _check_extreme("extra memory over q, k, v, forward", values, at_most=cases.MAX_MEMORY_RATIO)


def _check_first_call(rows: list[Row]) -> Row:
    return _check_extreme("first call, s", _own(rows, "first_s"), at_most=cases.MAX_FIRST_CALL_S)


def _own(rows: list[Row], key: str) -> dict[str, float | None]:
    chosen = [row for row in rows if row["section"] == cases.FORWARD and row["name"].startswith("SLA2")]
    return {f"{row['name']} at {row['label']}": row.get(key) for row in chosen}


def _check_extreme(
    target: str, values: dict[str, float | None], *, at_least: float | None = None, at_most: float | None = None
) -> Row:
    """The worst of several values against a limit; a missing value means that the check was not run."""
    limit = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
    known = {name: value for name, value in values.items() if value is not None}
    check: Row = {"target": target, "must": limit}
    if not known:
        return {**check, "verdict": "not run"}
    worst = (min if at_least is not None else max)(known, key=known.__getitem__)
    value = known[worst]
    passed = value >= at_least if at_least is not None else at_most is None or value <= at_most
    incomplete = passed and len(known) < len(values)
    verdict = "not run" if incomplete else _verdict(passed)
    by = f"{worst}{f'; {len(values) - len(known)} not run' if incomplete else ''}"
    return {**check, "measured": f"{value:.3g}", "verdict": verdict, "by": by}


def failed_checks(rows: list[Row]) -> int:
    """How many targets are missed or were not measured."""
    return sum(check["verdict"] != "pass" for check in check_targets(rows))


def plot(record: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Time over N, time over sparsity, and the stages, as one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (over_n, over_sparsity, stages) = plt.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    _plot_over_n(over_n, rows)
    _plot_over_sparsity(over_sparsity, rows)
    _plot_stages(stages, rows)
    machine = record["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _series(rows: list[Row], section: str) -> dict[str, list[Row]]:
    """Timed rows of a section by name and, where it does not vary along the axis, by sparsity."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row["section"] == section and "ms" in row:
            at = f" at {row['sparsity']:.0%}" if section == "sweep of N" and row["sparsity"] else ""
            series.setdefault(row["name"] + at, []).append(row)
    return series


def _replayed(row: Row) -> float:
    """Milliseconds as a CUDA graph where there is one: called from Python, short sequences show the host alone."""
    return float(row["replay_ms"] if "replay_ms" in row else row["ms"])


def _plot_over_n(axes: Any, rows: list[Row]) -> None:
    for name, points in _series(rows, "sweep of N").items():
        style = "-" if name.startswith("SLA2") else "--"
        axes.plot(
            [row["shape"][2] for row in points], [_replayed(row) for row in points], style, marker="o", label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="ms", title="forward, as a graph, over N")
    _legend(axes)


def _plot_over_sparsity(axes: Any, rows: list[Row]) -> None:
    for name, points in _series(rows, "sweep of sparsity").items():
        if name.startswith("SLA2"):
            axes.plot([row["sparsity"] for row in points], [_replayed(row) for row in points], marker="o", label=name)
        else:
            axes.axhline(_replayed(points[0]), linestyle="--", color="gray", label=name)
    axes.set(yscale="log", xlabel="sparsity", ylabel="ms", title=f"forward, as a graph, {cases.SMALL}, over sparsity")
    _legend(axes)


def _plot_stages(axes: Any, rows: list[Row]) -> None:
    chosen = [row for row in rows if row.get("label") == cases.SMALL and row["section"] == cases.FORWARD]
    chosen = [row for row in chosen if row["name"].startswith("SLA2") and row.get("stages_ms")]
    left = dict.fromkeys((row["name"] for row in chosen), 0.0)
    for stage in dict.fromkeys(stage for row in chosen for stage in row["stages_ms"]):
        part = {row["name"]: row["stages_ms"].get(stage, 0.0) for row in chosen}
        axes.barh(list(part), list(part.values()), left=list(left.values()), label=stage)
        left = {name: left[name] + ms for name, ms in part.items()}
    axes.plot([row["floor_ms"] for row in chosen], [row["name"] for row in chosen], "k|", markersize=18, label="floor")
    axes.set(xlabel="ms", title=f"stages, {cases.SMALL}, {cases.SPARSITY:.0%}")
    axes.invert_yaxis()
    # Room for the legend.
    axes.margins(x=0.3)
    _legend(axes)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", markerscale=0.6)
