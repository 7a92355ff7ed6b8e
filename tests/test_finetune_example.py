"""`examples/finetune_video_dit.py`: resuming, the ramp, two processes, and the model it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchao")
pytest.importorskip("sklearn")

from examples import finetune_video_dit
from examples.video_dit.clips import ClipMaker
from examples.video_dit.compiling import compile_blocks
from examples.video_dit.flow import training_batch
from examples.video_dit.model import ModelConfig, VideoDiT
from examples.video_dit.photographs import NUM_WITHOUT_SKIMAGE, gather, pack, unpack
from examples.video_dit.serve import digest, load_model, make_clips, prepare_model
from sla2_compile.prepare import owner_state, prepared_owners

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "steps": 4, "batch": 1, "teacher-steps": 2, "calibration-steps": 4, "layers": 1, "width": 32, "ramp-start": 0.7,
    "ramp-step": 0.1, "ramp-every": 1, "checkpoint-every": 3, "evaluate-every": 2, "compiler": "aot_eager",
}  # fmt: skip
SMALL_RUN = [*(f"--{name}={value}" for name, value in SETTINGS.items()), "--clip", "4", "32", "32"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("finetune")
    finetune_video_dit.main(["--output", str(folder), *SMALL_RUN])
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    content: dict[str, Any] = torch.load(folder / "model.pt", weights_only=True)
    weights: dict[str, torch.Tensor] = content["weights"]
    return weights


def test_an_interrupted_run_goes_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    for name in ("teacher.pt", "routing.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    arguments = ["--output", str(tmp_path), *SMALL_RUN]
    finetune_video_dit.main([*arguments, "--stop-after", "1"])
    assert not (tmp_path / "model.pt").exists()
    # Cut off after a checkpoint: what the log holds beyond it is done again.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "loss": -1.0, "sparsity": 0.7}) + "\n")
    torch._dynamo.reset()
    finetune_video_dit.main(arguments)
    assert log_of(tmp_path) == log_of(finished)
    weights, expected = weights_of(tmp_path), weights_of(finished)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in weights.items())


def test_the_log_shows_the_ramp_and_the_curves_are_drawn(finished: Path) -> None:
    lines = log_of(finished)
    assert [line["sparsity"] for line in lines] == [0.7, 0.8, 0.9, 0.9]
    assert [line["held_out"] is not None for line in lines] == [False, True, False, True]
    assert (finished / "curves.png").stat().st_size > 10_000


def test_the_router_stays_while_weights_and_mixing_train(finished: Path) -> None:
    from safetensors.torch import load_file

    before, after = load_file(finished / "routing.safetensors"), weights_of(finished)
    routers = [name for name in before if ".proj_" in name]
    assert routers
    assert all(torch.equal(before[name], after[name]) for name in routers)
    # The last two steps ran at 0.9.
    trained = [name for name in before if "_900000.alpha_logit" in name]
    assert trained
    assert not any(torch.equal(before[name], after[name]) for name in trained)
    teacher = torch.load(finished / "teacher.pt", weights_only=True)
    assert not torch.equal(teacher["head.weight"], after["head.weight"])


@pytest.mark.slow
def test_the_model_it_leaves_is_converted_and_serves_the_same_frames_in_a_new_process(finished: Path) -> None:
    path = finished / "model.pt"
    model, options = load_model(path)
    (owner,) = (owner for _, owner in prepared_owners(model))
    low_bit = owner_state(owner).settings.low_bit
    assert low_bit is not None
    assert (low_bit.qk_format, low_bit.pv_format, low_bit.step) == ("int8", "fp8", "convert")
    compile_blocks(model, options, "aot_eager")
    expected = digest(make_clips(model, 2, 2, seed=3))
    command = [sys.executable, "-m", "examples.video_dit.serve", str(path), "--compiler", "aot_eager"]
    command += ["--steps", "2", "--seed", "3", "--device", "cpu", "--output", str(finished / "frames.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == expected
    assert (finished / "frames.png").exists()


@pytest.mark.slow
def test_two_processes_share_the_work_and_resume_too(finished: Path, tmp_path: Path) -> None:
    for name in ("teacher.pt", "routing.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["examples/finetune_video_dit.py", "--output", str(tmp_path), *SMALL_RUN, "--device", "cpu"]
    for extra in (["--stop-after", "3"], []):
        result = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert [line["step"] for line in log_of(tmp_path)] == [0, 1, 2, 3]
    assert weights_of(tmp_path).keys() == weights_of(finished).keys()


# The ramp


def small_model() -> VideoDiT:
    torch.manual_seed(0)
    return VideoDiT(ModelConfig((4, 32, 32), (2, 4, 4), 32, 2, 2, 3))


# Dynamo keeps eight versions of a function: one level more would run dense if they were all kept.
@pytest.mark.parametrize("calibrated, num_levels", [(True, 3), (False, 9)])
def test_every_level_of_a_ramp_compiles_one_graph_for_all_blocks_and_none_runs_dense(
    calibrated: bool, num_levels: int
) -> None:
    model = small_model()
    options: dict[str, Any] = {"block_q": 32, "block_k": 16, "min_seq_len": 0, "token_grid": model.config.grid}
    levels = [0.5 + 0.4 / num_levels * i for i in range(num_levels)]
    clips = ClipMaker(gather(1), model.config.clip).make(0, 1)
    x, t, target = training_batch(clips, 0)
    if calibrated:
        from sla2_compile import SLA2Config, calibrate

        batches = [(x, t, clips.label), (target, t, clips.label)]
        calibrate(model, batches, sparsity=levels, config=SLA2Config(**options), steps=4, tails=("pooled",),
                  mixings=("row",), progress=False)  # fmt: skip
    else:
        prepare_model(model, options)
    # Blocks start as the identity, which hides what they compute.
    torch.nn.init.normal_(model.condition.weight)
    torch.nn.init.normal_(model.head.weight)
    dense, outputs = model(x, t, clips.label), []
    for level in levels:
        torch._dynamo.utils.counters.clear()
        compile_blocks(model, {**options, "sparsity": level}, "aot_eager")
        outputs.append(model(x, t, clips.label))
        outputs[-1].square().mean().backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not any(torch.equal(output, dense) for output in outputs)
    assert not torch.equal(outputs[0], outputs[-1])


# The clips


def test_clips_depend_on_their_seed_and_split_alone() -> None:
    maker = ClipMaker(gather(NUM_WITHOUT_SKIMAGE), (4, 24, 32))
    clips = maker.make(5, 3)
    assert clips.video.shape == (3, 4, 3, 24, 32)
    assert clips.video.abs().max() <= 1
    assert torch.equal(clips.video, maker.make(5, 3).video)
    for other in (maker.make(6, 3), maker.make(5, 3, "held_out")):
        assert not torch.equal(clips.video, other.video)
    # Things move: neighbouring frames differ, but less than the clips do.
    change = (clips.video[:, 1:] - clips.video[:, :-1]).abs().mean()
    assert 0 < change < (clips.video[0] - clips.video[1]).abs().mean()


def test_held_out_windows_never_share_a_center_cell_with_training_ones() -> None:
    maker = ClipMaker(gather(1), (1, 8, 8))
    cells = torch.arange(32).repeat_interleave(2)
    inside = torch.tensor([[0.01, 0.01], [0.99, 0.99]]).repeat(32, 1)
    places = {
        split: {tuple(cell) for cell in ((maker._centers(cells, inside, split) / 1.2 + 0.5) * 8).floor().int().tolist()}
        for split in ("train", "held_out")
    }
    assert not places["train"] & places["held_out"]
    assert len(places["train"] | places["held_out"]) == 64


def test_packed_pictures_are_the_gathered_ones(tmp_path: Path) -> None:
    pictures = gather(2)
    pack(pictures, tmp_path / "pictures.npz")
    again = unpack(tmp_path / "pictures.npz")
    assert torch.equal(again.digits, pictures.digits)
    assert len(again.photographs) == 2
    assert all(torch.equal(x, y) for x, y in zip(again.photographs, pictures.photographs, strict=True))


def test_the_model_takes_a_clip_apart_and_puts_it_together() -> None:
    model, video = small_model(), torch.randn(2, 4, 3, 32, 32)
    assert torch.equal(model.to_video(model.to_tokens(video)), video)
