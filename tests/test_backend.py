"""The backend: found by name, checked options, Inductor behind it, dense sites untouched, training, recompilation."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import SMALL, SMALL_OPTIONS, WIDTH, Attention, Blocks, count_calls, tokens, with_reference
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from sla2_compile.backend import build_backend, source_hash
from sla2_compile.config import SLA2Config


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def compile_aot(model: Any, config: SLA2Config = SMALL, **kwargs: Any) -> Callable[..., Any]:
    """The model under our passes and AOTAutograd, without Inductor's code generation."""
    return torch.compile(model, backend=build_backend(config, aot_eager), **kwargs)


def test_the_string_sla2_works_in_a_new_process_without_an_import_of_ours() -> None:
    code = """
import sys, torch, torch.nn.functional as F
def f(q):
    return F.scaled_dot_product_attention(q, q, q)
q = torch.randn(1, 2, 4096, 16)
out = torch.compile(f, backend="sla2", options={"sparsity": 0.9})(q)
error = (out - f(q)).norm() / f(q).norm()
print("sla2_compile" in sys.modules, 0 < error.item())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "True"]


def test_inductor_gives_what_the_reference_gives_in_inference_and_training() -> None:
    model, x = Blocks(), tokens(requires_grad=True)
    compiled = torch.compile(model, backend="sla2", options=SMALL_OPTIONS, fullgraph=True)
    parameters = [x, *model.parameters()]
    out, expected = compiled(x), with_reference(model, SMALL, x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), parameters)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_unknown_options_and_modes_are_errors_that_list_the_known() -> None:
    with pytest.raises(Exception, match=r"(?s)unknown key 'sparsty'.*expected any of sparsity, block_q"):
        torch.compile(Attention(), backend="sla2", options={"sparsty": 0.9})(tokens())
    with pytest.raises(Exception, match=r"(?s)mode: expected one of .*'reduce-overhead'.*got 'fast'"):
        torch.compile(Attention(), backend="sla2", mode="fast")(tokens())
    with pytest.raises(Exception, match=r"sparsity: expected a fraction in \[0, 1\), got 1.5"):
        torch.compile(Attention(), backend="sla2", options={"sparsity": 1.5})(tokens())


@pytest.mark.parametrize(
    "arguments", [{"mode": "reduce-overhead"}, {"options": {**SMALL_OPTIONS, "mode": "reduce-overhead"}}]
)
def test_a_mode_reaches_inductor_alone_or_among_the_options(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any) -> Any:
        seen.append((config_patches, count_calls(gm, torch.ops.sla2.attention.default)))
        return gm

    monkeypatch.setattr("sla2_compile.backend.compile_fx", compile_fx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(Attention(), backend="sla2", **arguments)(tokens())
    assert seen == [({"triton.cudagraphs": True}, "options" in arguments)]


def test_a_site_left_dense_is_bit_identical_to_inductor_alone() -> None:
    model, x = Blocks(), tokens()
    options = {**SMALL_OPTIONS, "min_seq_len": 2048}
    with torch.no_grad():
        plain = torch.compile(model)(x)
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="none of the 2 attention sites"):
            ours = torch.compile(model, backend="sla2", options=options)(x)
    assert torch.equal(plain, ours)


def test_a_model_without_convertible_attention_says_so() -> None:
    with pytest.warns(UserWarning, match="holds no attention"):
        compile_aot(nn.Linear(WIDTH, WIDTH))(tokens())
    strict = SLA2Config(strict=True, min_seq_len=0)
    with pytest.raises(Exception, match="strict: expected at least one converted attention site"):
        compile_aot(nn.Linear(WIDTH, WIDTH), strict)(tokens())


def test_a_graph_without_attention_beside_one_with_it_says_nothing() -> None:
    def broken(x: Tensor, model: nn.Module) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return model(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compile_aot(broken)(tokens(), Attention())


class Parts(nn.Module):
    """Dynamo leaves the loop to Python, for its graph break, and compiles each layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.norm, self.video = Attention(), nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for layer, y in ((self.text, text), (self.norm, x), (self.video, x)):
            torch._dynamo.graph_break()
            outs.append(layer(y))
        return tuple(outs)


def test_a_part_of_a_broken_model_is_not_taken_for_the_whole() -> None:
    model, inputs = Parts(), (tokens(), tokens(16))
    options = {"sparsity": 0.5, "block_q": 16, "block_k": 16, "min_seq_len": 32, "strict": True}
    config = SLA2Config(**options, exclude=("elsewhere",))
    with pytest.warns(UserWarning, match="sla2: ") as said:
        _, _, out = compile_aot(model, config)(*inputs)
    torch.testing.assert_close(out, with_reference(model, config, *inputs)[2], rtol=1e-4, atol=1e-5)
    assert [str(each.message).partition(";")[0] for each in said] == [
        "sla2: none of the 1 attention sites of a part of the model between graph breaks was converted "
        "(16 keys, fewer than min_seq_len=32)"
    ]


def test_the_default_sparsity_is_announced_and_a_chosen_one_is_not() -> None:
    announced = build_backend(SMALL, aot_eager, sparsity_is_default=True)
    with pytest.warns(UserWarning, match=r"default of 0\.5"):
        torch.compile(Attention(), backend=announced)(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compile_aot(Attention())(tokens())


def count_compilations(model: Any, config: SLA2Config, lengths: list[int]) -> int:
    """How many graphs are compiled while the model sees these lengths; checks each result."""
    num_graphs = 0

    def count(gm: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(gm, inputs)

    compiled = torch.compile(model, backend=build_backend(config, count))
    for length in lengths:
        torch.testing.assert_close(
            compiled(tokens(length)),
            with_reference(model, config, tokens(length)) if length >= config.min_seq_len else model(tokens(length)),
            rtol=1e-4,
            atol=1e-5,
        )
    return num_graphs


def test_a_third_length_does_not_recompile() -> None:
    # The second length makes Dynamo switch from fixed to symbolic sizes; from then on one graph serves.
    assert count_compilations(Attention(), SMALL, [64, 80, 97, 130, 33]) == 2


def test_crossing_the_minimal_length_recompiles_once() -> None:
    config = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert count_compilations(Attention(), config, [120, 130, 140, 50, 60, 150]) == 3


def test_checkpointed_blocks_train_as_plain_ones() -> None:
    class Checkpointed(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    checkpointed, plain, x = Checkpointed(), Blocks(), tokens(requires_grad=True)
    plain.load_state_dict(checkpointed.state_dict())
    grads, expected = (
        torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
        for model, out in (
            (checkpointed, compile_aot(checkpointed)(x)),
            (plain, with_reference(plain, SMALL, x)),
        )
    )
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


def test_autocast_gives_its_dtype_as_dense_attention_does() -> None:
    model = Attention()
    with torch.autocast("cpu", torch.bfloat16):
        assert compile_aot(model)(tokens()).dtype == model(tokens()).dtype == torch.bfloat16


def test_two_models_and_two_configs_in_one_process_keep_apart() -> None:
    model, x = Attention(), tokens()
    sparse, dense = compile_aot(model), compile_aot(model, SLA2Config(sparsity=0, min_seq_len=0))
    torch.testing.assert_close(sparse(x), with_reference(model, SMALL, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse(x), model(x), rtol=1e-3)


def test_a_padding_mask_in_a_compiled_model_hides_what_it_covers() -> None:
    model, x = Attention(), tokens(64)
    mask = torch.arange(64).reshape(1, 1, 1, 64) < 50
    compiled = compile_aot(model)
    spoiled = x.clone()
    spoiled[:, 50:] = 1e4
    torch.testing.assert_close(compiled(x, mask=mask)[:, :50], compiled(x, spoiled, mask)[:, :50])


def test_the_cache_tag_follows_the_sources_and_is_restored() -> None:
    assert source_hash().startswith("sla2-")
    before = torch.compiler.config.cache_key_tag
    torch.compile(Attention(), backend="sla2", options=SMALL_OPTIONS)(tokens())
    assert torch.compiler.config.cache_key_tag == before


@pytest.mark.parametrize("option", ["exclude", "include", "site_sparsity"])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_names(option: str) -> None:
    value: Any = {"blocks.7": 0.5} if option == "site_sparsity" else ["blocks.7"]
    config = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=0, **{option: value})
    with pytest.raises(Exception, match=rf"{option}: expected patterns .*'blocks.7'.*blocks.0, blocks.1"):
        compile_aot(Blocks(), config)(tokens())
