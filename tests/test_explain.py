"""`explain`, its table and its page, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import SMALL, Attention, Blocks, KeepGraphs, tokens
from torch import Tensor, nn

import sla2_compile
from sla2_compile.cli import main
from sla2_compile.config import SLA2Config
from sla2_compile.kernels import reference
from sla2_compile.kernels.blocks import delivered_sparsity

KEYS = {
    "name", "pattern_name", "verdict", "reason", "q_shape", "kv_len", "requested_sparsity", "delivered_sparsity",
    "flops_dense", "flops_sla2", "num_calls",
}  # fmt: skip


class SelfAndCross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.attn2(self.attn1(x), text)


RASTER = "eligible, in raster order (token grid unknown)"
CONFIG = SLA2Config(sparsity=0.75, block_q=16, block_k=16, min_seq_len=64)


def test_a_report_says_what_becomes_of_each_site_and_why() -> None:
    report = sla2_compile.explain(SelfAndCross(), tokens(128), tokens(16), config=CONFIG)
    first, second = report.to_dict()["sites"]
    assert set(first) == set(second) == KEYS
    assert (first["name"], first["verdict"], first["reason"]) == ("attn1", "sla2", RASTER)
    assert (first["q_shape"], first["kv_len"]) == ((1, 2, 128, 16), 128)
    assert (first["requested_sparsity"], first["delivered_sparsity"]) == (0.75, 0.75)
    assert first["flops_dense"] == 4 * 2 * 128 * 128 * 16
    assert first["flops_sla2"] < first["flops_dense"]
    assert (second["name"], second["verdict"]) == ("attn2", "dense")
    assert second["reason"] == "cross-attention to 16 keys, fewer than min_seq_len=64"
    assert second["flops_sla2"] == second["flops_dense"]


def test_delivered_sparsity_is_measured_with_exact_tokens_and_padding() -> None:
    config = SLA2Config(sparsity=0.75, block_q=16, block_k=16, min_seq_len=0, exact_prefix=20)
    (site,) = sla2_compile.explain(Attention(), tokens(128), config=config).to_dict()["sites"]
    # 8 x 8 blocks: two exact rows keep all 8, the other six keep two exact blocks and two more.
    assert (
        site["delivered_sparsity"]
        == pytest.approx(1 - (2 * 8 + 6 * 4) / 64)
        == pytest.approx(delivered_sparsity(128, 128, config))
    )
    mask = torch.arange(128).reshape(1, 1, 1, 128) < 64
    (site,) = sla2_compile.explain(Attention(), tokens(128), mask=mask, config=CONFIG).to_dict()["sites"]
    # Of the four blocks with real keys two are kept; those without any do not count as skipped.
    assert site["delivered_sparsity"] == pytest.approx(0.5)


def test_the_picture_shows_the_router_s_own_choice() -> None:
    model, x = Attention(), tokens(128)
    (site,) = sla2_compile.explain(model, x, config=CONFIG).sites
    q, k = (project(x).unflatten(-1, (2, 16)).transpose(1, 2) for project in (model.to_q, model.to_k))
    expected = reference.block_mask(q, k, config=CONFIG)[0].float().mean(0)
    assert site.mask is not None
    torch.testing.assert_close(site.mask, expected)


def test_explaining_changes_neither_weights_nor_buffers_nor_randomness() -> None:
    model = nn.Sequential(Blocks(), nn.BatchNorm1d(64), nn.Dropout(0.5))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    sla2_compile.explain(model, tokens(), config=SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_graphs_of_a_broken_model_are_one_report() -> None:
    class Broken(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    report = sla2_compile.explain(Broken(), tokens(), config=SMALL)
    assert [site["name"] for site in report.to_dict()["sites"]] == ["blocks.0", "blocks.1"]


class BreakingBlock(nn.Module):
    """Breaks the graph in its own forward, as blocks of HiDream and HunyuanVideo-1.5 do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        torch._dynamo.graph_break()
        return x + self.attn(y)


class BreakingBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BreakingBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_graph_that_serves_many_blocks_is_reported_at_each_by_its_place_in_the_model() -> None:
    report = sla2_compile.explain(BreakingBlocks(), tokens(), config=SMALL)
    sites = report.to_dict()["sites"]
    assert [(site["name"], site["pattern_name"], site["num_calls"]) for site in sites] == [
        ("blocks.0.attn", "attn", 1),
        ("blocks.1.attn", "attn", 1),
    ]
    assert all(site.mask is not None for site in report.sites)
    assert "blocks.1.attn (attn)" in str(report)
    assert "blocks.1.attn (attn)" in report.to_html()
    # What the report shows in brackets is what patterns match.
    excluded = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=0, exclude=("attn",))
    verdicts = {
        site["verdict"] for site in sla2_compile.explain(BreakingBlocks(), tokens(), config=excluded).to_dict()["sites"]
    }
    assert verdicts == {"dense"}


class PerSample(nn.Module):
    """A loop over the batch that looks at values, as Mochi's: Dynamo leaves all of the function to Python."""

    def forward(self, q: Tensor, is_real: Tensor) -> Tensor:
        outs = []
        for i in range(q.shape[0]):
            x = torch.cat([q[i : i + 1], q[i : i + 1, :, is_real[i].nonzero().flatten()]], 2)
            outs.append(torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, :, : q.shape[2]])
        return torch.cat(outs)


class WithPerSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.per_sample = Attention(), PerSample()

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        return self.per_sample(self.attn(x)[:, None], is_real)


def test_attention_that_dynamo_leaves_to_python_is_counted_with_dynamo_s_reason() -> None:
    x, is_real = torch.cat([tokens(), tokens()]), torch.ones(2, 64, dtype=torch.bool)
    # First, as Dynamo remembers for good which functions it has given up.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = sla2_compile.explain(WithPerSample(), x, is_real, config=SMALL)
    assert [site["name"] for site in report.to_dict()["sites"]] == ["attn", "per_sample", "per_sample#1"]
    assert report.to_dict()["num_calls_outside"] == 0
    torch._dynamo.reset()
    report = sla2_compile.explain(WithPerSample(), x, is_real, config=SMALL)
    assert [site["name"] for site in report.to_dict()["sites"]] == ["attn"]
    assert report.to_dict()["num_calls_outside"] == 2
    assert "ran 2 times outside of every compiled graph" in str(report)
    assert "capture_dynamic_output_shape_ops" in str(report)
    assert "capture_dynamic_output_shape_ops" in report.to_html()


def test_it_can_be_asked_any_number_of_times() -> None:
    model = Attention()
    for sparsity in [x / 20 for x in range(20)]:
        config = SLA2Config(sparsity=sparsity, block_q=16, block_k=16, min_seq_len=0)
        (site,) = sla2_compile.explain(model, tokens(320), config=config).to_dict()["sites"]
        assert site["delivered_sparsity"] == pytest.approx(sparsity, abs=0.051)


def test_many_explanations_leave_room_for_the_compilation_that_matters() -> None:
    # Dynamo stops compiling a function, silently, when it holds too many versions of it.
    model = Blocks()
    for num_tokens in range(64, 74):
        sla2_compile.explain(model, tokens(num_tokens), config=SMALL)
    graphs = KeepGraphs()
    torch.compile(model, backend=graphs)(tokens())
    assert len(graphs.graphs) == 1


def test_meta_tensors_give_everything_but_pictures() -> None:
    with torch.device("meta"):
        model, x = Attention(), torch.empty(1, 128, 32)
    report = sla2_compile.explain(model, x, config=CONFIG)
    assert report.to_dict()["sites"][0]["delivered_sparsity"] == 0.75
    assert report.sites[0].mask is None
    assert "<img" not in report.to_html()


def test_a_report_prints_as_an_aligned_table() -> None:
    lines = str(sla2_compile.explain(SelfAndCross(), tokens(128), tokens(16), config=CONFIG)).splitlines()
    assert lines[0].split()[:2] == ["site", "verdict"]
    column = lines[0].index("verdict")
    assert [line[column : column + 5].strip() for line in lines[2:4]] == ["sla2", "dense"]
    assert lines[-1].startswith("1 of 2 sites converted")


def test_a_model_without_attention_has_an_empty_report() -> None:
    report = sla2_compile.explain(nn.Linear(32, 32), tokens())
    assert report.to_dict() == {"sites": [], "num_calls_outside": 0}
    assert str(report) == "no attention site was found"
    assert "No attention site was found" in report.to_html()


def test_the_page_holds_a_picture_of_every_converted_site_and_escapes_names() -> None:
    report = sla2_compile.explain(SelfAndCross(), tokens(128), tokens(16), config=CONFIG)
    report.sites[1].site.reason = "<script>"
    page = report.to_html()
    assert page.count("data:image/png;base64,") == 1
    assert "<script>" not in page
    assert "attn2" in page


def test_strict_raises_in_explain_too() -> None:
    with pytest.raises(Exception, match="strict: expected every site"):
        sla2_compile.explain(
            lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
            torch.randn(1, 2, 128, 16),
            config=SLA2Config(strict=True, min_seq_len=0),
        )


WAN = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip
WAN_INPUTS = ["hidden_states=1x4x4x64x64", "timestep=1:int64", "encoder_hidden_states=1x16x16:bfloat16"]


@pytest.fixture
def wan_config(tmp_path: Path) -> str:
    pytest.importorskip("diffusers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WAN))
    return str(path)


def run_explain(wan_config: str, *more: str) -> int:
    inputs = [part for text in WAN_INPUTS for part in ("--input", text)]
    return main(["explain", "WanTransformer3DModel", wan_config, *inputs, *more])


def test_the_command_explains_a_diffusers_model(wan_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_explain(wan_config, "--option", "sparsity=0.9", "--json") == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [(site["name"], site["verdict"]) for site in sites] == [
        ("blocks.0.attn1", "sla2"), ("blocks.0.attn2", "dense"),
        ("blocks.1.attn1", "sla2"), ("blocks.1.attn2", "dense"),
    ]  # fmt: skip
    assert sites[0]["requested_sparsity"] == 0.9
    assert sites[0]["q_shape"] == [1, 2, 4096, 32]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["NoSuchModel", "{config}"], "model_class: expected a model class of diffusers"),
        (["WanTransformer3DModel", "missing.json"], "missing.json"),
        (["WanTransformer3DModel", "{config}"], "--input: expected hidden_states, timestep"),
        (["WanTransformer3DModel", "{config}", "--input", "timestep"], "--input: expected NAME=SHAPE"),
        (["WanTransformer3DModel", "{config}", "--input", "timestep=1:int65"], "--input: expected NAME=SHAPE"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_that_says_what_to_do(
    arguments: list[str], message: str, wan_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *(text.format(config=wan_config) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sla2: ")
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_option_on_the_command_line_lists_the_known(
    wan_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_explain(wan_config, "--option", "sparsty=0.9") == 2
    assert "expected any of sparsity" in capsys.readouterr().err


def test_inputs_that_the_model_cannot_take_say_so_with_their_shapes(
    wan_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ("hidden_states=1x16x8x8", "timestep=1:int64", "encoder_hidden_states=1x8x64")
    assert (
        main(["explain", "WanTransformer3DModel", wan_config, *(part for x in inputs for part in ("--input", x))]) == 2
    )
    error = capsys.readouterr().err
    assert "--input: expected shapes and dtypes that WanTransformer3DModel.forward can take" in error
    assert "hidden_states (1, 16, 8, 8)" in error


def test_the_doctor_names_versions_devices_kernels_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "qk_format int8" in out
    if not torch.cuda.is_available():
        assert "no CUDA device" in out
        assert "emulated" in out


def test_a_pattern_that_matches_nothing_is_an_error_in_explain_too() -> None:
    config = SLA2Config(exclude=("attn3",), min_seq_len=0)
    with pytest.raises(ValueError, match=r"exclude: .*'attn3'.*attn1, attn2"):
        sla2_compile.explain(SelfAndCross(), tokens(128), tokens(16), config=config)


def test_attention_in_other_spellings_is_explained_and_runs() -> None:
    class Spelled(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
            probs = (q @ q.transpose(-1, -2)).softmax(-1)
            kept = (q @ q.transpose(-1, -2)).softmax(-1)
            return (probs @ q).transpose(1, 2), kept.matmul(q) + kept.sum()

    report = sla2_compile.explain(Spelled(), torch.randn(1, 2, 128, 16), config=CONFIG)
    found = [(site["verdict"], site["num_calls"]) for site in report.to_dict()["sites"]]
    assert found == [("sla2", 1), ("dense", 1)]
    assert report.sites[0].mask is not None
    assert report.to_dict()["sites"][1]["reason"] == "its probabilities are used elsewhere"
