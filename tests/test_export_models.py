"""Models of diffusers and transformers, unedited, in every format; and one that is calibrated and low-bit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import CASES, CONFIG
from test_export import KINDS, NEED_ONNX, onnx_nodes, path_for
from tolerances import EXPORTED
from torch import nn
from torch.export import Dim

from sla2_compile import ExportReport, calibrate, export

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

OPTIONS = {"block_q": CONFIG.block_q, "block_k": CONFIG.block_k, "min_seq_len": CONFIG.min_seq_len}


def combinations() -> list[Any]:
    pairs = [(name, kind) for name in CASES for kind in KINDS]
    fast = {("wan", "pt2"), ("hunyuan", "pt2"), ("vit", "pt2")}
    return [pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow) for pair in pairs]


def converted_sites(report: ExportReport) -> tuple[str, ...]:
    return tuple(site["name"] for site in report.metadata["sites"] if site["verdict"] == "sla2")


@pytest.mark.parametrize("name, kind", combinations())
def test_a_model_exports_with_its_long_attention_converted_and_agrees_with_eager(
    name: str, kind: str, tmp_path: Path
) -> None:
    case = CASES[name]
    report = export(case.model(), (), path_for(tmp_path, kind), kwargs=case.inputs, config=CONFIG, **KINDS[kind])
    assert converted_sites(report) == case.sites
    (check,) = report.checks
    assert check.difference < EXPORTED
    assert check.difference_from_dense > EXPORTED


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_video_model_exports_for_any_number_of_frames(kind: str, tmp_path: Path) -> None:
    if kind == "aoti" and torch.__version__ < "2.13":
        pytest.skip("AOTInductor compiles no loops before 2.13")
    case = CASES["wan"]
    shapes: dict[str, Any] = {**dict.fromkeys(case.inputs), "hidden_states": {2: Dim("frames", min=4, max=20)}}
    # The grid, which varies with the frames, cannot be an attribute of a node.
    config = dataclasses.replace(CONFIG, infer_layout=kind != "custom")
    report = export(
        case.model(),
        (),
        path_for(tmp_path, kind),
        kwargs=case.inputs,
        config=config,
        dynamic_shapes=shapes,
        **KINDS[kind],
    )
    assert ("in tiles of" in report.metadata["sites"][0]["reason"]) == config.infer_layout
    assert [check.input_shapes[0][2] for check in report.checks] == [4, 7]
    assert all(check.difference < EXPORTED for check in report.checks)


@pytest.mark.slow
def test_a_grid_that_varies_is_refused_for_a_custom_onnx_node(tmp_path: Path) -> None:
    path, case = path_for(tmp_path, "custom"), CASES["wan"]
    shapes: dict[str, Any] = {**dict.fromkeys(case.inputs), "hidden_states": {2: Dim("frames", min=4, max=20)}}
    with pytest.raises(NotImplementedError, match="a fixed grid"):
        export(case.model(), (), path, kwargs=case.inputs, config=CONFIG, dynamic_shapes=shapes, **KINDS["custom"])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def low_bit_model() -> nn.Module:
    """A calibrated Wan that was converted to INT8 and FP8."""
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    from sla2_compile.quant import SLA2QATConfig, is_attention_site

    case = CASES["wan"]
    model = case.model()
    noise = torch.Generator().manual_seed(0)
    batches = [{**case.inputs, "hidden_states": torch.randn(1, 4, 4, 16, 16, generator=noise)} for _ in range(4)]
    calibrate(model, batches, sparsity=(0.8, 0.6), config=CONFIG, steps=5)
    formats: dict[str, Any] = {"qk_format": "int8", "pv_format": "fp8"}
    for step in ("prepare", "convert"):
        quantize_(model, SLA2QATConfig(**formats, step=step), filter_fn=is_attention_site)
    return model


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "onnx" else pytest.mark.slow) for kind in KINDS]
)
def test_a_calibrated_low_bit_model_exports_at_what_it_was_calibrated_for(
    kind: str, low_bit_model: nn.Module, tmp_path: Path
) -> None:
    path = path_for(tmp_path, kind)
    report = export(low_bit_model, (), path, kwargs=CASES["wan"].inputs, config=OPTIONS, **KINDS[kind])
    site = report.metadata["sites"][0]
    assert (site["requested_sparsity"], site["qk_format"], site["pv_format"]) == (0.8, "int8", "fp8")
    assert report.checks[0].difference < EXPORTED
    if kind in NEED_ONNX:
        assert "QuantizeLinear" in {node.op_type for node in onnx_nodes(path)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arguments", [("export_pt2", []), ("export_onnx", ["--int8"]), ("export_aoti", ["--side", "48"])]
)
def test_an_example_runs_to_its_end(name: str, arguments: list[str]) -> None:
    if name == "export_onnx":
        pytest.importorskip("onnxruntime")
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert " sites converted" in result.stdout
