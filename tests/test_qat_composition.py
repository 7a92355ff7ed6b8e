"""Low-bit attention beside what else is done to a model: quantised linears, LoRA, checkpoints, autocast, FSDP2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_models import compile_aot, parameters, randomize, with_learned_reference
from small_models import SMALL, SMALL_OPTIONS, Attention, Blocks, tokens
from tolerances import LOW_BIT_GRADIENT, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_ranks import run_in_two_processes

from sla2_compile import prepare
from sla2_compile.config import SLA2Config

pytest.importorskip("torchao")
from torchao import quantization
from torchao.quantization import qat, quantize_

from sla2_compile.quant import SLA2QATConfig, is_attention_site

LOW_BIT = SLA2Config(**SMALL_OPTIONS, qk_format="int8", pv_format="fp8")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def low_bit(model: nn.Module, step: str = "prepare") -> Any:
    """`model` prepared, with random state, INT8 and FP8."""
    torch.manual_seed(0)
    prepare(model, tokens(), config=SMALL)
    randomize(model)
    quantize_(model, SLA2QATConfig("int8", "fp8", step), filter_fn=is_attention_site)
    return model


def expected(model: Any, x: Tensor) -> Tensor:
    return with_learned_reference(model, [parameters(block) for block in model.blocks], x, config=LOW_BIT)


def gradients(out: Tensor, model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(out.square().mean(), tuple(trained.values())), strict=True))


def assert_same_gradients(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0) -> None:
    assert actual.keys() == wanted.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(
            grad, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text
        )


LINEARS = {
    "int8 weights": quantization.Int8WeightOnlyConfig,
    "float8 weights": quantization.Float8WeightOnlyConfig,
    "int8 weights and activations": quantization.Int8DynamicActivationInt8WeightConfig,
    "float8 weights and activations": quantization.Float8DynamicActivationFloat8WeightConfig,
}


@pytest.mark.parametrize("kind, attention_first", [("int8 weights", False), *((kind, True) for kind in LINEARS)])
@torch.no_grad()
def test_linear_layers_may_be_quantised_before_or_after_the_attention(kind: str, attention_first: bool) -> None:
    device = "cpu"
    if kind == "float8 weights and activations":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("torchao's float8 activations need a CUDA device of compute capability 8.9")
        device = "cuda"
    torch.manual_seed(0)
    model = prepare(Blocks(), tokens(), config=SMALL).to(device)
    steps = [
        lambda: quantize_(model, SLA2QATConfig("int8", "fp8", "convert"), filter_fn=is_attention_site),
        lambda: quantize_(model, LINEARS[kind]()),
    ]
    for step in steps if attention_first else steps[::-1]:
        step()
    assert type(model.blocks[0].to_q.weight) is not nn.Parameter
    assert type(parameters(model.blocks[0]).proj_q) is nn.Parameter
    x = tokens().to(device)
    out = compile_aot(model, fullgraph=True)(x)
    torch.testing.assert_close(out, expected(model, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, model(x), rtol=1e-4, atol=1e-5)


def test_torchaos_own_training_of_linear_layers_goes_on_beside_it_and_converts_on_its_own() -> None:
    model, x = low_bit(Blocks()), tokens()
    base = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
    )
    quantize_(model, qat.QATConfig(base, step="prepare"))
    assert isinstance(model.blocks[0].to_q, qat.FakeQuantizedLinear)
    out = compile_aot(model, fullgraph=True)(x)
    reference = expected(model, x)
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
    # The op's backward is in 16 bit (see LOW_BIT_GRADIENT), the reference's goes through the rounded attention.
    wanted = gradients(reference, model)
    for name, grad in gradients(out, model).items():
        if not name.endswith("to_k.bias"):  # a sum that cancels
            assert relative_error(grad, wanted[name]) < LOW_BIT_GRADIENT["k"], name
    quantize_(model, SLA2QATConfig("int8", "fp8", "convert"), filter_fn=is_attention_site)
    quantize_(model, qat.QATConfig(base, step="convert"))
    torch._dynamo.reset()
    with torch.no_grad():
        converted = compile_aot(model)(x)
    assert ((converted - out).norm() / out.norm()).item() < 1e-2


def test_lora_trains_adapters_and_the_mixing_around_low_bit_attention() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(low_bit(Blocks()), peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    for name, parameter in model.named_parameters():
        # peft freezes all that it does not add.
        parameter.requires_grad_(parameter.requires_grad or (".sla2." in name and ".alpha_" in name))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    compiled, losses = compile_aot(model), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(4):
        loss = compiled(tokens()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rpartition(".")[2] for name in changed if ".sla2." in name} == {"alpha_logit", "alpha_gain"}
    assert all(".lora_" in name or ".alpha_" in name for name in changed)
    assert any(".lora_B." in name for name in changed)
    torch.testing.assert_close(compiled(tokens()), expected(model.base_model.model, tokens()), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_no_bit_of_the_gradients() -> None:
    class Checkpointed(Blocks):
        use_checkpoint = True

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x))
            return x

    model = low_bit(Checkpointed())
    saved = gradients(compile_aot(model, fullgraph=True)(tokens()), model)
    model.use_checkpoint = False
    torch._dynamo.reset()
    assert_same_gradients(saved, gradients(compile_aot(model, fullgraph=True)(tokens()), model))


def test_under_autocast_attention_is_16_bit_outside_and_the_router_stays_exact() -> None:
    model, x = low_bit(Blocks()), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = compile_aot(model, fullgraph=True)(x)
    reference = expected(model, x)
    assert ((out - reference).norm() / reference.norm()).item() < 2e-2
    wanted = gradients(reference, model)
    # Those of the keys' bias and of the gain are sums that cancel: what 16 bits leave of them is seen beside the rest.
    total = torch.stack([grad.norm() for grad in wanted.values()]).norm()
    for name, grad in gradients(out.float(), model).items():
        assert grad.dtype == torch.float32
        assert (grad - wanted[name]).norm() < 0.05 * wanted[name].norm() + 1e-3 * total, name


def test_the_backend_trains_with_inductor_as_without_it() -> None:
    model = low_bit(Attention())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="sla2", options=SMALL_OPTIONS, fullgraph=True)
    assert_same_gradients(gradients(compiled(tokens()), model), gradients(compile_aot(twin)(tokens()), twin), 1e-4)


def test_sharded_by_fsdp2_over_two_ranks_it_trains_as_on_one(tmp_path: Path) -> None:
    run_in_two_processes("qat_fsdp_worker.py", tmp_path)
