"""`examples/paper_table`: its rows are what they say, its jobs resume, and its page says what is missing."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

pytest.importorskip("sklearn")

from examples.paper_table import __main__ as command
from examples.paper_table.context import Context
from examples.paper_table.jobs import SERVED, RowJob, Stage1, TeacherStage, serve_in_new_process
from examples.paper_table.measures import feature_distance, kernel_distance, psnr, ssim
from examples.paper_table.pictures import SHOWN_ROWS
from examples.paper_table.presets import FULL, REHEARSAL, TINY
from examples.paper_table.published import TEACHER, read_teacher, write_teacher
from examples.paper_table.report import page, verdict
from examples.paper_table.rows import DEFAULT, FORMS, PAPER, Row, all_rows
from examples.paper_table.schedule import all_jobs, expected_seconds, pending, run_jobs
from examples.paper_table.storage import SHARD_BYTES, Storage
from examples.paper_table.training import OutOfTimeError, Plan, train
from examples.paper_table.variants import SLA, SparseOnly
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.flow import later, training_batch
from examples.video_dit.frames import save_frames
from examples.video_dit.model import VideoDiT
from sla2_compile.config import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.prepare import owner_state, prepared_owners


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures, the teacher and one form's stage 1."""
    folder = tmp_path_factory.mktemp("table")
    assert command.main(["pictures", "--tiny", "--root", str(folder)]) == 0
    run = ["run", "--tiny", "--root", str(folder), "--device", "cpu", "--only"]
    assert command.main([*run, "teacher-*", "stage1-linear-block"]) == 0
    return folder


def context(root: Path) -> Context:
    return Context(TINY, Storage("tiny", root), "cpu", time.monotonic() + 600)


# The teacher that lies in the repository


def test_a_published_model_has_its_matrices_rounded_and_all_else_as_it_was(tmp_path: Path) -> None:
    weights = {"matrix": torch.randn(120, 100), "table": torch.randn(11, 40), "bias": torch.randn(100)}
    weights["matrix"][3] = 0
    write_teacher(weights, tmp_path / "teacher")
    found = read_teacher(tmp_path / "teacher")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in ("table", "bias"))
    # Half a code, of which a row's largest number has 127.
    limit = weights["matrix"].abs().amax(1, keepdim=True) / 254
    assert ((found["matrix"] - weights["matrix"]).abs() <= 1.001 * limit).all()
    assert not torch.equal(found["matrix"], weights["matrix"])


def test_the_command_publishes_the_trained_teacher(root: Path) -> None:
    assert command.main(["publish", "--tiny", "--root", str(root)]) == 0
    found = read_teacher(Storage("tiny", root).work / TEACHER.name)
    VideoDiT(TINY.model).load_state_dict(found)


def test_rows_begin_from_the_published_teacher_where_none_was_trained(tmp_path: Path) -> None:
    teacher = Context(FULL, Storage("full", tmp_path), "cpu", time.monotonic()).teacher
    weights = teacher.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in read_teacher().items())


# The rows


def test_every_row_has_a_name_of_its_own_and_all_comparisons_of_the_paper_are_there() -> None:
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    for sparsity in (0.95, 0.97):
        assert {row.form for row in rows if row.sparsity == sparsity and row.trained and not row.low_bit
                and row.kind == "sla2"} == set(FORMS)  # fmt: skip
    assert {row.sparsity for row in rows if row.form == PAPER and row.low_bit and row.router == "learned"} == {
        0.9, 0.95, 0.97,
    }  # fmt: skip
    assert {(row.kind, row.tiles) for row in rows if not row.trained} == {
        ("full", True), ("sla2", True), ("sla2", False), ("sparse", True), ("sparse", False),
    }  # fmt: skip


def test_the_full_preset_has_the_size_that_was_asked_for_and_its_weights_fit_the_transport() -> None:
    with torch.device("meta"):
        model = VideoDiT(FULL.model)
    num_parameters = sum(p.numel() for p in model.parameters())
    assert 20e6 <= num_parameters <= 80e6
    assert 4096 <= FULL.model.num_tokens <= 16384
    # Few enough shards, and beside them and the pictures a little room in 64 MiB.
    assert 2 * num_parameters <= 3 * SHARD_BYTES
    assert sum(isinstance(job, RowJob) for job in all_jobs(FULL)) > 40


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, TINY.model.num_tokens, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", ["sparse", "sla"])
def test_variants_are_the_branches_of_masked_attention_with_the_op_s_own_choice_of_blocks(kind: Any) -> None:
    row = Row(kind, 0.5)
    q, k, v = (x.requires_grad_() for x in qkv())
    variant = SLA(row, TINY) if kind == "sla" else SparseOnly(row, TINY)
    config = SLA2Config.from_options({**row.options(TINY), "tail": "linear", "mixing": "block"})
    kept = reference.block_mask(q, k, config=config)
    order = reference.tile_order(TINY.model.grid, q.shape[2], 0, device=q.device)
    mask = kept.repeat_interleave(16, 2).repeat_interleave(16, 3)
    sorted_q, sorted_k, sorted_v = (x[:, :, order] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(sorted_q, sorted_k, sorted_v, attn_mask=mask)
    if isinstance(variant, SLA):
        torch.nn.init.normal_(variant.proj)
        smooth = sorted_k - sorted_k.mean(2, keepdim=True)
        weights = sorted_q.softmax(-1) @ smooth.softmax(-1).mT * ~mask
        expected = expected + (weights @ sorted_v / weights.sum(-1, keepdim=True)) @ variant.proj.mT
    out, grad = variant(q, k, v)[:, :, order], torch.randn_like(expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    leaves = [q, k, v, *variant.parameters()]
    for x, y in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_row_gets_its_form_its_router_and_its_formats(root: Path) -> None:
    learned = Storage("tiny", root).read_learned("stage1-linear-block")
    # The form's own mixing, though the untrained default, which has another, is better.
    assert any(x.count_nonzero() for name, x in learned.items() if name.endswith("alpha_logit"))
    for router, low_bit in (("learned", True), ("means", False)):
        row = Row("sla2", 0.97, PAPER, router, low_bit=low_bit)  # type: ignore[arg-type]
        model, options = RowJob(row).build(context(root))
        assert options is not None
        assert options["strict"]
        ((_, owner),) = prepared_owners(model)
        settings = owner_state(owner).settings
        assert (settings.low_bit is not None) == low_bit
        assert {(entry.tail, entry.mixing) for entry in settings.calls[0].entries} == {PAPER}
        for name, parameter in model.named_parameters():
            if ".proj_" in name:
                expected = learned[name] if router == "learned" else torch.eye(16)
                assert torch.equal(parameter, expected)
                assert not parameter.requires_grad
            elif ".alpha_logit" in name:
                assert torch.equal(parameter, learned[name])


def test_rows_differ_from_full_attention_and_from_each_other(root: Path) -> None:
    shared = context(root)
    clips = shared.maker.make(0, 1)
    rows = [
        Row("full"),
        Row("sla", 0.5),
        Row("sparse", 0.5),
        Row("sla2", 0.97, trained=False),
        Row("sla2", 0.97, PAPER),
    ]
    outputs = []
    for row in rows:
        model, options = RowJob(row).build(shared)
        if row.kind == "sla":
            torch.nn.init.eye_(model.get_parameter("blocks.0.attention.attend.proj"))
        compile_blocks(model, options, "aot_eager")
        outputs.append(model(clips.video, torch.full((1,), 0.5), clips.label))
    for i, a in enumerate(outputs):
        assert not any(torch.equal(a, b) for b in outputs[i + 1 :])


# The measures


def test_measures_are_perfect_for_equal_clips_and_worse_the_more_they_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(3, 2, 3, 24, 32, generator=generator) * 2 - 1
    noise = torch.randn(clips.shape, generator=generator)
    near, far = clips + 0.05 * noise, clips + 0.3 * noise
    assert psnr(clips, clips) == pytest.approx(60)
    assert ssim(clips, clips) == pytest.approx(1)
    assert 60 > psnr(near, clips) > psnr(far, clips)
    assert 1 > ssim(near, clips) > ssim(far, clips) > 0
    assert psnr(clips * 0 + 0.1, clips * 0) == pytest.approx(-20 * math.log10(0.05), abs=1e-4)
    tokens = torch.randn(2, 5, 8, generator=generator)
    assert feature_distance(tokens, 3 * tokens) == pytest.approx(0, abs=1e-6)
    assert feature_distance(tokens, -tokens) == pytest.approx(4, abs=1e-5)


def test_the_kernel_distance_is_about_0_for_one_distribution_and_grows_with_the_shift() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(shift: float) -> Tensor:
        return torch.randn(200, 16, generator=generator) + shift

    same = [kernel_distance(draw(0), draw(0)) for _ in range(10)]
    assert abs(sum(same) / 10) < 0.05
    assert max(same) < kernel_distance(draw(0.5), draw(0)) < kernel_distance(draw(1), draw(0))


def test_frames_are_a_picture_that_others_can_read(tmp_path: Path) -> None:
    video = torch.linspace(-1, 1, 2 * 5 * 3 * 4 * 6).view(2, 5, 3, 4, 6)
    save_frames(video, tmp_path / "frames.png", num_frames=2)
    image = Image.open(tmp_path / "frames.png")
    assert image.size == (12, 8)
    red, green, blue = ((video[1, 4, :, 2, 3] + 1) * 127.5).round().int().tolist()
    assert image.getpixel((6 + 3, 4 + 2)) == (red, green, blue)


def test_frames_of_rows_without_training_are_those_their_jobs_would_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = context(tmp_path)
    torch.manual_seed(0)
    # Large weights: after a few steps of training, attention would move no pixel.
    weights = {name: torch.randn_like(x) for name, x in VideoDiT(TINY.model).state_dict().items()}
    tiny.storage.write_weights(tiny.last_stage, weights)

    assert command.main(["frames", "--tiny", "--root", str(tmp_path), "--device", "cpu"]) == 0

    shown = [name for name in SHOWN_ROWS if "untrained" in name]
    assert {path.stem for path in tiny.storage.results.glob("*.png")} == set(shown)
    ratios = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[2:]]
    # The teacher's clips against themselves, then others that differ.
    assert len(ratios) == len(shown)
    assert ratios[0] == 60
    assert max(ratios[1:]) < 60
    torch.testing.assert_close(tiny.samples(tiny.teacher, 2), tiny.samples(tiny.teacher)[:2])


def test_shifted_times_keep_the_ends_and_are_nearer_to_the_noise_between(root: Path) -> None:
    times = torch.linspace(0, 1, 9)
    assert torch.equal(later(times, 1.0), times)
    assert (later(times, 3.0)[1:-1] > times[1:-1]).all()
    assert later(times, 3.0)[[0, 4, -1]].tolist() == [0, 0.75, 1]
    clips = context(root).maker.make(0, 4)
    (x, t, target), (shifted_x, shifted_t, shifted_target) = training_batch(clips, 5), training_batch(clips, 5, 3.0)
    torch.testing.assert_close(shifted_t, later(t, 3.0))
    assert torch.equal(target, shifted_target)
    assert (shifted_x - clips.video).norm() > (x - clips.video).norm()


# Pieces


def trained(root: Path, stops: list[int | None]) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    shared = context(root)
    checkpoint = shared.storage.unfinished / "test.pt"
    for stop in stops:
        model, _ = RowJob(Row("full")).build(shared)
        plan = Plan(6, 1, lambda step: 1e-3 / (step + 1), 7, 3.0, checkpoint, math.inf, stop_after=stop)
        try:
            result = train(model, shared.maker, plan)
        except OutOfTimeError:
            assert checkpoint.exists()
    assert not checkpoint.exists()
    return {**model.state_dict(), **{f"averaged.{name}": x for name, x in result.averaged.items()}}, result.losses


def test_training_that_ran_out_of_time_goes_on_to_the_same_bits(root: Path) -> None:
    weights, losses = trained(root, [2, 4, None])
    expected, expected_losses = trained(root, [None])
    assert losses == expected_losses
    assert all(torch.equal(x, expected[name]) for name, x in weights.items())


def test_a_stage_gives_the_same_wherever_the_one_before_ran(root: Path, tmp_path: Path) -> None:
    first = Storage("tiny", tmp_path)
    (first.work / "pictures.npz").write_bytes((root / "work/tiny/pictures.npz").read_bytes())
    here = Context(TINY, first, "cpu", time.monotonic() + 600)
    first.write_result("teacher-0", {**TeacherStage(0).run(here), **here.machine()})
    first.write_bundle(tmp_path / "bundle")

    other = Storage("tiny", tmp_path / "other")
    assert other.read_bundle(tmp_path / "bundle") == ["teacher-0"]
    (other.work / "pictures.npz").write_bytes((first.work / "pictures.npz").read_bytes())
    TeacherStage(1).run(Context(TINY, other, "cpu", time.monotonic() + 600))
    weights, expected = other.read_weights("teacher-1"), Storage("tiny", root).read_weights("teacher-1")
    assert weights is not None
    assert expected is not None
    assert all(torch.equal(x, expected[name]) for name, x in weights.items())
    assert other.read_weights("teacher-0") is None


def test_large_weights_travel_in_shards(tmp_path: Path) -> None:
    storage = Storage("tiny", tmp_path)
    weights = {"a": torch.randn(SHARD_BYTES // 2 + 1000), "number": torch.tensor([3])}
    storage.write_weights("teacher-0", weights)
    assert sorted(path.name for path in storage.work.glob("teacher-*")) == ["teacher-0.0", "teacher-0.1"]
    again = storage.read_weights("teacher-0")
    assert again is not None
    assert torch.equal(again["a"], weights["a"].bfloat16().float())
    assert torch.equal(again["number"], weights["number"])


def test_a_job_that_fails_does_not_take_the_others_along(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RowJob.run

    def fail_once(self: RowJob, shared: Context) -> dict[str, Any]:
        if self.row.kind == "sla":
            raise RuntimeError("a fault")
        return run(self, shared)

    monkeypatch.setattr(RowJob, "run", fail_once)
    only = ["sla-95-s0", "sparse-95-s0"]
    assert command.main(["run", "--tiny", "--root", str(root), "--device", "cpu", "--only", *only]) == 1
    results = Storage("tiny", root).all_results()
    assert "sla-95-s0" not in results
    assert results["sparse-95-s0"]["measures"]["held_out_loss"] > 0


def test_no_time_begins_no_job_and_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", "--tiny", "--root", str(root), "--device", "cpu", "--only", "full-s0", "--budget-seconds", "0"]
    assert command.main(run) == 0
    assert "too few seconds are left to begin" in capsys.readouterr().out
    assert Storage("tiny", root).result("full-s0") is None


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A folder of its own, and jobs that do nothing."""
    for job in (TeacherStage, Stage1, RowJob):
        monkeypatch.setattr(job, "run", lambda self, shared: {})
    return context(tmp_path)


def test_processes_that_share_a_folder_do_different_jobs(quick: Context) -> None:
    storage = quick.storage
    with Storage("tiny", storage.work.parents[1]).claimed("teacher-0") as is_mine:
        assert is_mine
        assert storage.others_at_work("teacher-1")
        assert run_jobs(quick, ("teacher-0",)) == []
        assert storage.result("teacher-0") is None
    assert run_jobs(quick, ("teacher-*",)) == []
    assert {name: result["alone"] for name, result in storage.all_results().items()} == {
        "teacher-0": True, "teacher-1": True,
    }  # fmt: skip


def test_a_process_waits_for_what_another_is_at_and_it_needs(quick: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, ended = quick.storage, []
    other = Storage("tiny", storage.work.parents[1]).claimed("teacher-0")
    other.__enter__()

    def end_it(seconds: float) -> None:
        storage.write_result("teacher-0", {"seconds": 1})
        other.__exit__(None, None, None)
        ended.append(seconds)

    monkeypatch.setattr(time, "sleep", end_it)
    assert run_jobs(quick, ("*",)) == []
    assert len(ended) == 1
    assert set(storage.all_results()) == {job.name for job in all_jobs(TINY)}


def test_what_must_come_back_is_whole_after_every_job(quick: Context, tmp_path: Path) -> None:
    seen, there = [], Storage("tiny", tmp_path / "there")

    def bring_back() -> None:
        quick.storage.write_weights(f"teacher-{len(seen)}", {"a": torch.ones(2)})
        quick.storage.write_bundle(tmp_path / "bundle")
        there.read_bundle(tmp_path / "bundle")
        seen.append(sorted(there.all_results()))
        assert [path.name for path in there.work.glob("teacher-*")] == [f"teacher-{len(seen) - 1}.0"]

    assert run_jobs(quick, ("teacher-*",), bring_back) == []
    assert seen == [["teacher-0"], ["teacher-0", "teacher-1"]]


def test_what_failed_is_tried_again_after_all_others(quick: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TeacherStage, shared: Context) -> dict[str, Any]:
        raise RuntimeError("a fault")

    monkeypatch.setattr(TeacherStage, "run", fail)
    assert run_jobs(quick, ("teacher-0",)) == ["teacher-0"]
    *_, last = pending(TINY, quick.storage, ("*",))
    assert last.name == "teacher-0"


def test_after_an_error_that_takes_the_device_along_no_job_begins(
    quick: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: TeacherStage, shared: Context) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(TeacherStage, "run", fail)
    monkeypatch.setattr(Context, "device_works", lambda self: False)
    quick.storage.write_result("teacher-1", {"seconds": 1})
    assert run_jobs(quick, ("*",)) == ["teacher-0"]
    assert set(quick.storage.all_results()) == {"teacher-1"}


def test_a_rehearsal_meets_every_shape_of_the_full_size() -> None:
    for preset in (FULL, REHEARSAL):
        assert preset.num_samples % 16 == preset.num_held_out % 16 == 0
    for name in ("model", "batch", "block_q", "block_k", "compiler"):
        assert getattr(FULL, name) == getattr(REHEARSAL, name)


def test_a_job_is_expected_to_take_as_long_as_the_longest_of_its_kind(tmp_path: Path) -> None:
    storage, jobs = Storage("tiny", tmp_path), all_jobs(TINY)
    stage = next(job for job in jobs if isinstance(job, TeacherStage))
    assert expected_seconds(stage, storage, TINY) == TINY.job_seconds
    for name, seconds in (("teacher-0", 5.0), ("teacher-1", 7.0), ("full-s0", 100.0)):
        storage.write_result(name, {"seconds": seconds})
    assert expected_seconds(stage, storage, TINY) == 7
    assert expected_seconds(RowJob(Row("full")), storage, TINY) == 100
    assert expected_seconds(RowJob(Row("full", trained=False)), storage, TINY) == TINY.job_seconds


def test_a_model_that_another_process_cannot_serve_does_not_take_its_row_along(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = context(root)
    model, options = RowJob(Row("sla2", 0.97, PAPER, "learned")).build(shared)
    assert options is not None
    compile_blocks(model, options, "aot_eager")
    monkeypatch.setattr(sys, "executable", "false")
    assert serve_in_new_process(model, options, shared)["same_bits"] is False


def test_the_plan_counts_what_is_done(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", "--tiny", "--root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("teacher-1 ") and "done in" in line for line in lines)
    assert any(line.startswith("full-s0 ") and line.endswith("missing") for line in lines)
    assert f"of {len(all_jobs(TINY))} jobs are done" in lines[-1]


@pytest.mark.slow
def test_the_whole_tiny_table_runs(root: Path, tmp_path: Path) -> None:
    assert command.main(["run", "--tiny", "--root", str(root), "--device", "cpu"]) == 0
    assert command.main(["report", "--tiny", "--root", str(root), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "paper_table.md").read_text()
    assert f"{len(all_jobs(TINY))} of {len(all_jobs(TINY))} jobs are done" in text
    assert "not measured" not in text
    results = Storage("tiny", root).all_results()
    low_bit = [result for name, result in results.items() if "-qat-" in name]
    assert low_bit
    assert results[SERVED]["served"]["same_bits"]
    for result in low_bit:
        assert result["formats"] == {"qk_format": "int8", "pv_format": "fp8", "step": "convert"}
    assert "Its numbers mean nothing" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"paper_table_frames.png", "paper_table_curves.png"}


# The page


def test_a_page_without_results_says_that_nothing_was_measured(tmp_path: Path) -> None:
    text = page(FULL, Storage("full", tmp_path), [])
    assert "**Nothing has been measured yet.**" in text
    assert text.count("not measured") == 9
    assert "tiny" not in text


def result_of(row: Row, seed: int, loss: float) -> tuple[str, dict[str, Any]]:
    measures = dict.fromkeys(("psnr", "ssim", "feature_distance", "kernel_distance", "seconds_per_clip"), 0.5)
    content = {"measures": {"held_out_loss": loss, **measures}, "seconds": 60, "device": "a card", "torch": "2"}
    return f"{row.name}-s{seed}", content


def test_the_page_holds_means_spreads_and_verdicts_and_lists_what_is_missing(tmp_path: Path) -> None:
    storage = Storage("full", tmp_path)
    sides = {Row("full"): 0.3, Row("sla2", 0.97, DEFAULT, "learned", low_bit=True): 0.3001, Row("sla", 0.95): 0.4,
             Row("sla2", 0.95, PAPER, "learned"): 0.35}  # fmt: skip
    for row, loss in sides.items():
        for seed in range(3):
            # Seeds that are hard for the others are easy for the one that is to be undecided.
            sign = -1 if row.low_bit else 1
            storage.write_result(*result_of(row, seed, loss + 0.001 * sign * (seed - 1)))
    text = page(FULL, storage, [])
    assert "| full attention" in text
    assert "0.30000 ± 0.00100" in text
    (equal,) = (line for line in text.splitlines() if line.startswith("| so are the pooled tail"))
    assert equal.endswith("holds: within noise |") or "holds: within noise " in equal
    (better,) = (line for line in text.splitlines() if line.startswith("| SLA2 is better than SLA,"))
    assert better.rstrip(" |").endswith("holds")
    assert "`sparse-95-s0`" in text
    (cost,) = (line for line in text.splitlines() if line.startswith("| full attention") and "500.0" in line)
    assert "500.0*" not in cost
    for seed in range(3):
        content = storage.result(f"full-s{seed}")
        assert content is not None
        storage.write_result(f"full-s{seed}", {**content, "alone": False})
    assert any("500.0*" in line for line in page(FULL, storage, []).splitlines())
    json.dumps(storage.all_results())


@pytest.mark.parametrize(
    "left, right, equal, expected",
    [
        ([1.0, 1.1], [2.0, 2.11], False, "holds"),
        ([2.0, 2.11], [1.0, 1.1], False, "does not hold"),
        # Seeds differ by more than the sides, which does not matter: each seed says the same.
        ([1.0, 2.0, 3.0], [1.1, 2.11, 3.1], False, "holds"),
        ([1.0, 1.2], [1.1, 1.2], False, "undecided: within noise"),
        ([1.0, 1.2], [1.1, 1.2], True, "holds: within noise"),
        ([2.0, 2.11], [1.0, 1.1], True, "does not hold: worse"),
        ([1.0], [2.5, 2.5], False, "one seed: left is lower, by 1.5"),
        ([], [1.0], False, "not measured"),
    ],
)
def test_verdicts_follow_the_differences_of_each_seed(
    left: list[float], right: list[float], equal: bool, expected: str
) -> None:
    assert verdict(dict(enumerate(left)), dict(enumerate(right)), equal=equal) == expected
