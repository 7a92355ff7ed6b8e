"""What the graph shows of a sequence: the text that is joined with a video, and the grid of the video's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import HEADS, WIDTH, KeepGraphs, tokens, with_reference
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from sla2_compile.backend import build_backend
from sla2_compile.config import SLA2Config
from sla2_compile.passes.pipeline import convert
from sla2_compile.passes.sites import Site

SLA2_OP = torch.ops.sla2.attention.default
CONFIG = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=24)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def site_of(model: Callable[..., Any], *args: Any, config: SLA2Config = CONFIG, **kwargs: Any) -> Site:
    backend = KeepGraphs(lambda gm: convert(gm, config))
    torch.compile(model, backend=backend, fullgraph=True, **kwargs)(*args)
    sites = [site for sites in backend.results for site in sites]
    assert sites[-1].verdict == "sla2", sites[-1].reason
    return sites[-1]


def exact_tokens(site: Site) -> tuple[int, int]:
    assert site.config is not None
    return site.config.exact_prefix, site.config.exact_suffix


def grid(site: Site) -> tuple[int, int, int] | None:
    assert site.config is not None
    return site.config.token_grid


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Joint(nn.Module):
    """Text and video with projections of their own, joined for attention, as in Flux and SD3."""

    def __init__(self, video_first: bool = False) -> None:
        super().__init__()
        self.of_text, self.of_video = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.video_first = video_first

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.of_text(text).chunk(3, -1), self.of_video(video).chunk(3, -1)]
        if self.video_first:
            parts.reverse()
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        out = attend(self.norm(q), self.norm(k), v)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


class Stack(nn.Module):
    """Text and video joined once, then blocks, as the single-stream part of Flux."""

    def __init__(self, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.use_checkpoint = use_checkpoint

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([text, video], dim=1)
        for block in self.blocks:
            x = checkpoint(self.step, block, x, use_reentrant=False) if self.use_checkpoint else self.step(block, x)
        return x

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + attend(*block(F.layer_norm(x, (WIDTH,))).chunk(3, -1))


class Patches(nn.Module):
    """A video in patches of a Conv3d, then attention, with text in front where there is some."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), stride=(1, 2, 2))

    def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        x = x if text is None else torch.cat([text, x], 1)
        return attend(x, x, x)


def test_the_length_of_joined_text_is_read_and_kept_exact() -> None:
    site = site_of(Joint(), tokens(64), tokens(12))
    assert exact_tokens(site) == (12, 0)
    assert "the first 12 tokens exact" in site.reason
    assert site.node.kwargs["exact_prefix"] == 12
    site = site_of(Joint(video_first=True), tokens(64), tokens(12))
    assert exact_tokens(site) == (0, 12)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_text_that_was_joined_long_before_is_found_in_every_block(use_checkpoint: bool) -> None:
    backend = KeepGraphs(lambda gm: convert(gm, CONFIG))
    torch.compile(Stack(use_checkpoint), backend=backend)(tokens(64, requires_grad=True), tokens(12))
    assert [exact_tokens(site) for sites in backend.results for site in sites] == [(12, 0)] * 3


def test_a_part_that_is_not_short_is_not_text() -> None:
    assert exact_tokens(site_of(Joint(), tokens(64), tokens(60))) == (0, 0)


def test_symbolic_lengths_stay_symbolic_and_exact_tokens_follow_them() -> None:
    model = Joint()
    backend = KeepGraphs(lambda gm: convert(gm, CONFIG))
    compiled = torch.compile(model, backend=backend, dynamic=True)

    for num_video, num_text in ((128, 20), (96, 33), (160, 7)):
        video, text = tokens(num_video), tokens(num_text)
        config = SLA2Config(sparsity=0.5, block_q=16, block_k=16, exact_prefix=num_text)
        for out, expected in zip(compiled(video, text), with_reference(model, config, video, text), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(backend.graphs) == 1


def test_what_the_user_gives_goes_first() -> None:
    given = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=24, exact_suffix=5)
    assert exact_tokens(site_of(Joint(), tokens(64), tokens(12), config=given)) == (0, 5)
    torch._dynamo.reset()
    off = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=24, infer_layout=False)
    site = site_of(Patches(), torch.randn(1, 4, 3, 8, 8), tokens(12), config=off)
    assert (exact_tokens(site), grid(site)) == ((0, 0), None)
    torch._dynamo.reset()
    other = SLA2Config(sparsity=0.5, block_q=16, block_k=16, min_seq_len=24, token_grid=(4, 3, 4))
    assert grid(site_of(Patches(), torch.randn(1, 4, 3, 8, 8), config=other)) == (4, 3, 4)


def linear_patches(video: Tensor) -> Tensor:
    """(B, C, T, H, W) in patches by reshapes, as in diffusers' HiDream and transformers' Qwen-VL."""
    b, c, t, h, w = video.shape
    x = video.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
    return x.reshape(b, t * (h // 2) * (w // 2), 4 * c)


def frames_of_pictures(video: Tensor) -> Tensor:
    """(B, C, T, H, W) frame by frame through a Conv2d, as in CogVideoX."""
    b, c, t, _, _ = video.shape
    x = F.conv2d(video.transpose(1, 2).flatten(0, 1), torch.ones(16, c, 2, 2), stride=2)
    return x.view(b, t, *x.shape[1:]).flatten(3).transpose(2, 3).flatten(1, 2)


def channels_last(video: Tensor) -> Tensor:
    return (
        F.conv3d(video, torch.ones(16, video.shape[1], 1, 2, 2), stride=(1, 2, 2)).permute(0, 2, 3, 4, 1).flatten(1, 3)
    )


@pytest.mark.parametrize("make", [linear_patches, frames_of_pictures, channels_last])
def test_the_grid_is_read_however_a_video_becomes_tokens(make: Callable[[Tensor], Tensor]) -> None:
    def model(video: Tensor) -> Tensor:
        x = make(video)[:, None]
        return F.scaled_dot_product_attention(x, x, x)

    assert grid(site_of(model, torch.randn(2, 4, 3, 8, 8))) == (3, 4, 4)


def picture_by_reshape(picture: Tensor) -> Tensor:
    """(B, C, H, W) in patches by one reshape, as in CogView4 and Lumina2."""
    b, c, h, w = picture.shape
    x = picture.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3).flatten(1, 2)


def picture_by_einsum(picture: Tensor) -> Tensor:
    """The same as PRX writes it."""
    b, c, h, w = picture.shape
    x = torch.einsum("nchpwq->nhwcpq", picture.reshape(b, c, h // 2, 2, w // 2, 2))
    return x.reshape(b, (h // 2) * (w // 2), 4 * c)


@pytest.mark.parametrize("make", [picture_by_reshape, picture_by_einsum])
def test_the_grid_of_a_picture_is_read_where_a_reshape_cuts_it_into_patches(make: Callable[[Tensor], Tensor]) -> None:
    def model(picture: Tensor) -> Tensor:
        x = make(picture).squeeze(1)[:, None]
        return F.scaled_dot_product_attention(x, x, x)

    assert grid(site_of(model, torch.randn(1, 4, 12, 16))) == (1, 6, 8)


def test_heads_and_their_dimension_are_no_grid() -> None:
    def model(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (4, 12)).flatten(1).unflatten(1, (48, -1))[:, None]
        return F.scaled_dot_product_attention(x, x, x)

    assert grid(site_of(model, torch.randn(1, 16, 48))) is None


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """As in Mochi: the two halves of every pair are stacked."""
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
    return torch.stack(pairs, dim=-1).flatten(-2)


def rotate_complex(x: Tensor, angles: Tensor) -> Tensor:
    """As in Qwen-Image."""
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(as_complex * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def rotate_by_matrices(x: Tensor, angles: Tensor) -> Tensor:
    """As in Kandinsky: 2 x 2 matrices, multiplied and summed."""
    rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    return (rows.unflatten(-1, (2, 2)) * x.unflatten(-1, (-1, 1, 2))).sum(dim=-1).flatten(-2)


@pytest.mark.parametrize("rotate", [rotate_pairs, rotate_complex, rotate_by_matrices])
def test_a_rotation_keeps_the_grid_and_shows_that_of_its_angles(rotate: Callable[[Tensor, Tensor], Tensor]) -> None:
    def model(x: Tensor, angles: Tensor) -> Tensor:
        angles = angles.expand(3, 4, 6, -1).reshape(1, 1, 72, -1)
        return F.scaled_dot_product_attention(rotate(x, angles), rotate(x, angles), x)

    assert grid(site_of(model, torch.randn(1, 2, 72, 16), torch.randn(3, 1, 1, 8))) == (3, 4, 6)


def test_text_among_the_keys_alone_stays_exact_and_no_grid_is_used() -> None:
    def model(video: Tensor, text: Tensor) -> Tensor:
        keys = torch.cat([text, video], 1)
        return attend(video, keys, keys)

    site = site_of(model, tokens(64), tokens(12))
    assert exact_tokens(site) == (12, 0)
    assert grid(site) is None
    assert site.reason.endswith("(queries and keys are not the same tokens)")


def test_text_of_symbolic_length_leaves_the_grid_and_adds_no_guard() -> None:
    backend = KeepGraphs(lambda gm: convert(gm, CONFIG))
    compiled = torch.compile(Patches(), backend=backend)
    video = torch.randn(1, 4, 3, 8, 8)
    for num_text in (12, 7, 20, 5):
        compiled(video, tokens(num_text))
    grids = [grid(site) for sites in backend.results for site in sites]
    assert grids == [(3, 4, 4)] * 2


class RealText(Patches):
    """Only the real tokens of the text attend, as in Mochi: how many, only the run knows."""

    def forward(self, video: Tensor, text: Tensor, is_real: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(video).flatten(2).transpose(1, 2)
        x = torch.cat([x, text[:, is_real.nonzero().flatten()]], 1)
        return attend(x, x, x)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_length_that_only_the_run_knows_converts_and_is_compiled_once(sparsity: float) -> None:
    model, video, text = RealText(), torch.randn(1, 4, 3, 8, 8), tokens(12)
    options = {"sparsity": sparsity, "block_q": 16, "block_k": 16, "min_seq_len": 24}
    given = {"token_grid": (3, 4, 4), "block_q": 16, "block_k": 16, "sparsity": sparsity}
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True):
        site = site_of(model, video, text, torch.arange(12) < 9)
        assert site.reason.endswith("keeping the last 12 tokens exact, in tiles of the 3 x 4 x 4 grid")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="sla2", options=options, fullgraph=True)
        for num_real in (9, 4, 12, 0):
            inputs = video, text, torch.arange(12) < num_real
            expected = with_reference(model, SLA2Config(**given, exact_suffix=num_real), *inputs)
            torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_grid_of_the_video_is_found_behind_the_text() -> None:
    site = site_of(Patches(), torch.randn(1, 4, 3, 8, 8), tokens(12))
    assert (exact_tokens(site), grid(site)) == ((12, 0), (3, 4, 4))
    assert "in tiles of the 3 x 4 x 4 grid" in site.reason


def test_a_picture_has_one_frame() -> None:
    def model(picture: Tensor) -> Tensor:
        x = F.conv2d(picture, torch.ones(16, 4, 2, 2), stride=2).flatten(2).transpose(1, 2)[:, None]
        return F.scaled_dot_product_attention(x, x, x)

    assert grid(site_of(model, torch.randn(1, 4, 12, 16))) == (1, 6, 8)


def test_a_rotary_table_shows_the_grid_of_tokens_that_come_flat() -> None:
    def model(x: Tensor, frequencies: Tensor) -> Tensor:
        angles = frequencies.expand(3, 4, 6, -1).reshape(1, 1, 72, -1)
        q = x * angles.cos() + x.flip(-1) * angles.sin()
        return F.scaled_dot_product_attention(q, q, x)

    assert grid(site_of(model, torch.randn(1, 2, 72, 16), torch.randn(3, 1, 1, 16))) == (3, 4, 6)


def test_a_grid_that_nothing_shows_is_said_to_be_unknown() -> None:
    site = site_of(Joint(), tokens(64), tokens(12))
    assert grid(site) is None
    assert site.reason.endswith("in raster order (token grid unknown)")


@pytest.mark.parametrize("with_text", [False, True])
def test_a_grid_of_symbolic_size_stays_symbolic_and_the_tiles_follow_it(with_text: bool) -> None:
    model, backend = Patches(), KeepGraphs(lambda gm: convert(gm, CONFIG))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for frames, size in ((3, 8), (5, 12), (4, 16)):
        num_text = 4 + frames if with_text else 0
        inputs = torch.randn(1, 4, frames, size, size + 4), tokens(num_text) if with_text else None
        given = (frames, size // 2, size // 2 + 2)
        config = SLA2Config(sparsity=0.5, block_q=16, block_k=16, token_grid=given, exact_prefix=num_text)
        torch.testing.assert_close(compiled(*inputs), with_reference(model, config, *inputs), rtol=1e-4, atol=1e-5)
    assert len(backend.graphs) == 1


class CheckpointedPatches(Patches):
    """The same with its attention in a graph of its own, which is computed again in the backward."""

    def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        x = x if text is None else torch.cat([text, x], 1)
        return checkpoint(lambda x: attend(x, x, x), x, use_reentrant=False)


def test_symbolic_sizes_reach_attention_in_checkpointed_blocks() -> None:
    model, options = CheckpointedPatches(), {"sparsity": 0.5, "block_q": 16, "block_k": 16, "min_seq_len": 0}
    backend = build_backend(SLA2Config(**options), aot_eager)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, size in ((3, 8), (5, 12), (4, 16)):
            inputs = torch.randn(1, 4, frames, size, size + 4), tokens(4 + frames)
            given = (frames, size // 2, size // 2 + 2)
            config = SLA2Config(**options, token_grid=given, exact_prefix=4 + frames)
            grads = []
            for out in (compiled(*inputs), with_reference(Patches.forward.__get__(model), config, *inputs)):
                model.zero_grad()
                out.square().mean().backward()
                grads.append((out.detach(), model.embed.weight.grad.clone()))
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_inductor_compiles_symbolic_grids_once_and_trains_with_them() -> None:
    model, options = Patches(), {"sparsity": 0.5, "block_q": 16, "block_k": 16, "min_seq_len": 24}
    compiled = torch.compile(model, backend="sla2", options=options, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, size in ((3, 8), (4, 12)):
            video = torch.randn(1, 4, frames, size, size + 4)
            config = SLA2Config(sparsity=0.5, block_q=16, block_k=16, token_grid=(frames, size // 2, size // 2 + 2))
            grads = []
            for out in (compiled(video), with_reference(model, config, video)):
                model.zero_grad()
                out.square().mean().backward()
                grads.append(model.embed.weight.grad.clone())
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
