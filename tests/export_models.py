"""Small models from the classes of others, with example inputs: what the tests of export run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.config import SLA2Config

# The video or picture of every model here has 256 tokens.
CONFIG = SLA2Config(sparsity=0.75, block_q=32, block_k=16, min_seq_len=200)


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the sites that should be converted.

    Args:
        build: makes the model, of random weights.
        kwargs: its inputs by name.
        sites: names of the converted sites.
    """

    build: Callable[[], nn.Module]
    kwargs: dict[str, Any]
    sites: tuple[str, ...]
    constants: dict[str, Any] = field(default_factory=lambda: {"return_dict": False})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    @property
    def inputs(self) -> dict[str, Any]:
        return {**self.kwargs, **self.constants}


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _hunyuan() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=16, sample_height=16, sample_frames=13, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8,
    )  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    settings = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=4,
        attn_implementation="sdpa",
    )  # fmt: skip
    return ViTModel(settings, add_pooling_layer=False)


def _text_mask() -> Tensor:
    mask = torch.ones(1, 8, dtype=torch.int64)
    mask[:, 5:] = 0
    return mask


def _flux_ids() -> tuple[Tensor, Tensor]:
    positions = torch.zeros(16, 16, 3)
    positions[..., 1], positions[..., 2] = torch.arange(16)[:, None], torch.arange(16)
    return positions.flatten(0, 1), torch.zeros(8, 3)


CASES = {
    "wan": Case(
        _wan,
        {
            "hidden_states": _randn(1, 4, 4, 16, 16),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": _randn(1, 8, 16),
        },
        ("blocks.0.attn1",),
    ),
    "flux": Case(
        _flux,
        {
            "hidden_states": _randn(1, 256, 4),
            "encoder_hidden_states": _randn(1, 8, 16),
            "pooled_projections": _randn(1, 8),
            "timestep": torch.tensor([0.5]),
            "img_ids": _flux_ids()[0],
            "txt_ids": _flux_ids()[1],
            "guidance": None,
        },
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    ),
    "hunyuan": Case(
        _hunyuan,
        {
            "hidden_states": _randn(1, 4, 4, 8, 8),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": _randn(1, 8, 16),
            "encoder_attention_mask": _text_mask(),
            "pooled_projections": _randn(1, 8),
            "guidance": torch.tensor([1000.0]),
        },
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    ),
    "cogvideox": Case(
        _cogvideox,
        {
            "hidden_states": _randn(1, 4, 4, 16, 16),
            "encoder_hidden_states": _randn(1, 8, 16),
            "timestep": torch.tensor([500]),
        },
        ("transformer_blocks.0.attn1",),
    ),
    "vit": Case(_vit, {"pixel_values": _randn(1, 3, 64, 64)}, ("layers.0.attention",)),
}
