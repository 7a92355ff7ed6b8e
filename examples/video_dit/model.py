"""A video diffusion transformer as third parties write them: 3D rotary positions, query and key norms, adaptive norms.

Nothing here knows of SLA2: attention is `F.scaled_dot_product_attention`, which the backend finds in the graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.video_dit.clips import token_grid

Size = tuple[int, int, int]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model.

    Args:
        clip: (frames, height, width) in pixels.
        patch: the same of a token.
        width: of the residual stream.
        num_heads: attention heads, of width / num_heads each.
        num_layers: blocks.
        num_labels: what a clip may show.
    """

    clip: Size
    patch: Size
    width: int
    num_heads: int
    num_layers: int
    num_labels: int

    @property
    def grid(self) -> Size:
        return token_grid(self.clip, self.patch)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class DenseAttention(nn.Module):
    """Attention of q, k, v (B, H, N, D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm_q, self.norm_k = nn.RMSNorm(config.head_dim), nn.RMSNorm(config.head_dim)
        self.attend: nn.Module = DenseAttention()
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, H, D)
        q, k = (rotate(x, cos, sin).to(v.dtype) for x in (self.norm_q(q), self.norm_k(k)))
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        projected: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(config)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, C), condition (B, 6, C)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (condition + self.modulation).unsqueeze(2).unbind(1)
        x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1, cos, sin)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)


class VideoDiT(nn.Module):
    """Predicts the velocity of a noisy clip.

    Forward args: x (B, F, 3, H, W), t (B,) from 0 (clip) to 1 (noise), label (B,). Returns (B, F, 3, H, W).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_dim = config.width, 3 * math.prod(config.patch)
        self.embed = nn.Linear(patch_dim, width)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(config.num_labels, width)
        self.condition = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_dim)
        # Blocks start as the identity and the prediction at 0.
        for layer in (self.condition, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = rotary_angles(config.grid, config.head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(128, device=x.device) * (-math.log(10_000) / 128))
        phase = 1000 * t[:, None] * frequencies
        condition = self.time(torch.cat([phase.cos(), phase.sin()], -1)) + self.label(label)
        condition = self.condition(F.silu(condition)).unflatten(-1, (6, -1)).float()
        hidden = self.embed(self.to_tokens(x))
        for block in self.blocks:
            hidden = block(hidden, condition, self.cos, self.sin)
        return self.to_video(self.head(self.norm(hidden)))

    def to_tokens(self, video: Tensor) -> Tensor:
        """(B, F, 3, H, W) to (B, N, patch)."""
        (t, h, w), (a, b, c) = self.config.grid, self.config.patch
        parts = video.unflatten(4, (w, c)).unflatten(3, (h, b)).unflatten(1, (t, a))  # (B, t, a, 3, h, b, w, c)
        return parts.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(len(video), t * h * w, -1)

    def to_video(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        (t, h, w), (a, b, c) = self.config.grid, self.config.patch
        parts = tokens.view(len(tokens), t, h, w, a, 3, b, c).permute(0, 1, 4, 5, 2, 6, 3, 7)
        return parts.reshape(len(tokens), t * a, 3, h * b, w * c)


def rotary_angles(grid: Size, head_dim: int) -> Tensor:
    """(N, head_dim / 2) angles of the tokens' places: a quarter for time, the rest shared by height and width."""
    pairs = head_dim // 2
    spatial = 3 * pairs // 8
    counts = (pairs - 2 * spatial, spatial, spatial)
    places = torch.cartesian_prod(*(torch.arange(n).float() for n in grid)).view(-1, 3)
    parts = [places[:, i : i + 1] * 100.0 ** (-torch.arange(n) / n) for i, n in enumerate(counts)]
    return torch.cat(parts, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels of x (B, N, H, D) by the angles of their tokens."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
