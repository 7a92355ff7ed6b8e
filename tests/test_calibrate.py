"""`calibrate`: better on held-out batches, within its memory, reproducible, and honest about what did not improve."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learned_models import CalledTwice, with_learned_reference
from small_models import HEAD_DIM, HEADS, SMALL, SMALL_OPTIONS, WIDTH, Attention, Blocks, tokens
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from sla2_compile.calibrate import calibrate
from sla2_compile.capture import Capture, SiteKey, group_sites, split_batch
from sla2_compile.config import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.kernels.soft_reference import (
    block_sample,
    hard_mask,
    num_kept,
    router_scores,
    soft_attention,
    soft_mask,
    take_step,
)
from sla2_compile.kernels.token_order import tile_order
from sla2_compile.learned_state import LearnedParameters
from sla2_compile.passes.pipeline import convert
from sla2_compile.prepare import owner_state, prepare
from sla2_compile.site_training import train_site
from sla2_compile.sparsity_budget import Choice, spread_budget

# `sla2_compile.calibrate` is the function.
module = sys.modules["sla2_compile.calibrate"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def structured(num_tokens: int = 256, seed: int = 0) -> Tensor:
    """Tokens in runs of one block, each run near one of eight directions: attention that is sparse by blocks."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    topics = torch.randint(8, (num_tokens // 16,), generator=generator).repeat_interleave(16)
    return (1.5 * directions[topics] + 0.5 * torch.randn(num_tokens, WIDTH, generator=generator))[None]


def sharp(model: Any) -> Any:
    """Make attention concentrate on like tokens, as trained models' does."""
    torch.manual_seed(0)
    for each in model.modules():
        if isinstance(each, Attention):
            shared = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
            each.to_q.weight.data = shared + 0.3 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5
            each.to_k.weight.data = shared + 0.3 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    return model


def batches(count: int = 4) -> list[Tensor]:
    return [structured(seed=i) for i in range(count)]


def run(model: Any, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"sparsity": 0.75, "config": SMALL, "steps": 60, "progress": False}
    return calibrate(model, batches(), **{**settings, **kwargs})


def test_the_held_out_error_falls_and_the_models_own_weights_do_not_move() -> None:
    plain = sharp(Blocks())
    model = copy.deepcopy(plain)
    report = run(model, sparsity=(0.875, 0.75))
    for total in report.totals():
        assert total["after"] < 0.97 * total["before"]
        assert total["num_improved"] == 2
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert all(parameter.grad is None for parameter in model.parameters())
    x = batches()[0]
    assert torch.equal(model(x), plain(x))


def test_no_step_copies_from_the_host_which_would_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    make, copies, counts = torch.tensor, [], []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        copies.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counted)
    for steps in (8, 16):
        copies.clear()
        run(sharp(Attention()), steps=steps)
        counts.append(len(copies))
    assert counts[0] == counts[1] > 0


def test_what_diverged_is_named_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    train = train_site

    def train_and_break_one(learners: Any, *args: Any) -> None:
        train(learners, *args)
        broken = next(each for each in learners if (each.entry.tail, each.entry.mixing) == ("pooled", "row"))
        for parameters in broken.candidates():
            parameters.alpha_gain.data.fill_(torch.nan)

    monkeypatch.setattr(sys.modules["sla2_compile.calibrate"], "train_site", train_and_break_one)
    report = run(sharp(Blocks()))
    results = [each for site in report.sites for each in site.results]
    assert all(each.form != "pooled, row" and each.after <= each.before < math.inf for each in results)
    assert len(report.diverged()) == 2
    assert "not finite, and so not kept: pooled, row at" in str(report)


def test_the_error_in_the_report_is_that_of_the_compiled_model() -> None:
    plain, data = sharp(Attention()), batches(2)
    model = copy.deepcopy(plain)
    report = calibrate(model, data, sparsity=0.75, config=SMALL, steps=30, progress=False)
    (result,) = report.sites[0].results
    held_out = data[1]
    for is_learned, expected in ((True, result.after), (False, result.before)):
        each = model if is_learned else plain

        def backend(gm: Any, inputs: Any) -> Any:
            convert(gm, SLA2Config(**{**SMALL_OPTIONS, "sparsity": 0.75}))
            return aot_eager(gm, inputs)

        torch._dynamo.reset()
        with torch.no_grad():
            out, dense = torch.compile(each, backend=backend)(held_out), each(held_out)
        assert ((out - dense).norm() / dense.norm()).item() == pytest.approx(expected, rel=1e-4)


def test_the_kept_form_is_the_best_and_the_compiled_model_runs_it_at_the_first_sparsity() -> None:
    model = sharp(Attention())
    report = run(model, sparsity=(0.75, 0.5))
    for result in report.sites[0].results:
        assert set(result.errors) == {"pooled, row", "pooled, block", "linear, row", "linear, block"}
        assert result.after == min(result.before, *result.errors.values())
    (call,) = owner_state(model).settings.calls
    assert call.default_units == 750_000
    entry = call.entries[0]
    assert report.sites[0].results[0].form == f"{entry.tail}, {entry.mixing}"
    config = SLA2Config(**{**SMALL_OPTIONS, "sparsity": 0.75, "tail": entry.tail, "mixing": entry.mixing})
    state = owner_state(model).parameters_of(call, entry)

    def backend(gm: Any, inputs: Any) -> Any:
        convert(gm, SMALL, sparsity_is_default=True)
        return aot_eager(gm, inputs)

    x = structured(seed=9)
    expected = with_learned_reference(model, [state], x, config=config)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected, rtol=1e-4, atol=1e-5)


def spoil(learners: Any, *args: Any) -> None:
    """In place of training: nothing but the sparse branch."""
    for learner in learners:
        learner.parameters.alpha_logit.data += 30


def test_a_form_that_was_asked_for_is_kept_with_what_it_learned_though_the_default_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "train_site", spoil)
    model = sharp(Attention())
    report = run(model, tails=("linear",), mixings=("block",))
    (result,) = report.sites[0].results
    assert not result.improved
    assert result.after == result.errors["linear, block"] > result.before
    assert result.form == "linear, block"
    (call,) = owner_state(model).settings.calls
    assert (call.entries[0].tail, call.entries[0].mixing) == ("linear", "block")
    assert (owner_state(model).parameters_of(call, call.entries[0]).alpha_logit >= 20).all()
    assert "no better than the untrained default, whose form was not asked for: " in str(report)


def test_a_site_that_does_not_improve_keeps_its_start_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_site", spoil)
    model = sharp(Blocks())
    report = run(model)
    assert report.not_improved() == [("blocks.0", 0.75), ("blocks.1", 0.75)]
    assert "kept at the untrained start: blocks.0 at 75 %, blocks.1 at 75 %" in str(report)
    for block in model.blocks:
        (call,) = owner_state(block).settings.calls
        assert (call.entries[0].tail, call.entries[0].mixing) == ("pooled", "row")
        fresh, kept = LearnedParameters(HEADS, HEAD_DIM), owner_state(block).parameters_of(call, call.entries[0])
        assert all(torch.equal(a, b) for a, b in zip(fresh.tensors(), kept.tensors(), strict=True))


def test_the_same_seed_gives_the_same_state_whatever_the_groups_and_another_seed_does_not() -> None:
    states = []
    # One site needs 2 x 4 KiB x 3 tensors per head and batch: with this memory each site is a group of its own.
    for settings in ({}, {"memory_gib": 1.5e-3}, {"store": "device"}, {"seed": 1}):
        torch.manual_seed(0)
        model = sharp(Blocks())
        run(model, steps=8, **settings)
        states.append(model.state_dict())
    for other in states[1:3]:
        assert all(torch.equal(states[0][name], value) for name, value in other.items())
    assert any(not torch.equal(states[0][name], value) for name, value in states[3].items())


def test_groups_fit_the_memory_and_a_site_that_does_not_is_an_error() -> None:
    model = prepare(sharp(Blocks()), batches()[0], config=SMALL)
    training, held_out = batches()[:3], batches()[3:]
    sizes = Capture(model, SMALL, "host").measure(training, held_out)
    assert [size.key for size in sizes] == [SiteKey("blocks.0", 0), SiteKey("blocks.1", 0)]
    assert {size.num_bytes for size in sizes} == {3 * 256 * WIDTH * 4 * 4.5}
    needed = sizes[0].num_bytes / 2**30
    assert [len(group) for group in group_sites(sizes, 2.1 * needed)] == [2]
    assert [len(group) for group in group_sites(sizes, 1.9 * needed)] == [1, 1]
    with pytest.raises(ValueError, match=r"memory_gib: expected at least .* for the samples of blocks\.0 alone"):
        group_sites(sizes, 0.9 * needed)


def test_batches_of_other_lengths_count_with_their_own_size() -> None:
    model = prepare(sharp(Blocks()), structured(), config=SMALL)
    (size, _) = Capture(model, SMALL, "host").measure([structured(), structured(512), structured(512)], [structured()])
    assert size.num_bytes == 3 * WIDTH * 4 * (256 * 2.5 + 512 * 2)


@pytest.mark.parametrize(("reach_both", "expected"), [([0, 1, 1, 1], []), ([1, 1, 0, 1], ["blocks.1"])])
def test_a_site_that_only_some_batches_reach_is_calibrated_or_named(reach_both: list[int], expected: list[str]) -> None:
    class Conditional(Blocks):
        def forward(self, x: Tensor, both: bool = True) -> Tensor:
            return super().forward(x) if both else self.blocks[0](x)

    model = prepare(sharp(Conditional()), structured(), config=SMALL)
    inputs = [(x, bool(both)) for x, both in zip(batches(), reach_both, strict=True)]  # the third is held out
    report = calibrate(model, inputs, sparsity=0.75, config=SMALL, steps=4, progress=False)
    assert report.skipped == expected
    assert {"blocks.0", "blocks.1"} == {site.name for site in report.sites} | set(expected)
    assert owner_state(model.blocks[1]).settings.calls[0].is_calibrated == (not expected)


def test_a_caller_in_inference_mode_gets_state_that_trains() -> None:
    with torch.inference_mode():
        model = sharp(Blocks())
        run(model, steps=4)
    assert not any(p.is_inference() for name, p in model.named_parameters() if ".sla2." in name)


def test_captured_samples_are_what_attention_saw() -> None:
    model, x = prepare(sharp(CalledTwice()), structured(), config=SMALL), structured()
    samples = Capture(model, SMALL, "host").run([x], [SiteKey("attention", 0)], keep_dense=True)[
        SiteKey("attention", 0)
    ]
    assert len(samples) == 2
    inner = model.attention
    for sample, seen in zip(samples, (x, x + inner(x)), strict=True):
        for kept, layer in ((sample.q, inner.to_q), (sample.k, inner.to_k), (sample.v, inner.to_v)):
            torch.testing.assert_close(kept, layer(seen)[0].unflatten(-1, (HEADS, HEAD_DIM)).transpose(0, 1))
        torch.testing.assert_close(sample.dense.transpose(0, 1).flatten(1), inner(seen)[0])
    assert owner_state(inner).name == ""


def test_an_interruption_keeps_the_sites_already_done(monkeypatch: pytest.MonkeyPatch) -> None:
    train, calls = module.train_site, []

    def interrupt(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(*args)

    monkeypatch.setattr(module, "train_site", interrupt)
    model = sharp(Blocks())
    report = run(model, steps=8)
    assert report.interrupted
    assert [site.name for site in report.sites] == ["blocks.0"]
    assert report.skipped == ["blocks.1"]
    first, second = (owner_state(block).settings.calls[0].is_calibrated for block in model.blocks)
    assert (first, second) == (True, False)
    assert "interrupted" in str(report)


def test_the_budget_is_spread_so_that_the_summed_error_is_no_worse() -> None:
    model = sharp(Blocks())
    # The second block attends evenly, so that its kept blocks are worth little.
    model.blocks[1].to_q.weight.data *= 0.05
    report = run(model, sparsity=(0.5, 0.625, 0.75, 0.875, 0.9375), budget=0.75)
    budget = report.budget
    assert budget is not None
    assert budget.delivered >= 0.75 - 1e-6
    assert budget.spread_error < budget.uniform_error
    assert budget.per_site["blocks.0"] < 0.75 < budget.per_site["blocks.1"]
    for name, sparsity in budget.per_site.items():
        assert owner_state(model.get_submodule(name)).settings.calls[0].default_units == round(sparsity * 1e6)


def test_spreading_finds_the_best_of_all_combinations() -> None:
    import itertools

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sites = [
            [Choice(i, int(n), float(e)) for i, (n, e) in enumerate(zip(pairs, errors, strict=True))]
            for pairs, errors in zip(
                torch.randint(1, 20, (4, 3), generator=generator).tolist(),
                torch.rand(4, 3, generator=generator).tolist(),
                strict=True,
            )
        ]
        possible = [
            sum(c.error for c in combination)
            for combination in itertools.product(*sites)
            if sum(c.num_pairs for c in combination) <= 30
        ]
        best = spread_budget(sites, 30)
        if not possible:
            assert best is None
            continue
        assert best is not None
        assert sum(c.num_pairs for c in best) <= 30
        assert sum(c.error for c in best) == pytest.approx(min(possible))


def test_the_report_prints_converts_to_plain_values_and_to_a_page() -> None:
    report = run(sharp(Blocks()), steps=8, budget=0.75)
    text = str(report)
    assert "blocks.1" in text
    assert "paper's form" in text
    assert "spread: blocks.0 75 %, blocks.1 75 %" in text
    values = json.loads(json.dumps(report.to_dict()))
    assert len(values["sites"][0]["results"][0]["curves"]["pooled, row"]) == 8
    page = report.to_html()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 2
    assert page.count("<polyline") == 2 * 4
    # A figure says how many steps it shows, and where their three phases meet.
    assert page.count(">8</text>") == 2
    assert page.count('<line x1="75.0"') == page.count('<line x1="225.0"') == 2


def test_masks_grouped_heads_and_16_bit_batches_calibrate() -> None:
    class Grouped(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (
                layer(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
            )
            k, v = k[:, :1], v[:, :1]
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)

    model = sharp(Grouped()).to(torch.bfloat16)
    mask = (torch.arange(256) < 200)[None, None, None]
    data = [{"x": structured(seed=i).to(torch.bfloat16).repeat(2, 1, 1), "mask": mask} for i in range(3)]
    report = calibrate(model, data, sparsity=0.75, config=SMALL, steps=30, progress=False)
    (site,) = report.sites
    assert site.num_training_samples == 4
    assert site.results[0].after < site.results[0].before


def test_batches_come_as_tensors_tuples_dicts_or_both() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert split_batch(x) == ((x,), {})
    assert split_batch((x, y)) == ((x, y), {})
    assert split_batch({"x": x}) == ((), {"x": x})
    assert split_batch(((x,), {"y": y})) == ((x,), {"y": y})


def test_arguments_that_cannot_work_are_errors() -> None:
    errors: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": 1.5}, r"sparsity: expected a fraction in \(0, 1\), got \[1.5\]"),
        ({"budget": 0}, r"budget: expected a fraction"),
        ({"tails": ("cubic",)}, "tails: expected some of 'pooled', 'linear'"),
        ({"steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"num_query_blocks": 1.5}, r"num_query_blocks: expected an integer of at least 1, got 1\.5"),
        ({"lr": 0}, "lr: expected a positive number, got 0"),
        ({"tau": "x"}, "tau: expected a positive number, got 'x'"),
        ({"memory_gib": -1}, "memory_gib: expected a positive number, got -1"),
        ({"store": "disk"}, "store: expected 'host' or 'device', got 'disk'"),
        ({"held_out_ratio": 1}, "held_out_ratio: expected a fraction"),
    ]
    for settings, message in errors:
        with pytest.raises(ValueError, match=message):
            run(Blocks(), **settings)
    with pytest.raises(ValueError, match="batches: expected at least two"):
        calibrate(Blocks(), [tokens()], config=SMALL)
    kinds: list[tuple[Any, Any, Any, str]] = [
        (torch.relu, [tokens(), tokens()], SMALL, r"model: expected a torch\.nn\.Module, got builtin"),
        (Blocks(), tokens(), SMALL, "batches: expected a list of the model's inputs, got Tensor"),
        (Blocks(), 5, SMALL, "batches: expected a list of the model's inputs, got int"),
        (Blocks(), [tokens(), tokens()], {"sparsity": 0.5}, "config: expected an SLA2Config or None, got dict"),
    ]
    for model, inputs, config, message in kinds:
        with pytest.raises(TypeError, match=message):
            calibrate(model, inputs, config=config)


# The soft attention that training uses


@pytest.mark.parametrize("tail", ["pooled", "linear"])
@pytest.mark.parametrize("mixing", ["row", "block"])
@pytest.mark.parametrize("exact", [(0, 0), (3, 17)])
@pytest.mark.parametrize("token_grid", [None, (2, 5, 8)])
def test_with_a_hard_mask_it_is_the_reference(
    tail: Any, mixing: Any, exact: tuple[int, int], token_grid: tuple[int, int, int] | None
) -> None:
    torch.manual_seed(0)
    config = SLA2Config(
        sparsity=0.6, block_q=32, block_k=16, tail=tail, mixing=mixing, exact_prefix=exact[0], exact_suffix=exact[1],
        token_grid=token_grid,
    )  # fmt: skip
    length = sum(exact) + 80
    kind = {"dtype": torch.float64}
    q, (k, v) = torch.randn(4, length, 16, **kind), torch.randn(2, 2, length, 16, **kind) + 1
    real = torch.rand(length) > 0.2
    router, logit, gain = (
        torch.randn(2, 16, 16, **kind),
        torch.randn(4, -(-length // 32), **kind),
        torch.rand(4, **kind),
    )
    learned = {"router": tuple(router), "alpha_logit": logit, "alpha_gain": gain if mixing == "row" else None}
    expected = reference.attention(
        q[None], k[None], v[None], attn_mask=real[None, None, None], config=config, **learned
    )[0]
    if token_grid is not None:
        expected = expected[:, tile_order(token_grid, length, exact[0])]
    sample = block_sample(q, k, v, real, None, config)
    rows = torch.tensor(list(sample.routed))
    step = take_step(sample, rows, with_linear_tail=tail == "linear")
    mask = hard_mask(sample, router_scores(step, *router), config.sparsity_units)
    out = soft_attention(step, mask, logit[:, rows], gain, tail=tail, mixing=mixing)
    expected = reference.split_blocks(expected, 32)[:, rows]
    is_real = sample.real_rows[rows][None, :, :, None]
    torch.testing.assert_close(out * is_real, expected * is_real)


@pytest.mark.parametrize(
    ("tail", "mixing"), [("pooled", "row"), ("pooled", "block"), ("linear", "row"), ("linear", "block")]
)
def test_its_gradients_to_router_and_mixing_are_exact(tail: str, mixing: str) -> None:
    torch.manual_seed(0)
    config = SLA2Config(sparsity=0.6, block_q=16, block_k=16)
    kind = {"dtype": torch.float64}
    sample = block_sample(*torch.randn(3, 2, 80, 16, **kind), None, None, config)
    step = take_step(sample, torch.tensor([0, 3]), with_linear_tail=True)

    def loss(proj_q: Tensor, proj_k: Tensor, logit: Tensor, gain: Tensor) -> Tensor:
        mask = soft_mask(sample, router_scores(step, proj_q, proj_k), config.sparsity_units, 0.5)
        return (soft_attention(step, mask, logit, gain, tail=tail, mixing=mixing) - step.dense).square().sum()

    leaves = [
        torch.randn(16, 16, **kind),
        torch.randn(16, 16, **kind),
        torch.randn(2, 2, **kind),
        torch.rand(2, **kind),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    if mixing == "block":
        leaves[3].requires_grad_(False)
    check: Callable[..., bool] = torch.autograd.gradcheck
    assert check(loss, leaves, fast_mode=True)


def test_the_soft_mask_keeps_as_many_blocks_as_the_hard_one_also_where_keys_are_missing() -> None:
    torch.manual_seed(0)
    config = SLA2Config(sparsity=0.7, block_q=16, block_k=16, exact_prefix=4)
    real = torch.arange(160) < 100
    sample = block_sample(*torch.randn(3, 2, 160, 16), real, None, config)
    step = take_step(sample, torch.tensor(list(sample.routed)), with_linear_tail=False)
    scores = router_scores(step, torch.eye(16), torch.eye(16))
    soft, hard = soft_mask(sample, scores, config.sparsity_units, 0.1), hard_mask(sample, scores, config.sparsity_units)
    torch.testing.assert_close(soft.sum(-1), hard.sum(-1), rtol=0, atol=1e-4)
    assert num_kept(sample, config.sparsity_units) == 3
    assert soft[..., 7:].eq(0).all()
    assert soft[..., 0].eq(1).all()
    assert dataclasses.is_dataclass(sample)
