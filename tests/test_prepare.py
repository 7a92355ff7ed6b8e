"""`prepare` and the pass that binds: unchanged elsewhere, and every attention with its own state under sla2."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learned_models import CalledTwice, TwoSites, compile_aot, parameters, randomize, with_learned_reference
from small_models import SMALL, SMALL_OPTIONS, WIDTH, Attention, Blocks, KeepGraphs, count_calls, tokens
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from sla2_compile.backend import build_backend
from sla2_compile.config import SLA2Config
from sla2_compile.explain import explain
from sla2_compile.learned_state import CallSettings, Entry, LearnedParameters
from sla2_compile.passes.pipeline import convert
from sla2_compile.prepare import PreparedModule, owner_state, prepare, prepared_owners


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def prepared_blocks() -> Blocks:
    torch.manual_seed(0)
    model = prepare(Blocks(), tokens(), config=SMALL)
    randomize(model)
    return model


def with_default_sparsity(gm: Any, inputs: Any) -> Any:
    """A backend for users who name no sparsity."""
    convert(gm, SMALL, sparsity_is_default=True)
    return aot_eager(gm, inputs)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# What a prepared model is


def test_state_is_attached_to_every_owner_and_found_by_everything_that_looks_for_parameters() -> None:
    model = prepare(Blocks(), tokens(), config=SMALL)
    assert [name for name, _ in prepared_owners(model)] == ["blocks.0", "blocks.1"]
    names = {name for name, _ in model.named_parameters() if ".sla2." in name}
    assert "blocks.1.sla2.call0_any.proj_q" in names
    assert len(names) == 8
    assert names < set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for name, parameter in model.named_parameters() if name in names} < held
    assert {parameter.device.type for parameter in copy.deepcopy(model).to("meta").parameters()} == {"meta"}


def test_moving_a_model_to_16_bits_does_not_round_its_router() -> None:
    model = prepared_blocks()
    before = parameters(model.blocks[0]).proj_q.clone()
    model.to(torch.bfloat16)
    assert model.blocks[0].to_q.weight.dtype == torch.bfloat16
    assert torch.equal(parameters(model.blocks[0]).proj_q, before)


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_a_prepared_model_is_dense_and_unchanged_without_our_backend(backend: str | None) -> None:
    plain, x = Blocks(), tokens(requires_grad=True)
    model = prepare(copy.deepcopy(plain), tokens(), config=SMALL)
    randomize(model)
    if backend is not None:
        plain, model = (torch.compile(each, backend=backend, fullgraph=True) for each in (plain, model))  # type: ignore[assignment]
    out, expected = model(x), plain(x)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(grad, expected_grad)


def test_the_marker_is_the_identity_also_for_what_is_written_in_place() -> None:
    class InPlace(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x += 1
            return super().forward(x)

    plain = InPlace()
    model = prepare(copy.deepcopy(plain), tokens(), config=SMALL)
    for run in (model, compile_aot(model)):
        ours = tokens()
        run(ours)
        assert torch.equal(ours, tokens() + 1)


def test_copies_and_pickles_are_prepared_too_and_have_state_of_their_own() -> None:
    model = prepared_blocks()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(twin.blocks[0]) is type(model.blocks[0])
        parameters(twin.blocks[0]).alpha_logit.data += 5
        states = [parameters(block) for block in twin.blocks]
        assert_close(compile_aot(twin)(tokens()), with_learned_reference(twin, states, tokens()))
        states = [parameters(block) for block in model.blocks]
        assert_close(compile_aot(model)(tokens()), with_learned_reference(model, states, tokens()))


def test_the_class_keeps_its_name_its_signature_and_its_instances() -> None:
    model = prepare(Attention(), tokens(), config=SMALL)
    assert isinstance(model, Attention)
    assert isinstance(model, PreparedModule)
    assert type(model).__name__ == "Attention"
    assert "Attention(" in repr(model)
    import inspect

    assert list(inspect.signature(model.forward).parameters) == ["x", "context", "mask"]


# What the dry run leaves behind


def test_the_dry_run_changes_no_weight_no_buffer_and_no_random_state() -> None:
    class Stateful(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.dropout(self.norm(x.transpose(1, 2)).transpose(1, 2))
            return super().forward(x)

    model = Stateful().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    buffer = model.norm.running_mean
    prepare(model, tokens(), config=SMALL)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.norm.running_mean is buffer
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.training
    assert not any("_sla2_path" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_classes_are_restored_when_the_model_fails() -> None:
    model = Blocks()
    with pytest.raises(RuntimeError):
        prepare(model, torch.randn(1, 8, WIDTH + 1), config=SMALL)
    assert type(model.blocks[0]) is Attention
    assert type(model) is Blocks


def test_many_dry_runs_leave_room_for_the_compilation_that_matters() -> None:
    # Dynamo stops compiling a function, silently, when it holds too many versions of it.
    plain = Blocks()
    for _ in range(10):
        model = prepare(copy.deepcopy(plain), tokens(), config=SMALL)
    graphs = KeepGraphs(lambda gm: convert(gm, SMALL))
    torch.compile(model, backend=graphs)(tokens())
    assert len(graphs.graphs) == 1


# Whose state goes where


def test_each_attention_of_a_whole_model_gets_its_own_state_and_the_marker_goes() -> None:
    model, x = prepared_blocks(), tokens()
    graphs = KeepGraphs(lambda gm: convert(gm, SMALL))
    out = torch.compile(model, backend=graphs)(x)
    assert_close(out, with_learned_reference(model, [parameters(block) for block in model.blocks], x))
    (gm,) = graphs.graphs
    assert count_calls(gm, torch.ops.sla2.bind.default) == 0
    assert count_calls(gm, torch.ops.sla2.attention.default) == 2
    assert count_calls(gm, F.scaled_dot_product_attention) == 0


@torch.no_grad()
def test_blocks_compiled_one_by_one_share_a_graph_and_keep_their_routers() -> None:
    model, x, num_graphs = Blocks(), tokens(), 0
    model.blocks.append(Attention())
    prepare(model, x, config=SMALL)
    randomize(model)

    def count(gm: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(gm, inputs)

    expected = with_learned_reference(model, [parameters(block) for block in model.blocks], x)
    backend = build_backend(SMALL, count)
    for block in model.blocks:
        block.compile(backend=backend)
    assert_close(model(x), expected)
    assert num_graphs == 1


def test_blocks_that_were_calibrated_differently_do_not_share_a_graph() -> None:
    model, x = prepared_blocks(), tokens()
    for block, units in zip(model.blocks, (500_000, 750_000), strict=True):
        calibrated(block, [units])
    backend = with_default_sparsity
    states = [parameters(block) for block in model.blocks]
    expected_first = with_learned_reference(model.blocks[0], states[:1], x)
    sparse = SLA2Config(**{**SMALL_OPTIONS, "sparsity": 0.75})
    expected_second = with_learned_reference(model.blocks[1], states[1:], x, config=sparse)
    for block in model.blocks:
        block.compile(backend=backend)
    assert_close(model.blocks[0](x), expected_first)
    assert_close(model.blocks[1](x), expected_second)


def test_an_owner_that_is_called_twice_uses_its_state_twice() -> None:
    model, x = prepare(CalledTwice(), tokens(), config=SMALL), tokens()
    randomize(model)
    assert_close(compile_aot(model)(x), with_learned_reference(model, [parameters(model.attention)] * 2, x))


def test_an_owner_with_two_sites_has_a_state_for_each() -> None:
    x, context = tokens(64), tokens(80)
    model = prepare(TwoSites(), x=x, context=context, config=SMALL)
    randomize(model)
    states = [parameters(model, 0), parameters(model, 1)]
    expected = with_learned_reference(model, states, x=x, context=context)
    assert_close(compile_aot(model)(x=x, context=context), expected)
    swapped = with_learned_reference(model, states[::-1], x=x, context=context)
    assert not torch.allclose(swapped, expected, rtol=1e-2)


def test_a_site_that_stays_dense_between_others_does_not_shift_them() -> None:
    class ThreeSites(Attention):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
            attend = super().forward
            return attend(x) + attend(x, text) + attend(2 * x)

    x, text = tokens(64), tokens(20)
    config = SLA2Config(**{**SMALL_OPTIONS, "min_seq_len": 32})
    model = prepare(ThreeSites(), x, text, config=config)
    assert [call.ordinal for call in owner_state(model).settings.calls] == [0, 2]
    randomize(model)
    states = [parameters(model, 0), None, parameters(model, 2)]
    assert_close(compile_aot(model, config)(x, text), with_learned_reference(model, states, x, text, config=config))


def test_attention_in_other_spellings_gets_its_state_too() -> None:
    class Spelled(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
            return ((q @ k.mT * 0.25).softmax(-1) @ v).transpose(1, 2).flatten(2)

    model, x = prepare(Spelled(), tokens(), config=SMALL), tokens()
    randomize(model)
    twin = prepare(Attention(), tokens(), config=SMALL)
    twin.load_state_dict(model.state_dict())
    assert_close(compile_aot(model)(x), with_learned_reference(twin, [parameters(twin)], x))


def test_an_owner_that_is_the_compiled_model_gets_its_state() -> None:
    model, x = prepare(Attention(), tokens(), config=SMALL), tokens()
    randomize(model)
    assert owner_state(model) is model.sla2
    expected = with_learned_reference(model, [parameters(model)], x)
    assert_close(compile_aot(model, fullgraph=True)(x), expected)
    assert_close(compile_aot(model, fullgraph=True)(x=x), expected)


def test_a_compiled_function_that_calls_two_models_keeps_them_apart() -> None:
    first, second, x = prepared_blocks(), prepared_blocks(), tokens()
    randomize(second, seed=1)

    def both(x: Tensor) -> Tensor:
        return second(first(x))

    expected = with_learned_reference(first, [parameters(block) for block in first.blocks], x)
    expected = with_learned_reference(second, [parameters(block) for block in second.blocks], expected)
    assert_close(compile_aot(both)(x), expected)


def test_state_that_changes_after_compilation_is_used_without_another() -> None:
    model, x, num_graphs = prepared_blocks(), tokens(), 0

    def count(gm: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(gm, inputs)

    compiled = torch.compile(model, backend=build_backend(SMALL, count))
    compiled(x)
    randomize(model, seed=7)
    assert_close(compiled(x), with_learned_reference(model, [parameters(block) for block in model.blocks], x))
    assert num_graphs == 1


def test_lengths_that_change_do_not_recompile_and_interpolate_the_logit() -> None:
    model, num_graphs = prepare(Attention(), tokens(), config=SMALL), 0
    parameters(model).alpha_logit = nn.Parameter(torch.randn(2, 4))

    def count(gm: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(gm, inputs)

    compiled = torch.compile(model, backend=build_backend(SMALL, count))
    for length in (64, 80, 97, 130):
        assert_close(compiled(tokens(length)), with_learned_reference(model, [parameters(model)], tokens(length)))
    assert num_graphs == 2


# Training and the other ways to run


def test_gradients_reach_the_inputs_the_weights_and_the_mixing() -> None:
    model, x = prepared_blocks(), tokens(requires_grad=True)
    states = [parameters(block) for block in model.blocks]
    leaves = [x, model.blocks[0].to_q.weight, *(p for s in states for p in (s.alpha_logit, s.alpha_gain))]
    grads = torch.autograd.grad(compile_aot(model)(x).square().sum(), leaves)
    expected = torch.autograd.grad(with_learned_reference(model, states, x).square().sum(), leaves)
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inside_the_owner", [False, True])
def test_checkpointed_owners_train_with_their_own_state(inside_the_owner: bool) -> None:
    class Inner(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    class Checkpointed(Blocks):
        def __init__(self) -> None:
            super().__init__()
            if inside_the_owner:
                self.blocks = nn.ModuleList(Inner() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + (block(x) if inside_the_owner else checkpoint(block, x, use_reentrant=False))
            return x

    plain, model, x = Blocks(), Checkpointed(), tokens(requires_grad=True)
    plain.load_state_dict(model.state_dict())
    for each in (plain, model):
        prepare(each, tokens(), config=SMALL)
        randomize(each)
    grads, expected = (
        torch.autograd.grad(
            compile_aot(each)(x).square().sum(), [x, *(p for p in each.parameters() if p.requires_grad)]
        )
        for each in (model, plain)
    )
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


def test_autocast_keeps_its_dtype_and_the_state_its_own() -> None:
    model = prepared_blocks()
    with torch.autocast("cpu", torch.bfloat16):
        out, dense = compile_aot(model)(tokens()), model(tokens())
    assert out.dtype == dense.dtype
    expected = with_learned_reference(model, [parameters(block) for block in model.blocks], tokens())
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.05)


def test_an_exported_model_is_dense_and_carries_the_state_to_our_passes() -> None:
    model, x = prepared_blocks(), tokens()
    exported = torch.export.export(model, (x,))
    assert_close(exported.module()(x), model(x))
    lowered = exported.run_decompositions()
    assert not any("sla2" in str(node.target) for node in lowered.graph.nodes if node.op == "call_function")
    assert_close(lowered.module()(x), model(x))
    markers = [node for node in exported.graph.nodes if node.target is torch.ops.sla2.bind.default]
    assert len(markers) == 2


def test_a_model_on_the_meta_device_can_be_prepared() -> None:
    with torch.device("meta"):
        model, x = Blocks(), torch.empty(1, 64, WIDTH)
    prepare(model, x, config=SMALL)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_explain_shows_a_prepared_model_as_before() -> None:
    plain = Blocks()
    names = [site["name"] for site in explain(plain, tokens(), config=SMALL).to_dict()["sites"]]
    model = prepare(plain, tokens(), config=SMALL)
    assert [site["name"] for site in explain(model, tokens(), config=SMALL).to_dict()["sites"]] == names


# What calibrated state decides, and what is said when it does not fit


def calibrated(owner: nn.Module, units: list[int], **context: Any) -> list[LearnedParameters]:
    """Give an owner random state as if calibrated for these sparsities."""
    state = owner_state(owner)
    (old,) = state.settings.calls
    entries = tuple(Entry(each, "pooled", "row") for each in units)
    made = [LearnedParameters(old.num_heads, old.head_dim) for _ in units]
    for i, each in enumerate(made):
        each.alpha_logit.data += i + 1.0
    state.replace_call(CallSettings(0, old.num_heads, old.head_dim, entries, units[0], tuple(context.items())), made)
    return made


def test_the_calibrated_sparsity_is_the_default_and_another_can_be_chosen() -> None:
    model, x = prepare(Attention(), tokens(), config=SMALL), tokens()
    quarter, half = calibrated(model, [750_000, 500_000])
    sparse = SLA2Config(**{**SMALL_OPTIONS, "sparsity": 0.75})
    default = torch.compile(model, backend=with_default_sparsity)
    assert_close(default(x), with_learned_reference(model, [quarter], x, config=sparse))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_close(compile_aot(model)(x), with_learned_reference(model, [half], x))


def test_the_calibrated_form_is_the_one_that_runs() -> None:
    model, x = prepare(Attention(), tokens(), config=SMALL), tokens()
    state = owner_state(model)
    learned = LearnedParameters(2, 16, 4)
    learned.alpha_logit.data.normal_()
    state.replace_call(CallSettings(0, 2, 16, (Entry(500_000, "linear", "block"),), 500_000), [learned])
    paper = SLA2Config(**{**SMALL_OPTIONS, "tail": "linear", "mixing": "block"})
    assert_close(compile_aot(model)(x), with_learned_reference(model, [learned], x, config=paper))


def test_a_sparsity_that_was_not_calibrated_takes_the_nearest_state_and_says_so() -> None:
    model, x = prepare(Attention(), tokens(), config=SMALL), tokens()
    _, near = calibrated(model, [950_000, 600_000])
    with pytest.warns(
        UserWarning, match=r"root: expected a calibrated sparsity \(0.95, 0.6\), got 0.5; the state of 0.6"
    ):
        out = compile_aot(model)(x)
    assert_close(out, with_learned_reference(model, [near], x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: expected learned state to fit"):
        compile_aot(model, SLA2Config(**SMALL_OPTIONS, strict=True))(x)


def test_state_learned_with_other_blocks_says_so() -> None:
    model, x = prepare(Attention(), tokens(), config=SMALL), tokens()
    calibrated(model, [500_000], block_q=128)
    with pytest.warns(UserWarning, match="calibrated with block_q=128, and is used with 16"):
        compile_aot(model)(x)


def test_a_graph_break_between_a_module_and_its_attention_is_not_silent() -> None:
    class Broken(Attention):
        broken = False

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if self.broken:
                torch._dynamo.graph_break()
            return super().forward(x)

    model = prepare(Broken(), tokens(), config=SMALL)
    model.broken = True
    with pytest.warns(UserWarning, match="expected 1 attention calls behind its learned state, found 0"):
        compile_aot(model)(tokens())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict"):
        compile_aot(model, SLA2Config(**SMALL_OPTIONS, strict=True))(tokens())


# Checkpoints


def test_a_state_dict_carries_calibrated_state_into_a_model_that_is_only_prepared() -> None:
    model = prepared_blocks()
    for block in model.blocks:
        calibrated(block, [500_000, 750_000])
        parameters_of_first = owner_state(block).get_submodule("call0_500000")
        parameters_of_first.alpha_logit = nn.Parameter(torch.randn(2, 4))
    fresh = prepare(Blocks(), tokens(), config=SMALL)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert owner_state(fresh.blocks[0]).settings == owner_state(model.blocks[0]).settings
    assert torch.equal(compile_aot(fresh)(tokens()), compile_aot(model)(tokens()))


def test_resuming_from_a_state_dict_keeps_the_parameters_that_an_optimizer_holds() -> None:
    model = prepared_blocks()
    held = dict(model.named_parameters())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_a_checkpoint_without_its_router_or_a_model_without_one_is_refused() -> None:
    plain, model = Blocks(), prepared_blocks()
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.sla2"):
        model.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.sla2"):
        plain.load_state_dict(model.state_dict())


# Errors


def test_what_cannot_be_prepared_is_an_error_that_says_why() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        prepare(lambda x: x, tokens())  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"got none \(blocks\.0: 64 keys, fewer than min_seq_len=2048"):
        prepare(Blocks(), tokens())
    with pytest.raises(ValueError, match=r"got none \(no attention was found\)"):
        prepare(nn.Linear(WIDTH, WIDTH), tokens())
    model = prepare(Blocks(), tokens(), config=SMALL)
    with pytest.raises(ValueError, match=r"not prepared yet, got one with learned state at blocks\.0, blocks\.1"):
        prepare(model, tokens(), config=SMALL)


def test_an_owner_that_cannot_be_marked_is_an_error_that_names_it() -> None:
    class FromList(Attention):
        def forward(self, inputs: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(inputs[0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FromList()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner([x])

    with pytest.raises(ValueError, match=r"take a floating tensor.*inner"):
        prepare(Model(), tokens(), config=SMALL)
    hooked = Blocks()
    hooked.blocks[0].forward = hooked.blocks[0].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"forward set on the instance: blocks\.0"):
        prepare(hooked, tokens(), config=SMALL)
