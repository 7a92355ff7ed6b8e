"""`SLA2QATConfig`: which sites it reaches, how the formats ride with the state, and who wins where two are given."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_models import compile_aot, parameters, randomize, with_learned_reference
from small_models import SMALL, SMALL_OPTIONS, WIDTH, Attention, Blocks, KeepGraphs, tokens
from test_state_io import run
from torch import Tensor, nn

from sla2_compile import calibrate, explain, load_state, prepare, save_state
from sla2_compile.config import SLA2Config
from sla2_compile.learned_state import (
    CallSettings,
    Entry,
    LearnedParameters,
    LowBit,
    OwnerSettings,
    calibration_context,
)
from sla2_compile.passes.pipeline import convert
from sla2_compile.prepare import owner_state

pytest.importorskip("torchao")
from torchao.quantization import FqnToConfig, quantize_

from sla2_compile.quant import SLA2QATConfig, is_attention_site

LOW_BIT = SLA2Config(**SMALL_OPTIONS, qk_format="int8", pv_format="fp8")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def low_bit_blocks(step: str = "prepare") -> Blocks:
    """Two prepared attentions with random state, INT8 and FP8."""
    torch.manual_seed(0)
    model = prepare(Blocks(), tokens(), config=SMALL)
    randomize(model)
    quantize_(model, SLA2QATConfig(qk_format="int8", pv_format="fp8", step=step), filter_fn=is_attention_site)
    return model


def reference(model: Blocks, x: Tensor, config: SLA2Config = LOW_BIT) -> Tensor:
    return with_learned_reference(model, [parameters(block) for block in model.blocks], x, config=config)


def op_settings(model: nn.Module, config: SLA2Config = SMALL) -> list[dict[str, Any]]:
    """The keyword arguments of every attention that a compiled model calls."""
    graphs = KeepGraphs(lambda gm: convert(gm, config))
    torch.compile(model, backend=graphs)(tokens())
    nodes = [node for gm in graphs.graphs for node in gm.graph.nodes]
    return [node.kwargs for node in nodes if node.target is torch.ops.sla2.attention.default]


# What the config is


def test_a_format_or_step_that_does_not_exist_is_an_error_that_lists_those_that_do() -> None:
    with pytest.raises(ValueError, match="qk_format: expected one of None, 'int8', 'fp8', got 'int4'"):
        SLA2QATConfig(qk_format="int4")
    with pytest.raises(ValueError, match="pv_format: expected one of None, 'fp8', got 'int8'"):
        SLA2QATConfig(pv_format="int8")
    with pytest.raises(ValueError, match="step: expected 'prepare' or 'convert', got 'train'"):
        SLA2QATConfig(step="train")


def test_torchaos_own_filter_is_refused_with_the_one_to_pass() -> None:
    model = prepare(Blocks(), tokens(), config=SMALL)
    before = copy.deepcopy(model.state_dict())
    for plain in (model, nn.Linear(4, 4)):
        with pytest.raises(ValueError, match=r"a Linear .*filter_fn=sla2_compile\.quant\.is_attention_site"):
            quantize_(plain, SLA2QATConfig())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_site_is_reached_wherever_its_owner_is() -> None:
    class Outer(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(self.inner(x))

    model = prepare(Outer(), tokens(), config=SMALL)
    config = SLA2QATConfig("fp8", "fp8", "convert")
    quantize_(model, config, filter_fn=is_attention_site)
    for owner in (model, model.inner):
        assert owner_state(owner).settings.low_bit == LowBit("fp8", "fp8", "convert")
    assert all((each["qk_format"], each["pv_format"]) == ("fp8", "fp8") for each in op_settings(model))


def test_sites_can_be_chosen_by_name_as_torchao_does() -> None:
    model = prepare(Blocks(), tokens(), config=SMALL)
    quantize_(model, FqnToConfig({r"re:blocks\.1\.sla2": SLA2QATConfig()}), filter_fn=None)
    assert [owner_state(block).settings.low_bit is None for block in model.blocks] == [True, False]
    quantize_(model, SLA2QATConfig("fp8"), filter_fn=lambda module, name: is_attention_site(module) and "0" in name)
    assert [each["qk_format"] for each in op_settings(model)] == ["fp8", "int8"]


# What it does


@pytest.mark.parametrize("step, fake_quant", [("prepare", True), ("convert", False)])
def test_the_formats_reach_every_attention_and_its_numbers(step: str, fake_quant: bool) -> None:
    model, x = low_bit_blocks(step), tokens()
    for settings in op_settings(model):
        assert (settings["qk_format"], settings["pv_format"]) == ("int8", "fp8")
        assert settings["fake_quant"] is fake_quant
    torch.testing.assert_close(compile_aot(model)(x), reference(model, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(reference(model, x), reference(model, x, SMALL), rtol=1e-4, atol=1e-5)


def test_converting_changes_no_bit_where_the_low_bit_kernels_are_the_rounding_themselves() -> None:
    model = low_bit_blocks()
    prepared = compile_aot(model)(tokens())
    quantize_(model, SLA2QATConfig(qk_format="int8", pv_format="fp8", step="convert"), filter_fn=is_attention_site)
    torch._dynamo.reset()
    assert torch.equal(compile_aot(model)(tokens()), prepared)


def test_a_compiled_model_notices_that_the_formats_changed() -> None:
    model, x = prepare(Blocks(), tokens(), config=SMALL), tokens()
    compiled = compile_aot(model)
    torch.testing.assert_close(compiled(x), reference(model, x, SMALL), rtol=1e-4, atol=1e-5)
    quantize_(model, SLA2QATConfig("int8", "fp8"), filter_fn=is_attention_site)
    torch.testing.assert_close(compiled(x), reference(model, x), rtol=1e-4, atol=1e-5)
    quantize_(model, SLA2QATConfig(None, None), filter_fn=is_attention_site)
    torch.testing.assert_close(compiled(x), reference(model, x, SMALL), rtol=1e-4, atol=1e-5)


def test_without_our_backend_the_model_stays_dense() -> None:
    model = low_bit_blocks()
    torch.manual_seed(0)
    assert torch.equal(model(tokens()), Blocks()(tokens()))


def test_explain_names_the_formats() -> None:
    for step, ending in (("prepare", "QK int8, PV fp8 (fake-quantised)"), ("convert", "QK int8, PV fp8")):
        (first, _) = explain(low_bit_blocks(step), tokens(), config=SMALL).to_dict()["sites"]
        assert first["reason"].endswith(ending)


# Formats from two sides


def test_formats_in_the_options_that_agree_with_the_state_are_no_contradiction() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings = op_settings(low_bit_blocks(), SLA2Config(**SMALL_OPTIONS, qk_format="int8", pv_format="fp8"))
    # They leave open how the formats are computed, and that the state knows.
    assert all(each["fake_quant"] for each in settings)


def test_formats_in_the_options_that_contradict_the_state_win_with_a_warning_or_are_an_error_under_strict() -> None:
    message = r"blocks\.0: its state has the formats qk_format='int8', pv_format='fp8', and is used with 'fp8', None"
    with pytest.warns(UserWarning, match=message):
        settings = op_settings(low_bit_blocks(), SLA2Config(**SMALL_OPTIONS, qk_format="fp8"))
    assert all((each["qk_format"], each["pv_format"]) == ("fp8", None) for each in settings)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: expected learned state to fit"):
        compile_aot(low_bit_blocks(), SLA2Config(**SMALL_OPTIONS, qk_format="fp8", strict=True))(tokens())


def calibrated(model: Blocks, config: SLA2Config) -> Blocks:
    """`model` with state as if calibrated under a config."""
    context = calibration_context(config)
    for block in model.blocks:
        call = CallSettings(0, 2, 16, (Entry(500_000, "pooled", "row"),), 500_000, context)
        owner_state(block).replace_call(call, [LearnedParameters(2, 16)])
    return model


def test_training_calibrated_state_for_formats_is_no_contradiction() -> None:
    model = calibrated(low_bit_blocks(), SMALL)
    assert owner_state(model.blocks[0]).settings.low_bit == LowBit("int8", "fp8", "prepare")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compile_aot(model, SLA2Config(**SMALL_OPTIONS, strict=True))(tokens())


def test_formats_of_the_options_alone_that_the_calibration_did_not_have_are_said_as_before() -> None:
    model = calibrated(prepare(Blocks(), tokens(), config=SMALL), SMALL)
    with pytest.warns(UserWarning, match="calibrated with qk_format=None, and is used with 'int8'"):
        compile_aot(model, LOW_BIT)(tokens())


def test_calibrating_after_the_formats_were_chosen_learns_for_them_and_keeps_them() -> None:
    model = low_bit_blocks()
    batches = [tokens(64), tokens(64) * 0.9, tokens(64) * 1.1]
    calibrate(model, batches, sparsity=0.5, config=SMALL, steps=4, tails=("pooled",), progress=False)
    settings = owner_state(model.blocks[0]).settings
    assert settings.low_bit == LowBit("int8", "fp8", "prepare")
    assert dict(settings.calls[0].context)["qk_format"] == "int8"


# Files


def test_settings_written_before_there_were_formats_are_still_read() -> None:
    text = OwnerSettings(1, (CallSettings(0, 2, 16),)).to_json().replace('"low_bit":null,', "")
    assert "low_bit" not in text
    assert OwnerSettings.from_json(text) == OwnerSettings(1, (CallSettings(0, 2, 16),))


@pytest.mark.parametrize("how", ["state_dict", "file"])
def test_formats_return_with_the_state(how: str, tmp_path: Path) -> None:
    model, fresh = low_bit_blocks("convert"), Blocks()
    if how == "file":
        save_state(model, tmp_path / "state.safetensors")
        load_state(fresh, tmp_path / "state.safetensors")
    else:
        prepare(fresh, tokens(), config=SMALL).load_state_dict(model.state_dict())
    for block in fresh.blocks:
        assert owner_state(block).settings.low_bit == LowBit("int8", "fp8", "convert")


def test_a_fine_tuned_converted_and_saved_model_gives_the_same_bits_in_a_new_process(tmp_path: Path) -> None:
    weights, state = tmp_path / "weights.pt", tmp_path / "state.safetensors"
    training = f"""
import torch
from learned_models import compile_aot
from small_models import SMALL, Blocks, tokens
from sla2_compile import calibrate, save_state
from sla2_compile.quant import SLA2QATConfig, is_attention_site
from torchao.quantization import quantize_
torch.manual_seed(0)
model = Blocks()
calibrate(model, [tokens(64), tokens(80)], sparsity=0.5, config=SMALL, steps=4, tails=("pooled",), progress=False)
quantize_(model, SLA2QATConfig("int8", "fp8", "prepare"), filter_fn=is_attention_site)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
compiled = compile_aot(model)
for _ in range(3):
    (compiled(tokens(64)) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
quantize_(model, SLA2QATConfig("int8", "fp8", "convert"), filter_fn=is_attention_site)
torch.save({{k: v for k, v in model.state_dict().items() if ".sla2." not in k}}, {str(weights)!r})
save_state(model, {str(state)!r})
"""
    loading = f"""
import torch
from small_models import Blocks
from sla2_compile import load_state
model = Blocks()
model.load_state_dict(torch.load({str(weights)!r}, weights_only=True))
load_state(model, {str(state)!r})
"""
    printing = """
import hashlib
from learned_models import compile_aot
from small_models import tokens
with torch.no_grad():
    out = compile_aot(model)(tokens(64))
print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""
    trained = run(training + printing)
    assert trained == run(loading + printing)


# Training


def test_the_weights_and_the_mixing_learn_through_the_rounding_and_the_router_stays() -> None:
    model, x = low_bit_blocks(), tokens()
    router = parameters(model.blocks[0]).proj_q.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    compiled, losses = compile_aot(model), []
    target = torch.randn(1, 64, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(25):
        loss = (compiled(x) - target).square().mean()
        loss.backward()
        assert parameters(model.blocks[0]).alpha_logit.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(parameters(model.blocks[0]).proj_q, router)
