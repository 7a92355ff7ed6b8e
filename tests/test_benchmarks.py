"""The GPU benchmarks on a CPU: they run to the end, keep what could not run, and count work as documented."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sla2_compile import SLA2Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of `benchmarks` as a run from the root does."""
    monkeypatch.syspath_prepend(str(ROOT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return load


def run_benchmark(module: str, *arguments: str) -> str:
    """The output of a run on the CPU."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--device", "cpu", *arguments]
    # One thread: on sizes this small several only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_tiny(module: str, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The record and the output of a tiny run."""
    output = run_benchmark(module, "--tiny", "--out", str(out), *arguments)
    return json.loads((out / f"{module}.json").read_text()), output


def check_attention_record(record: dict[str, Any], output: str) -> None:
    rows = record["rows"]
    assert all("not_run" in row or row.get("ms", 0) > 0 or "error" in row for row in rows)
    assert all(row.get("finite", True) for row in rows)
    cudnn = [row for row in rows if row["name"] == "SDPA cuDNN"]
    assert cudnn
    assert all(row["not_run"] for row in cudnn)
    assert "not run: RuntimeError" in output
    assert record["machine"]["torch"] == torch.__version__


def test_a_tiny_attention_run_measures_every_case_or_says_why_not(tmp_path: Path) -> None:
    record, output = run_tiny("attention", tmp_path, "--sections", "training", "sweeps")
    check_attention_record(record, output)
    assert str(tmp_path) not in record["machine"]["command"]
    assert (tmp_path / "attention.png").stat().st_size > 0


@pytest.mark.slow
def test_a_tiny_run_of_the_shapes_includes_flex_attention_and_the_agreement(tmp_path: Path) -> None:
    record, output = run_tiny("attention", tmp_path, "--sections", "shapes", "agreement", "--shapes", "480p")
    check_attention_record(record, output)
    flex = [row for row in record["rows"] if row["name"].startswith("FlexAttention")]
    assert [row["label"] for row in flex] == ["480p"]
    assert "ms" in flex[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_model_run_converts_the_self_attention(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    variants = ("Inductor, SDPA flash", "sla2: pooled, row")
    record, _ = run_tiny("model", tmp_path, "--budget", "0", "--variants", *variants)
    dense, sparse = record["rows"]
    assert dense["ms"] > 0
    # The backend insists on every self-attention, so an output that differs is SLA2's.
    assert sparse["difference"] > 0


def test_the_floor_counts_the_documented_operations_and_bytes(load: Any) -> None:
    floors = load("floors")
    config = SLA2Config(sparsity=0.97, tail="pooled", mixing="row", qk_format="int8")
    work = floors.attention_forward_work((1, 12, 32768, 128), config)
    kept, pooled, router = 15 * 64 * 32768 * 128, 512 * 32768 * 128, 256 * 512 * 128
    assert work.flops == {"int8": 12 * 2 * (kept + pooled), "16-bit": 12 * 2 * (kept + pooled + router)}
    assert work.num_bytes == 4 * 12 * 32768 * 128 * 2
    ceilings = floors.Ceilings(1e12, {"16-bit": 1e12, "int8": 2e12})
    arithmetic = (work.flops["16-bit"] + work.flops["int8"] / 2) / 1e12
    assert work.floor_ms(ceilings) == pytest.approx(1e3 * arithmetic)
    assert floors.attention_forward_work((1, 1, 512, 64), SLA2Config(sparsity=0)).total_flops >= 4 * 512 * 512 * 64


def test_every_kernel_of_the_package_has_a_stage(load: Any) -> None:
    stages = load("stages")
    kernels = {name: files for name, files in stages.own_kernels().items() if name.endswith("_kernel")}
    assert kernels
    for name, files in kernels.items():
        is_backward = all("backward" in file or "inverse_index" in file for file in files)
        rules = stages.BACKWARD if is_backward else stages.FORWARD
        assert stages.stage_of(name, rules) != stages.OTHER, f"{name} of {files}"
        assert stages.stage_of(name, stages.MODEL) == "SLA2 attention"
    assert stages.group({"memcpy": 1.0, "memset": 2.0}, stages.FORWARD) == {stages.OTHER: 3.0}


@pytest.mark.parametrize(
    "flash_ms, cudnn_ms, verdict",
    [
        (25.0, 15.0, "pass"),
        (25.0, 13.0, "FAIL"),
        (25.0, None, "not run"),
        (23.0, None, "FAIL"),
        (None, None, "not run"),
    ],
)
def test_a_target_passes_only_with_every_ratio_measured(
    load: Any, flash_ms: float | None, cudnn_ms: float | None, verdict: str
) -> None:
    report, cases = load("attention_report"), load("attention_cases")
    shape = cases.SHAPES[cases.SMALL]
    labels = {"section": cases.FORWARD, "label": cases.SMALL, "shape": shape}
    rows = [{**labels, "name": cases.sla2_name(form, cases.PLAIN), "ms": 1.0} for form in cases.FORMS]
    for name, ms in ((report.FLASH, flash_ms), (report.CUDNN, cudnn_ms)):
        rows.append(
            {**labels, "name": name, "not_run": "no such backend"} if ms is None else {**labels, "name": name, "ms": ms}
        )
    checks = {check["target"]: check["verdict"] for check in report.check_targets(rows)}
    assert [checks[f"480p forward, 16-bit, {form}"] for form in cases.FORMS] == [verdict] * 2
    assert checks["720p forward, 16-bit, pooled, row"] == "not run"


def test_a_slow_call_from_python_is_told_from_a_slow_host(load: Any) -> None:
    report, cases = load("attention_report"), load("attention_cases")
    shape = (1, 12, cases.NEVER_SLOWER_LENGTH, 128)
    labels = {"section": "sweep of N", "sparsity": cases.NEVER_SLOWER_SPARSITY, "shape": shape}
    rows = [
        {**labels, "name": report.CUDNN, "ms": 0.6, "replay_ms": 0.6, "host_loop_ms": 2.5},
        {**labels, "name": "SLA2", "ms": 0.8, "replay_ms": 0.1, "host_loop_ms": 5.0},
    ]
    graphs, called = (
        next(check for check in report.check_targets(rows) if how in check["target"])
        for how in ("as graphs", "called from Python")
    )
    assert (graphs["verdict"], called["verdict"]) == ("pass", "FAIL")
    assert "host" not in graphs["by"]
    assert "host 2.0 times as slow as at best" in called["by"]


def test_a_model_variant_that_raised_stays_in_the_table(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = load("model")
    rows = [
        {"name": "Inductor, SDPA flash", "ms": 8.0},
        {"name": "Inductor, SDPA cuDNN", "not_run": "RuntimeError: no kernel"},
        {"name": "sla2: pooled, row", "ms": 2.0},
        {"name": "sla2: linear, block", "ms": 4.0},
    ]
    record = {"machine": {"device": "a device", "torch": "1"}, "num_tokens": 1, "rows": rows}
    assert not model.print_report(record)
    output = capsys.readouterr().out
    assert "not run: RuntimeError: no kernel" in output
    assert "FAIL" in output
    assert model.token_grid(model.LATENT_SHAPE) == (21, 30, 52)


def test_a_case_without_time_left_is_kept_with_its_reason(load: Any, tmp_path: Path) -> None:
    attention, cases, floors = load("attention"), load("attention_cases"), load("floors")
    ceilings = floors.Ceilings(1e12, {"16-bit": 1e12})
    preset = cases.Preset((), (), (), (), (), 0.0, limit_s=-1.0)
    run = attention.Run(torch.device("cpu"), preset, ceilings, tmp_path / "attention.json")
    run.case(lambda: pytest.fail("must not start"), section="forward", name="late")
    assert "time was spent" in run.rows[0]["not_run"]
    assert json.loads((tmp_path / "attention.json").read_text())["rows"] == run.rows


def test_calibration_is_timed_after_its_kernels_are_compiled_and_scaled_in_the_open() -> None:
    sizes = {"heads": 1, "head-dim": 16, "tokens": 512, "layers": 1, "steps": 4, "batches": 2}
    output = run_benchmark("calibration", *(part for name, n in sizes.items() for part in (f"--{name}", str(n))))
    for part in ("the blocked implementation", "attentions.0", "for a short calibration that compiles", "scaled to 30"):
        assert part in output


def test_every_group_of_sites_but_the_first_costs_another_pass_of_the_full_model(load: Any) -> None:
    sizes = {"tokens": 1024, "heads": 8, "head_dim": 128, "batches": 16, "layers": 2, "full_layers": 30}
    args = argparse.Namespace(**sizes, memory_gib=1.0, sparsity=[0.95, 0.97])
    # 112 MiB a layer, so nine layers fit in a group.
    figures = load("calibration").scale_up(args, measured=10.0, forward=0.5, dtype=torch.bfloat16)
    assert figures["full_groups"] == 4
    assert figures["full_passes_seconds"] == 16 * 0.5 * 15 * 3
    assert figures["full_seconds"] == 10 * 15 + 16 * 0.5 * 15 * 3
    assert figures["full_seconds_per_sparsity"] == figures["full_seconds"] / 2


@pytest.mark.slow
def test_the_export_benchmark_runs_packages_without_this_package() -> None:
    command = [sys.executable, "-m", "benchmarks.export", "--tiny"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    values = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert float(values["ratio"]) > 0
    assert float(values["difference_from_eager"]) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compile_times_are_those_of_fresh_processes_in_inference_and_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--layers", "1", "--rounds", "1", "--save"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, check=True)
    rows = json.loads((tmp_path / "compile_time.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["inference", "training"]
    for row in rows:
        # With caches of another run, or with nothing converted, either would be far less.
        assert 0 < row["passes_s"] < row["inductor_s"] > 5
        assert row["ratio"] == pytest.approx(row["sla2_s"] / row["inductor_s"], rel=1e-3)
