"""The op under what PyTorch does to operators: autograd, torch.func, torch.compile, checkpointing, export, copies."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import BLOCKS, BOTH_TAILS_AND_MIXINGS, TAILS, Case, make_case, output_and_gradients
from tolerances import FLOAT64, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from sla2_compile import SLA2Config, attention
from sla2_compile.functional import config_arguments


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def small_case(**settings: Any) -> Case:
    return make_case(q_len=70, kv_len=90, **settings)


def stack(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts)


class Layer(nn.Module):
    """Attention whose learned state is its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        assert case.alpha_logit is not None
        self.alpha_logit = nn.Parameter(case.alpha_logit.detach().clone())
        self.config = case.config

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, alpha_logit=self.alpha_logit, config=self.config)


# The operators' registrations


def op_arguments(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    proj_q, proj_k = case.router or (None, None)
    arguments = (case.q, case.k, case.v, case.attn_mask, proj_q, proj_k, case.alpha_logit, case.alpha_gain)
    return arguments, config_arguments(case.config)


OPCHECKED = [
    {"tail": "pooled", "mixing": "row", "masked": True},
    {"tail": "linear", "mixing": "block", "exact_prefix": 20},
    {"tail": "linear", "mixing": "row", "learned": False, "qk_format": "int8", "pv_format": "fp8"},
]


@pytest.mark.parametrize("settings", OPCHECKED)
def test_opcheck_finds_no_fault_with_the_operator(settings: dict[str, Any]) -> None:
    arguments, settings = op_arguments(small_case(batch=1, **settings))
    torch.library.opcheck(torch.ops.sla2.attention.default, arguments, settings)


@pytest.mark.parametrize("settings", OPCHECKED)
@pytest.mark.parametrize("save_sparse_out", [False, True])
def test_opcheck_finds_no_fault_with_the_forward_and_backward_operators(
    settings: dict[str, Any], save_sparse_out: bool
) -> None:
    arguments, settings = op_arguments(small_case(batch=1, **settings))
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    settings = {"scale": 0.25, **settings}
    torch.library.opcheck(torch.ops.sla2.attention_forward.default, (*arguments, save_sparse_out), settings)
    if save_sparse_out:
        saved = torch.ops.sla2.attention_forward(*arguments, True, **settings)
        q, k, v, attn_mask, _, _, alpha_logit, alpha_gain = arguments
        arguments = (torch.ones_like(q), q, k, v, attn_mask, alpha_logit, alpha_gain, *saved)
        torch.library.opcheck(torch.ops.sla2.attention_backward.default, arguments, settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_sparse_out", [False, True])
def test_fakes_give_the_true_shapes_strides_and_dtypes(dtype: torch.dtype, save_sparse_out: bool) -> None:
    case = make_case(kv_heads=1, q_len=70, kv_len=90, exact_prefix=20, dtype=dtype, learned=False)
    gain = torch.ones(2, dtype=torch.promote_types(dtype, torch.float32))
    q = case.q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    forward = (q, case.k.detach(), case.v.detach(), None, None, None, None, gain, save_sparse_out)
    settings = {"scale": 0.25, **config_arguments(case.config)}

    def run(operator: Any, *arguments: Any) -> list[tuple[Any, ...]]:
        return [(x.shape, x.stride(), x.dtype) for x in operator(*arguments, **settings)]

    def on_meta(*arguments: Any) -> tuple[Any, ...]:
        return tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments)

    operator = torch.ops.sla2.attention_forward
    assert run(operator, *on_meta(*forward)) == run(operator, *forward)
    if save_sparse_out:
        saved = operator(*forward, **settings)
        backward = (torch.ones_like(q), *forward[:4], None, gain, *saved)
        operator = torch.ops.sla2.attention_backward
        assert run(operator, *on_meta(*backward)) == run(operator, *backward)


def test_on_the_meta_device_the_op_gives_shapes_alone() -> None:
    out = attention(*(torch.empty(1, 40, 75_600, 128, device="meta") for _ in range(3)))
    assert out.shape == (1, 40, 75_600, 128)
    assert out.stride() == (40 * 75_600 * 128, 128, 40 * 128, 1)


# Autograd


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_gradients_are_the_finite_differences_of_the_output(tail: str, mixing: str) -> None:
    case = small_case(kv_heads=1, masked=True, tail=tail, mixing=mixing)
    names = tuple(case.differentiable())

    def run(*tensors: Tensor) -> Tensor:
        return replace(case, **dict(zip(names, tensors, strict=True))).op()

    assert torch.autograd.gradcheck(run, tuple(case.differentiable().values()), fast_mode=True)


def test_a_second_derivative_is_refused_rather_than_0() -> None:
    case = small_case()
    (dq,) = torch.autograd.grad(case.op().square().sum(), case.q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"sla2::attention has no second derivative; .*create_graph"):
        torch.autograd.grad(dq.sum(), case.q)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda q: grad(lambda q: replace(case, q=q).op().square().sum())(q).sum())(case.q)


def test_a_forward_mode_derivative_is_refused_rather_than_0() -> None:
    case = small_case()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: replace(case, q=q).op(), (case.q.detach(),), (torch.ones_like(case.q),))


@pytest.mark.parametrize("tail", TAILS)
def test_checkpointing_gives_the_same_gradients(tail: str) -> None:
    case = small_case(tail=tail)
    expected = output_and_gradients(case, case.op)
    for name, x in output_and_gradients(case, lambda: checkpoint(case.op, use_reentrant=False)).items():
        assert torch.equal(x, expected[name]), name


def test_gradients_accumulate_over_calls() -> None:
    case = small_case()
    expected = torch.autograd.grad(case.op().sum(), case.v)[0]
    for _ in range(2):
        case.op().sum().backward()
    assert case.v.grad is not None
    assert torch.equal(case.v.grad, 2 * expected)


def test_a_copied_layer_computes_the_same_and_learns_by_itself() -> None:
    case = small_case()
    layer = Layer(case)
    twin = copy.deepcopy(layer)
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    assert torch.equal(twin(q, k, v), layer(q, k, v))
    twin(q, k, v).sum().backward()
    assert layer.alpha_logit.grad is None
    assert twin.alpha_logit.grad is not None


# torch.func


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_func_grad_is_autograds_gradient(tail: str, mixing: str) -> None:
    case = small_case(tail=tail, mixing=mixing)
    inputs = case.differentiable()

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return replace(case, **tensors).op().square().sum()

    expected = torch.autograd.grad(loss(inputs), tuple(inputs.values()))
    gradients = grad(loss)({name: x.detach() for name, x in inputs.items()})
    assert all(torch.equal(gradients[name], x) for name, x in zip(inputs, expected, strict=True))


def test_functional_call_differentiates_parameters_that_are_passed_in() -> None:
    case = small_case()
    layer = Layer(case)
    inputs = tuple(x.detach() for x in (case.q, case.k, case.v))
    parameters = {"alpha_logit": torch.ones_like(layer.alpha_logit).detach()}
    gradient = grad(lambda p: functional_call(layer, p, inputs).square().sum())(parameters)["alpha_logit"]
    logit = torch.ones_like(layer.alpha_logit).requires_grad_()
    replace(case, router=None, alpha_gain=None, alpha_logit=logit).op().square().sum().backward()
    assert logit.grad is not None
    assert torch.equal(gradient, logit.grad)


MAPPED = [
    ("q", "k", "v"),
    ("q",),
    ("k",),
    ("v",),
    ("attn_mask",),
    ("q", "attn_mask"),
    ("alpha_logit",),
    ("q", "k", "v", "alpha_logit", "alpha_gain"),
]


def batched_inputs(case: Case, names: tuple[str, ...], size: int = 3) -> dict[str, Tensor]:
    """`size` versions of each of the case's tensors, along dimension 1."""
    generator = torch.Generator().manual_seed(2)
    batched = {}
    for name in names:
        shape = (size, *getattr(case, name).shape)
        if name == "attn_mask":
            x = torch.rand(shape, generator=generator) > 0.4
        else:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
        batched[name] = x.movedim(0, 1)
    return batched


@pytest.mark.parametrize("names", MAPPED)
@pytest.mark.parametrize("tail, mixing", [("pooled", "row"), ("linear", "row")])
def test_vmap_is_a_loop(names: tuple[str, ...], tail: str, mixing: str) -> None:
    case = small_case(kv_heads=1, masked=True, tail=tail, mixing=mixing)
    batched = batched_inputs(case, names)

    def run(tensors: dict[str, Tensor]) -> Tensor:
        return replace(case, **tensors).op()

    mapped = vmap(run, in_dims=1)(batched)
    looped = stack([run({name: x.select(1, i) for name, x in batched.items()}) for i in range(3)])
    assert relative_error(mapped, looped) < FLOAT64


def test_vmap_over_a_mask_shared_by_the_batch() -> None:
    case = replace(small_case(), attn_mask=torch.ones(1, 1, 1, 90, dtype=torch.bool))
    masks = batched_inputs(case, ("attn_mask",))["attn_mask"]
    mapped = vmap(lambda mask: replace(case, attn_mask=mask).op(), in_dims=1)(masks)
    looped = stack([replace(case, attn_mask=masks.select(1, i)).op() for i in range(3)])
    assert relative_error(mapped, looped) < FLOAT64


@pytest.mark.parametrize("names", MAPPED)
@pytest.mark.parametrize("tail, mixing", [("pooled", "row"), ("linear", "block")])
def test_vmap_of_grad_gives_gradients_per_sample(names: tuple[str, ...], tail: str, mixing: str) -> None:
    case = small_case(masked=True, tail=tail, mixing=mixing)
    names = tuple(name for name in names if name != "alpha_gain" or mixing == "row")
    batched = batched_inputs(case, names)
    wanted = {name: x.detach() for name, x in case.differentiable().items() if name not in names}

    def loss(fixed: dict[str, Tensor], moving: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        return replace(case, **fixed, **moving, attn_mask=mask).op().square().sum()

    masks = batched.pop("attn_mask", None)
    in_dims = (None, 1, None if masks is None else 1)
    per_sample = vmap(grad(loss, argnums=(0, 1)), in_dims=in_dims)
    mask = case.attn_mask if masks is None else masks
    gradients = per_sample(wanted, batched, mask)
    for i in range(3):
        element = {name: x.select(1, i) for name, x in batched.items()}
        expected = grad(loss, argnums=(0, 1))(wanted, element, mask if masks is None else masks.select(1, i))
        for ours, theirs in zip(gradients, expected, strict=True):
            for name in theirs:
                assert relative_error(ours[name][i], theirs[name]) < FLOAT64, name


def test_vmaps_nest() -> None:
    case = small_case(batch=1)
    q = batched_inputs(case, ("q",), 2)["q"].movedim(1, 0)
    v = batched_inputs(case, ("v",), 3)["v"].movedim(1, 0)
    run = vmap(vmap(lambda q, v: replace(case, q=q, v=v).op(), in_dims=(None, 0)), in_dims=(0, None))
    looped = stack([stack([replace(case, q=one, v=two).op() for two in v]) for one in q])
    assert relative_error(run(q, v), looped) < FLOAT64


def test_vmap_over_router_and_logit_of_another_length_is_a_loop() -> None:
    case = small_case(mixing="block")
    generator = torch.Generator().manual_seed(3)
    routers = torch.randn(3, 2, 16, 16, generator=generator, dtype=torch.float64)
    logits = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)

    def run(router: Tensor, logit: Tensor) -> Tensor:
        return replace(case, router=(router[0], router[1]), alpha_logit=logit).op()

    assert relative_error(vmap(run)(routers, logits), stack(list(map(run, routers, logits)))) < FLOAT64


def test_jacrev_of_a_linear_argument_is_the_attention_map() -> None:
    case = make_case(batch=1, heads=1, q_len=20, learned=False)
    jacobian = jacrev(lambda v: replace(case, v=v).op()[0, 0, :, 0])(case.v.detach())  # (N, 1, 1, N_kv, D)
    weights = jacobian[:, 0, 0, :, 0]
    torch.testing.assert_close(weights @ case.v[0, 0], case.op()[0, 0], rtol=1e-10, atol=1e-12)


# torch.compile


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_compiled_training_is_eager_training(tail: str, mixing: str) -> None:
    case = small_case(masked=True, tail=tail, mixing=mixing)
    expected = output_and_gradients(case, case.op)
    for name, x in output_and_gradients(case, compiled(case.op)).items():
        assert torch.equal(x, expected[name]), name
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_inference_is_eager_inference() -> None:
    case = small_case(qk_format="int8", token_grid=None)
    with torch.no_grad():
        out = compiled(case.op)()
    assert torch.equal(out, case.op())
    assert not out.requires_grad
    assert out.stride() == case.op().stride()


def test_compiled_autocast_and_checkpoint_are_eager_ones() -> None:
    case = small_case(dtype=torch.float32)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(case.op, use_reentrant=False)

    expected = output_and_gradients(case, run)
    for name, x in output_and_gradients(case, compiled(run)).items():
        assert torch.equal(x, expected[name]), name


def test_a_compiled_vmap_is_an_eager_one() -> None:
    case = small_case()
    case = replace(case, **{name: x.detach() for name, x in case.differentiable().items()})
    q = batched_inputs(case, ("q",))["q"]
    mapped = vmap(lambda q: replace(case, q=q).op(), in_dims=1)
    assert torch.equal(compiled(mapped)(q), mapped(q))


@pytest.mark.parametrize(
    "settings", [{}, {"tail": "linear", "mixing": "block"}, {"exact_prefix": 20, "exact_suffix": 9}]
)
@pytest.mark.parametrize("training", [False, True])
def test_one_dynamic_graph_serves_every_length(settings: dict[str, Any], training: bool) -> None:
    config = SLA2Config(**BLOCKS, **settings)
    run = compiled(lambda q, k, v: attention(q, k, v, config=config), dynamic=True)
    for num_tokens in (130, 200, 333, 97):
        inputs = torch.randn(3, 1, 2, num_tokens, 16, requires_grad=training).unbind(0)
        out = run(*inputs)
        assert torch.equal(out, attention(*inputs, config=config))
        if training:
            gradients = torch.autograd.grad(out.sum(), inputs)
            expected = torch.autograd.grad(attention(*inputs, config=config).sum(), inputs)
            assert all(map(torch.equal, gradients, expected))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_second_length_makes_the_graph_dynamic_and_further_ones_reuse_it() -> None:
    config = SLA2Config(**BLOCKS)
    run = compiled(lambda x: attention(x, x, x, config=config))
    for num_tokens in (130, 200, 333, 97):
        x = torch.randn(1, 2, num_tokens, 16)
        assert torch.equal(run(x), attention(x, x, x, config=config))
    assert counters["stats"]["unique_graphs"] == 2


# torch.export


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
def test_an_exported_program_holds_the_op_and_computes_the_same(tail: str, mixing: str) -> None:
    case = small_case(tail=tail, mixing=mixing)
    layer, inputs = Layer(case), tuple(x.detach() for x in (case.q, case.k, case.v))
    program = torch.export.export(layer, inputs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.sla2.attention.default]
    assert torch.equal(program.module()(*inputs), layer(*inputs))


@pytest.mark.parametrize("exact", [(0, 0), (20, 9)])
@pytest.mark.parametrize("decompose", [False, True])
def test_an_exported_program_with_a_dynamic_length_serves_other_lengths(
    exact: tuple[int, int], decompose: bool
) -> None:
    case = small_case(exact_prefix=exact[0], exact_suffix=exact[1])
    layer, length = Layer(case), torch.export.Dim("length", min=64, max=4096)
    q = case.q.detach()
    dynamic = {name: {2: length} for name in "qkv"}
    program = torch.export.export(layer, (q, q.clone(), q.clone()), dynamic_shapes=dynamic)
    if decompose:
        program = program.run_decompositions({})
    for num_tokens in (70, 64, 333):
        inputs = torch.randn(3, 2, 2, num_tokens, 16, dtype=torch.float64).unbind(0)
        assert torch.equal(program.module()(*inputs), layer(*inputs))


def test_a_grid_of_symbolic_sizes_exports() -> None:
    class Video(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            frames, height, width = x.shape[2:5]
            x = x.flatten(2, 4)
            grid = [frames, height, width]
            return torch.ops.sla2.attention(x, x, x, block_q=32, block_k=16, token_grid=grid)

    frames = torch.export.Dim("frames", min=2, max=64)
    program = torch.export.export(Video(), (torch.randn(1, 2, 3, 6, 8, 16),), dynamic_shapes={"x": {2: frames}})
    for num_frames in (3, 5):
        x = torch.randn(1, 2, num_frames, 6, 8, 16)
        assert torch.equal(program.module()(x), Video()(x))


# Every combination that has its own code path survives a trace


@pytest.mark.parametrize("formats", list(itertools.product((None, "int8", "fp8"), (None, "fp8"))))
def test_every_pair_of_formats_compiles(formats: tuple[str | None, str | None]) -> None:
    case = small_case(qk_format=formats[0], pv_format=formats[1])
    assert torch.equal(compiled(case.op)(), case.op())
