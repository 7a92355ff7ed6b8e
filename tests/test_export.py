"""`export` writes files that compute what the backend computes, run elsewhere, and say what is in them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_models import TwoSites, compile_aot, parameters, randomize
from small_models import SMALL, SMALL_OPTIONS, Attention, Blocks, tokens
from tolerances import EXPORTED, relative_error
from torch import Tensor, nn
from torch.export import Dim

from sla2_compile import ExportReport, export, prepare
from sla2_compile.config import SLA2Config
from sla2_compile.exporters import check
from sla2_compile.exporters.trace_model import short_names
from sla2_compile.kernels.blocks import max_kept_blocks

LENGTHS = ({1: Dim("length", min=40, max=1000)},)

# How each kind of file is made.
KINDS: dict[str, dict[str, Any]] = {
    "pt2": {"format": "pt2"},
    "portable": {"format": "pt2", "portable": True},
    "onnx": {"format": "onnx"},
    "custom": {"format": "onnx", "onnx_op": "custom"},
    "aoti": {"format": "aoti"},
}
NEED_ONNX = ("onnx", "custom")


class OneBlock(nn.Module):
    """A residual attention, found as `block`."""

    def __init__(self, **call: Any) -> None:
        super().__init__()
        self.block = Attention(**call)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


@dataclass(frozen=True)
class Exported:
    """A file, and the prepared model with learned state of its own that it was made from."""

    kind: str
    model: nn.Module
    path: Path
    report: ExportReport


def model_of(kind: type[nn.Module] = OneBlock) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def path_for(folder: Path, kind: str) -> Path:
    if kind in NEED_ONNX:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    return folder / f"model.{'onnx' if kind in NEED_ONNX else 'pt2'}"


def run_elsewhere(kind: str, path: Path, *inputs: Tensor) -> list[Tensor]:
    """What a file gives for each input in a new process that has not imported this package."""
    folder = path.parent
    torch.save([(x.detach(),) for x in inputs], folder / "inputs")
    script = str(Path(__file__).with_name("run_artefact.py"))
    command = [sys.executable, script, kind, *map(str, (path, folder / "inputs", folder / "outputs"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False"
    return [out[0] if isinstance(out, (list, tuple)) else out for out in torch.load(folder / "outputs")]


def onnx_nodes(path: Path) -> Iterator[Any]:
    """All nodes of an ONNX model, also of the graphs and functions in it."""
    import onnx_ir as ir

    model = ir.load(path)
    for graph in (model.graph, *model.functions.values()):
        yield from ir.traversal.RecursiveGraphIterator(graph)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A file of each kind, for lengths of 40 to 1000 tokens; the AOTInductor package for 100 and with one attention."""

    @cache
    def make(kind: str) -> Exported:
        path = path_for(tmp_path_factory.mktemp(kind), kind)
        model = model_of(OneBlock if kind == "aoti" else Blocks)
        prepare(model, tokens(100), config=SMALL)
        randomize(model)
        lengths = None if kind == "aoti" else LENGTHS
        report = export(model, (tokens(100),), path, config=SMALL, dynamic_shapes=lengths, **KINDS[kind])
        return Exported(kind, model, path, report)

    return make


EXCEPT_PORTABLE = ["pt2", "onnx", "custom", "aoti"]
PORTABLE, CUSTOM = (pytest.param(kind, marks=pytest.mark.slow) for kind in ("portable", "custom"))

# Results


@pytest.mark.parametrize("kind", [PORTABLE, "onnx", CUSTOM, "aoti"])
@torch.no_grad()
def test_a_file_runs_without_this_package_and_gives_what_the_backend_gives(
    kind: str, exported: Callable[[str], Exported]
) -> None:
    made = exported(kind)
    compiled = compile_aot(made.model, dynamic=False)
    untrained = compile_aot(model_of(Blocks), dynamic=False)
    inputs = [tokens(100)] if kind == "aoti" else [tokens(100), tokens(333)]
    runner = {"portable": "pt2", "custom": "onnx"}.get(kind, kind)
    for x, out in zip(inputs, run_elsewhere(runner, made.path, *inputs), strict=True):
        assert relative_error(out, compiled(x)) < EXPORTED
        # It is neither dense nor without what was learned.
        for other in (made.model, untrained):
            assert relative_error(out, other(x)) > 10 * EXPORTED


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="AOTInductor compiles no loops before 2.13")
@torch.no_grad()
def test_an_aoti_package_takes_any_length(tmp_path: Path) -> None:
    model, path = model_of(Blocks), path_for(tmp_path, "aoti")
    export(model, (tokens(100),), path, config=SMALL, format="aoti", dynamic_shapes=LENGTHS)
    compiled = compile_aot(model, dynamic=False)
    inputs = tokens(41), tokens(333)
    for x, out in zip(inputs, run_elsewhere("aoti", path, *inputs), strict=True):
        assert relative_error(out, compiled(x)) < EXPORTED


@torch.no_grad()
def test_a_pt2_file_holds_our_operator_and_equals_the_backend_bit_for_bit(exported: Callable[[str], Exported]) -> None:
    made = exported("pt2")
    program = torch.export.load(made.path)
    assert sum(node.target is torch.ops.sla2.attention.default for node in program.graph.nodes) == 2
    for num_tokens in (100, 333):
        x = tokens(num_tokens)
        assert torch.equal(program.module()(x), compile_aot(made.model, dynamic=False)(x))


def test_at_sparsity_0_a_file_is_dense(tmp_path: Path) -> None:
    config = {**SMALL_OPTIONS, "sparsity": 0}
    report = export(model_of(), (tokens(100),), tmp_path / "model.pt2", config=config, portable=True)
    assert report.checks[0].difference_from_dense < 1e-6


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_16_bit_models_are_exported_within_their_own_precision(
    dtype: torch.dtype, error: float, tmp_path: Path
) -> None:
    model = model_of().to(dtype)
    report = export(model, (tokens(100).to(dtype),), tmp_path / "model.pt2", config=SMALL, portable=True)
    assert report.tolerance == error
    assert report.checks[0].difference < error


# ONNX


def test_an_onnx_model_has_standard_operators_only(exported: Callable[[str], Exported]) -> None:
    nodes = list(onnx_nodes(exported("onnx").path))
    assert {node.domain for node in nodes} == {""}
    operators = [node.op_type for node in nodes]
    # A loop over heads, and the router's choice in it.
    assert operators.count("Scan") == 2
    assert operators.count("TopK") == 2


def test_a_custom_onnx_model_has_a_node_for_each_attention_and_one_function_of_standard_operators(
    exported: Callable[[str], Exported],
) -> None:
    import onnx

    model = onnx.load(exported("custom").path)
    nodes = [node for node in model.graph.node if node.domain == "sla2"]
    assert [node.op_type for node in nodes] == ["Attention"] * 2
    values = {each.name: onnx.helper.get_attribute_value(each) for each in nodes[0].attribute}
    assert (values["sparsity_units"], values["block_q"], values["tail"]) == (500_000, 16, b"pooled")
    (function,) = model.functions
    assert (function.domain, function.name) == ("sla2", "Attention")
    assert {node.domain for node in function.node} == {""}
    assert "TopK" not in {node.op_type for node in model.graph.node}


@pytest.mark.slow
def test_attentions_of_different_lengths_have_functions_of_their_own(tmp_path: Path) -> None:
    import onnx

    path, inputs = path_for(tmp_path, "custom"), {"x": tokens(100), "context": tokens(90)}
    export(model_of(TwoSites), (), path, kwargs=inputs, config=SMALL, format="onnx", onnx_op="custom")
    model = onnx.load(path)
    overloads = [node.overload for node in model.graph.node if node.domain == "sla2"]
    assert overloads == [function.overload for function in model.functions] == ["", "1"]


@torch.no_grad()
def test_int8_is_quantize_and_dequantize_linear_in_onnx(tmp_path: Path) -> None:
    path, model, options = path_for(tmp_path, "onnx"), model_of(), {**SMALL_OPTIONS, "qk_format": "int8"}
    report = export(model, (tokens(100),), path, config=options, format="onnx")
    operators = [node.op_type for node in onnx_nodes(path)]
    # Of the queries, the kept keys and the means of all others.
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == 3
    assert report.metadata["sites"][0]["qk_format"] == "int8"
    # The rounding is there, and is the op's own.
    (rounded,) = run_elsewhere("onnx", path, tokens(100))
    assert relative_error(rounded, compile_aot(model, SLA2Config(**options))(tokens(100))) < 1e-5
    assert relative_error(rounded, compile_aot(model)(tokens(100))) > 1e-4


def test_no_value_of_an_onnx_model_is_as_large_as_the_scores_of_all_keys(tmp_path: Path) -> None:
    import onnx

    path, num_tokens, config = path_for(tmp_path, "onnx"), 4096, {"sparsity": 0.95, "min_seq_len": 0}
    export(model_of(), (tokens(num_tokens),), path, config=config, format="onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    graphs = [model.graph, *(x.g for node in model.graph.node for x in node.attribute if x.HasField("g"))]
    sizes = []
    for value in (value for graph in graphs for value in graph.value_info):
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if all(shape):
            sizes.append(math.prod(shape))
    kept = max_kept_blocks(num_tokens, 64, 950_000, 0, 0)
    # The scores of the kept keys are among them, so the graph's shapes are known where it matters.
    assert max(sizes) == num_tokens * kept * 64
    assert max(sizes) < num_tokens**2 / 15


class TwoInputs(Attention):
    """A residual attention with a second input."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return x + 2 * bias + super().forward(x)


def test_keyword_inputs_may_come_in_any_order(tmp_path: Path) -> None:
    path, inputs = path_for(tmp_path, "onnx"), {"bias": tokens(100) + 1, "x": tokens(100)}
    report = export(TwoInputs().eval(), (), path, kwargs=inputs, config=SMALL, format="onnx")
    assert report.checks[0].difference < EXPORTED


# What is in a file


def learned_names(kind: str, path: Path) -> set[str]:
    if kind == "aoti":
        names = torch._inductor.aoti_load_package(str(path)).get_constant_fqns()
    elif kind in NEED_ONNX:
        import onnx

        names = [each.name for each in onnx.load(path).graph.initializer]
    else:
        names = torch.export.load(path).state_dict
    return {name for name in names if "sla2" in name}


@pytest.mark.parametrize("kind", [*EXCEPT_PORTABLE, PORTABLE])
def test_learned_state_is_in_a_file_under_its_name(kind: str, exported: Callable[[str], Exported]) -> None:
    owners = ("block",) if kind == "aoti" else ("blocks.0", "blocks.1")
    parameters = ("proj_q", "proj_k", "alpha_logit", "alpha_gain")
    assert learned_names(kind, exported(kind).path) == {
        f"{owner}.sla2.{name}" for owner in owners for name in parameters
    }


def test_learned_state_in_a_file_is_the_model_s(exported: Callable[[str], Exported]) -> None:
    made = exported("pt2")
    saved = torch.export.load(made.path).state_dict["blocks.1.sla2.proj_q"]
    assert torch.equal(saved, parameters(made.model.get_submodule("blocks.1")).proj_q)


def test_an_owner_of_two_attentions_keeps_their_number_in_the_names(tmp_path: Path) -> None:
    model, inputs = model_of(TwoSites), {"x": tokens(100), "context": tokens(90)}
    prepare(model, config=SMALL, **inputs)
    export(model, (), tmp_path / "model.pt2", kwargs=inputs, config=SMALL)
    names = learned_names("pt2", tmp_path / "model.pt2")
    assert {"sla2.call0.proj_q", "sla2.call1.proj_q"} < names
    assert len(names) == 8


def test_names_keep_what_tells_them_apart() -> None:
    names = [
        "a.sla2.call0_any.x",
        "b.sla2.call0_500000.x",
        "b.sla2.call1_500000.x",
        "c.sla2.call0_1.x",
        "c.sla2.x",
        "w",
    ]
    short = ["a.sla2.x", "b.sla2.call0.x", "b.sla2.call1.x", "c.sla2.call0.x", "c.sla2.x", "w"]
    assert short_names(names) == dict(zip(names, short, strict=True))


@pytest.mark.parametrize("kind", EXCEPT_PORTABLE)
def test_the_metadata_names_versions_sites_sparsity_and_formats(kind: str, exported: Callable[[str], Exported]) -> None:
    made = exported(kind)
    if kind in NEED_ONNX:
        import onnx

        (text,) = (each.value for each in onnx.load(made.path).metadata_props if each.key == "sla2")
    elif kind == "aoti":
        text = torch._inductor.aoti_load_package(str(made.path)).get_metadata()["sla2"]
    else:
        files = {"sla2.json": ""}
        torch.export.load(made.path, extra_files=files)
        text = files["sla2.json"]
    metadata = json.loads(text)
    assert metadata == made.report.metadata
    assert metadata["format"] == KINDS[kind]["format"]
    assert metadata["versions"]["torch"] == torch.__version__
    assert "sla2-compile" in metadata["versions"]
    site = metadata["sites"][0]
    assert (site["verdict"], site["requested_sparsity"]) == ("sla2", 0.5)
    assert (site["qk_format"], site["block_q"], site["tail"]) == (None, 16, "pooled")


def test_the_report_prints_differences_and_times_at_two_lengths(exported: Callable[[str], Exported]) -> None:
    report = exported("pt2").report
    assert [each.input_shapes for each in report.checks] == [((1, 100, 32),), ((1, 40, 32),)]
    assert "2 of 2 sites converted" in str(report)
    assert "1x40x32" in str(report)
    assert min(each.seconds for each in report.checks) > 0


# Checks


def test_a_difference_beyond_the_tolerance_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("before")
    with pytest.raises(ValueError, match=r"tolerance: expected a relative difference of at most 1e-12"):
        export(model_of(), (tokens(100),), path, config=SMALL, tolerance=1e-12, portable=True)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_a_nan_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_difference", lambda found, expected: float("nan"))
    with pytest.raises(ValueError, match="tolerance"):
        export(model_of(), (tokens(100),), tmp_path / "model.pt2", config=SMALL)
    assert not list(tmp_path.iterdir())


def test_the_difference_is_that_of_the_worst_output() -> None:
    large, small = torch.full((4,), 1e6), torch.ones(4)
    assert check._difference([large, 1.01 * small], [large, small]) == pytest.approx(0.01, rel=1e-4)
    assert math.isnan(check._difference([small * float("nan"), large], [small, large]))
    assert check._difference([small], [small, large]) == float("inf")
    assert check._difference([small], [0 * small]) == 2.0


def test_a_model_stays_as_it_was(tmp_path: Path) -> None:
    model = model_of()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    out = model(tokens(100))
    export(model, (tokens(100),), tmp_path / "model.pt2", config=SMALL, portable=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.requires_grad for x in model.parameters())
    assert torch.equal(model(tokens(100)), out)
