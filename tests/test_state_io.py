"""`save_state` and `load_state`: bit for bit into another process, and refusals that say what does not match."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from learned_models import TwoSites, compile_aot, parameters, randomize
from small_models import SMALL, SMALL_OPTIONS, Attention, Blocks, tokens
from torch import nn

from sla2_compile.calibrate import calibrate
from sla2_compile.learned_state import CallSettings, Entry, LearnedParameters
from sla2_compile.prepare import owner_state, prepare, prepared_owners
from sla2_compile.state_io import load_state, save_state

pytest.importorskip("safetensors")
HERE = Path(__file__).parent

# Ends a script that has made `model`: prints a hash of what the compiled model gives.
PRINT_OUTPUT = """
import hashlib, warnings
from small_models import SMALL_OPTIONS, tokens
torch.compiler.reset()
warnings.simplefilter("ignore")
with torch.no_grad():
    out = torch.compile(model, backend="sla2", options=SMALL_OPTIONS)(tokens(64))
print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def learned_blocks() -> Blocks:
    torch.manual_seed(0)
    model = prepare(Blocks(), tokens(), config=SMALL)
    for i, block in enumerate(model.blocks):
        made = [LearnedParameters(2, 16, 4), LearnedParameters(2, 16)]
        entries = (Entry(500_000, "linear", "block"), Entry(750_000, "pooled", "row"))
        context = (("block_q", 16), ("block_k", 16))
        owner_state(block).replace_call(CallSettings(0, 2, 16, entries, 750_000, context), made)
        for each in made:
            each.alpha_logit.data += i + 1
            each.proj_q.data += 0.3 * torch.randn(16, 16)
    return model


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1]


def test_a_calibrated_model_loaded_in_a_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    weights, state = tmp_path / "weights.pt", tmp_path / "state.safetensors"
    calibrating = f"""
import torch
from small_models import SMALL, Attention, tokens
from sla2_compile.calibrate import calibrate
from sla2_compile.state_io import save_state
torch.manual_seed(0)
model = Attention()
torch.save(model.state_dict(), {str(weights)!r})
calibrate(model, [tokens(64), tokens(80)], sparsity=0.5, config=SMALL, steps=12, progress=False)
save_state(model, {str(state)!r})
"""
    loading = f"""
import torch
from small_models import Attention
from sla2_compile.state_io import load_state
model = Attention()
model.load_state_dict(torch.load({str(weights)!r}, weights_only=True))
load_state(model, {str(state)!r})
"""
    first = run(calibrating + PRINT_OUTPUT)
    assert first == run(loading + PRINT_OUTPUT)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_state_returns_into_a_prepared_model_and_into_one_that_is_not(is_prepared: bool, tmp_path: Path) -> None:
    model, path = learned_blocks(), tmp_path / "state.safetensors"
    save_state(model, path)
    torch.manual_seed(0)
    other = Blocks()
    if is_prepared:
        prepare(other, tokens(), config=SMALL)
        randomize(other)
    load_state(other, path)
    state, expected = other.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(compile_aot(other)(tokens()), compile_aot(model)(tokens()))
    assert {name for name, p in other.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "state.safetensors"
    save_state(learned_blocks(), path)
    with safe_open(str(path), framework="pt") as file:
        description = json.loads(file.metadata()["sla2"])
        assert "blocks.1.sla2.call0_500000.alpha_logit" in file.keys()  # noqa: SIM118  (not a mapping)
    assert description["library_version"]
    (call,) = description["owners"]["blocks.1"]["calls"]
    assert (call["num_heads"], call["head_dim"], call["default_units"]) == (2, 16, 750_000)
    assert call["entries"][0] == {"sparsity_units": 500_000, "tail": "linear", "mixing": "block"}
    assert ["block_q", 16] in call["context"]


def test_sites_that_do_not_match_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(learned_blocks(), path)
    longer = Blocks()
    longer.blocks.append(Attention())
    with pytest.raises(ValueError, match=r"missing from the file: blocks\.2; unexpected in it: none"):
        load_state(prepare(longer, tokens(), config=SMALL), path)
    another = Blocks()
    another.blocks.append(Attention())
    with pytest.raises(ValueError, match=r"missing from the file: blocks\.2; unexpected in it: none"):
        load_state(another, path)
    shorter = Blocks()
    del shorter.blocks[1]
    with pytest.raises(ValueError, match=r"missing from the file: none; unexpected in it: blocks\.1"):
        load_state(shorter, path)
    with pytest.raises(ValueError, match=r"missing from the file: none; unexpected in it: blocks\.1"):
        load_state(prepare(shorter, tokens(), config=SMALL), path)
    with pytest.raises(
        ValueError, match=r"missing from the file: root, root#1; unexpected in it: blocks\.0, blocks\.1"
    ):
        load_state(prepare(TwoSites(), x=tokens(), context=tokens(), config=SMALL), path)


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(learned_blocks(), path)
    model = Blocks()
    model.blocks[1] = nn.Identity()
    prepare(model, tokens(), config=SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="unexpected"):
        load_state(model, path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model = learned_blocks()
    state = owner_state(model.blocks[0])
    state.replace_call(CallSettings(0, 4, 8), [LearnedParameters(4, 8)])
    save_state(model, path)
    with pytest.raises(ValueError, match=r"expected 2 heads of 16 in blocks\.0, as in this model, got 4 of 8"):
        load_state(prepare(Blocks(), tokens(), config=SMALL), path)


def test_files_and_models_without_state_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="expected a file written by save_state"):
        load_state(Blocks(), path)
    with pytest.raises(ValueError, match="expected a prepared model"):
        save_state(Blocks(), path)


def test_modules_like_the_owners_that_had_no_state_need_none_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(prepare(Blocks(), tokens(), config=dataclasses.replace(SMALL, exclude=("blocks.1",))), path)
    model = Blocks()
    load_state(model, path)
    assert [name for name, _ in prepared_owners(model)] == ["blocks.0"]


def test_paths_and_models_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="path: expected a safetensors file written by save_state"):
        load_state(Blocks(), tmp_path / "text")
    with pytest.raises(ValueError, match="path: expected a file in a folder that can be written"):
        save_state(learned_blocks(), tmp_path / "missing" / "state.safetensors")
    for call in (save_state, load_state):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
            call(5, tmp_path / "text")  # type: ignore[arg-type]


def test_a_logit_learned_at_one_length_serves_others_with_an_error_that_grows_smoothly() -> None:
    torch.manual_seed(0)
    model = Attention()
    model.to_q.weight.data *= 3
    model.to_k.weight.data *= 3
    batches = [tokens(256), tokens(256) * 0.9, tokens(256) * 1.1]
    calibrate(model, batches, sparsity=0.75, config=SMALL, steps=60, mixings=("block",), progress=False)
    (entry,) = owner_state(model).settings.calls[0].entries
    assert parameters(model).alpha_logit.shape[1] in (1, 16)
    errors = []
    sparse = type(SMALL)(**{**SMALL_OPTIONS, "sparsity": entry.sparsity_units / 1e6})
    compiled = compile_aot(model, sparse)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for length in (256, 272, 320, 400, 512):
            dense = model(tokens(length))
            errors.append(((compiled(tokens(length)) - dense).norm() / dense.norm()).item())
    # Lengths up to twice as long: no jump from one to the next, and never far from the length of the calibration.
    assert all(after < 1.25 * before for before, after in itertools.pairwise(errors))
    assert max(errors) < 1.5 * errors[0]
