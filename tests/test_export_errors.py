"""What `export` refuses, what it says then, and that it leaves no file behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_models import compile_aot
from small_models import SMALL, SMALL_OPTIONS, Attention, Blocks, tokens
from torch import Tensor, nn
from torch.export import Dim

from sla2_compile import SLA2Config, export
from sla2_compile.cli import main
from sla2_compile.exporters import aoti


def refusal(error: type[Exception], path: Path, model: Any = None, args: Any = None, **kwargs: Any) -> str:
    """The message of an export that must fail; nothing may be left in the folder of `path`."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    with pytest.raises(error) as info:
        export(
            Blocks().eval() if model is None else model,
            (tokens(100),) if args is None else args,
            path,
            **{"config": SMALL, **kwargs},
        )
    assert (sorted(path.parent.iterdir()) if path.parent.is_dir() else []) == before
    return str(info.value)


@pytest.mark.parametrize(
    "error, kwargs, message",
    [
        (ValueError, {"format": "tflite"}, "format: expected one of 'pt2', 'aoti', 'onnx', got 'tflite'"),
        (ValueError, {"onnx_op": "mine"}, "onnx_op: expected one of 'standard', 'custom', got 'mine'"),
        (ValueError, {"onnx_op": "custom"}, "onnx_op: expected 'standard' for 'pt2', got 'custom'"),
        (ValueError, {"format": "aoti", "portable": True}, "portable: expected False for 'aoti', got True"),
        (ValueError, {"format": "onnx"}, "path: expected a name that ends in .onnx for 'onnx', got 'model.pt2'"),
        (TypeError, {"args": tokens(100)}, "args: expected a tuple of example inputs, got Tensor"),
        (TypeError, {"model": torch.sin}, "model: expected a torch.nn.Module, got builtin_function_or_method"),
        (ValueError, {"model": Blocks()}, "model: expected a Blocks in eval mode, got one in training; call .eval()"),
        (ValueError, {"config": {"sparsty": 0.5}}, "options: unknown key 'sparsty'"),
        (ValueError, {"config": SLA2Config(include=("nothing",))}, "include"),
    ],
)
def test_a_bad_argument_is_named(error: type[Exception], kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(error, tmp_path / "model.pt2", **kwargs)


@pytest.mark.parametrize("place", ["missing/model.pt2", "file/model.pt2", "folder.pt2"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pt2").mkdir()

    class Untouched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("work has begun")

    assert "path: expected a" in refusal(OSError, tmp_path / place, Untouched().eval())


def test_a_model_that_does_not_trace_names_the_reason_and_the_line(tmp_path: Path) -> None:
    class Branches(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x
            return super().forward(x)

    message = refusal(ValueError, tmp_path / "model.pt2", Branches().eval())
    assert "model: expected a Branches that can be traced as one graph" in message
    assert f"{__file__}:" in message
    assert "if x.sum() > 0:" in message


def test_a_range_of_lengths_that_the_blocks_forbid_names_the_block_sizes(tmp_path: Path) -> None:
    shapes = ({1: Dim("length", min=8, max=1000)},)
    message = refusal(ValueError, tmp_path / "model.pt2", dynamic_shapes=shapes)
    assert "dynamic_shapes: expected lengths from 17 tokens on at blocks.0" in message
    assert "block_q=16, block_k=16" in message
    assert "begins at 8" in message


def test_a_range_of_lengths_across_min_seq_len_names_it(tmp_path: Path) -> None:
    shapes = ({1: Dim("length", min=40, max=1000)},)
    config = {**SMALL_OPTIONS, "min_seq_len": 64}
    message = refusal(ValueError, tmp_path / "model.pt2", dynamic_shapes=shapes, config=config)
    assert "from 64 tokens on at blocks.0, because of min_seq_len=64" in message


def test_a_range_that_the_model_itself_forbids_names_the_one_it_allows(tmp_path: Path) -> None:
    class Branches(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[1] <= 300 else x

    shapes = ({1: Dim("length", min=40, max=1000)},)
    message = refusal(ValueError, tmp_path / "model.pt2", Branches().eval(), dynamic_shapes=shapes)
    assert "dynamic_shapes: expected ranges that the model and its attention's blocks allow" in message
    assert "max=300" in message


def test_missing_packages_are_named_with_the_line_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = refusal(ImportError, tmp_path / "model.onnx", format="onnx")
    assert "expected onnxscript for 'onnx'" in message
    assert "pip install 'sla2-compile[export]'" in message


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti, "COMPILERS", ("no-such-compiler",))
    assert "C++ compiler for 'aoti'" in refusal(OSError, tmp_path / "model.pt2", format="aoti")


def test_missing_headers_of_the_cuda_toolkit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti, "device_of", lambda *inputs: torch.device("cuda"))
    monkeypatch.setattr(aoti, "missing_for_triton", lambda device: None)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert "no cuda.h, crt/host_defines.h, nv/target in any toolkit" in refusal(
        OSError, tmp_path / "model.pt2", format="aoti"
    )
    home = tmp_path / "cuda"
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda.h").touch()
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
    message = refusal(OSError, tmp_path / "model.pt2", format="aoti")
    assert f"no crt/host_defines.h, nv/target in {home / 'include'}" in message


def test_bfloat16_is_refused_for_onnx(tmp_path: Path) -> None:
    model, x = Blocks().eval().bfloat16(), tokens(100).bfloat16()
    message = refusal(NotImplementedError, tmp_path / "model.onnx", model, (x,), format="onnx")
    assert "expected a float32 or float16 model" in message


def test_strict_refuses_a_site_that_cannot_be_converted(tmp_path: Path) -> None:
    config = SLA2Config(block_q=16, block_k=16, min_seq_len=0, strict=True)
    message = refusal(ValueError, tmp_path / "model.pt2", Attention(is_causal=True).eval(), config=config)
    assert "strict: expected every site that was asked for to be converted" in message


def test_without_a_sparsity_the_cautious_default_is_announced(tmp_path: Path) -> None:
    options = {name: value for name, value in SMALL_OPTIONS.items() if name != "sparsity"}
    with pytest.warns(UserWarning, match="no sparsity was given, so the cautious default of 0.75"):
        report = export(Blocks().eval(), (tokens(200),), tmp_path / "model.pt2", config=options)
    assert {site["requested_sparsity"] for site in report.metadata["sites"]} == {0.75}


def test_a_model_without_attention_is_written_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no attention that the backend knows"):
        report = export(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), tmp_path / "model.pt2")
    assert report.metadata["sites"] == []


def test_a_compiled_model_still_gives_the_same_after_an_export(tmp_path: Path) -> None:
    model = Blocks().eval()
    compiled = compile_aot(model)
    with torch.no_grad():
        before = compiled(tokens(100))
        export(model, (tokens(100),), tmp_path / "model.pt2", config=SMALL)
        assert torch.equal(compiled(tokens(100)), before)


# The command

WAN = """{
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 64
}"""
INPUTS = ["hidden_states=1x4x4x16x16", "timestep=1:int64", "encoder_hidden_states=1x8x16"]


def run_command(folder: Path, *more: str) -> int:
    (folder / "config.json").write_text(WAN)
    inputs = [word for text in INPUTS for word in ("--input", text)]
    options = ["--option", "sparsity=0.75", "--option", "min_seq_len=200", "--option", "block_k=16"]
    source, path = str(folder / "config.json"), str(folder / "wan.pt2")
    return main(["export", "WanTransformer3DModel", source, path, *inputs, *options, *more])


def test_the_command_writes_a_file_of_dynamic_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert run_command(tmp_path, "--dynamic", "hidden_states.2=4:9") == 0
    out = capsys.readouterr().out
    assert "1 of 2 sites converted" in out
    assert "1x4x7x16x16" in out
    assert torch.export.load(tmp_path / "wan.pt2").graph_module is not None


@pytest.mark.parametrize(
    "more, message",
    [
        (["--dynamic", "hidden_states=3:9"], "--dynamic: expected NAME.DIM=MIN:MAX"),
        (["--dtype", "int8"], "--dtype: expected a floating dtype"),
        (["--input", "mask=1"], "--input: expected hidden_states, timestep"),
        (["--format", "onnx"], "path: expected a name that ends in .onnx"),
        (["--dynamic", "hidden_states.2=1:9"], "dynamic_shapes: expected lengths from"),
        (["--state", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_the_command_explains_bad_input(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    assert run_command(tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
