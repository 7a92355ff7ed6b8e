"""diffusers' transformers of videos."""

from __future__ import annotations

from typing import Any

import torch
from family import HEADS, ROPE, TEXT, TEXT_WIDTH, Inputs, long, noise, of_diffusers, real, text, video

WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH, "ffn_dim": 32, "num_layers": 2}
HUNYUAN = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
    "text_embed_dim": TEXT_WIDTH, "rope_axes_dim": ROPE,
}  # fmt: skip
COGVIDEO = {
    **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": TEXT_WIDTH, "num_layers": 2,
    "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": TEXT,
}  # fmt: skip
MOCHI = {
    **HEADS, "num_layers": 2, "pooled_projection_dim": 32, "in_channels": 4, "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 8, "max_sequence_length": TEXT,
}  # fmt: skip
KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_WIDTH, "in_text_dim2": 8, "time_dim": 16,
    "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": ROPE,
}  # fmt: skip


def wan_inputs(**more: Any) -> Inputs:
    return {"hidden_states": video(), "timestep": long(7), "encoder_hidden_states": text(), **more}


def hunyuan_inputs(**more: Any) -> Inputs:
    return wan_inputs(encoder_attention_mask=real(12), **more)


def frames_first(**more: Any) -> Inputs:
    """(B, frames, channels, H, W), as CogVideoX takes videos."""
    return wan_inputs(hidden_states=noise(1, 3, 4, 8, 8), **more)


def framepack_inputs() -> Inputs:
    return {
        "hidden_states": video(), "timestep": long(7), "encoder_hidden_states": text(12), "pooled_projections":
        noise(1, 8), "encoder_attention_mask": real(8, 12), "image_embeds": noise(1, 4, 12),
        "indices_latents": torch.arange(3), "latents_clean": noise(1, 4, 1, 8, 8), "indices_latents_clean": long(0),
        "latents_history_2x": noise(1, 4, 2, 8, 8), "indices_latents_history_2x": long(1, 2),
        "latents_history_4x": noise(1, 4, 4, 8, 8), "indices_latents_history_4x": long(3, 4, 5, 6),
    }  # fmt: skip


FAMILIES = [
    of_diffusers(
        "WanTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",), fast=True,
        config=WAN, inputs=wan_inputs,
    ),
    of_diffusers(
        "ChronoEditTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",),
        config=WAN, inputs=wan_inputs,
    ),
    of_diffusers(
        "SkyReelsV2Transformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",),
        config=WAN, inputs=wan_inputs,
    ),
    of_diffusers(
        "WanVACETransformer3DModel",
        converted=3, dense={"short": 3}, tokens=("3x4x4",),
        config={**WAN, "vace_layers": [0], "vace_in_channels": 6},
        inputs=lambda: wan_inputs(control_hidden_states=video(6), control_hidden_states_scale=torch.ones(1)),
    ),
    of_diffusers(
        "WanAnimateTransformer3DModel",
        converted=2, dense={"short": 3}, tokens=("3x4x4",),
        config={
            **WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 12, "motion_encoder_size": 8,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16}, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
        },
        inputs=lambda: wan_inputs(
            hidden_states=video(12), encoder_hidden_states_image=noise(1, 5, 12),
            pose_hidden_states=noise(1, 4, 2, 8, 8), face_pixel_values=noise(1, 3, 5, 8, 8),
        ),
    ),
    of_diffusers(
        "AnyFlowTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",),
        config=WAN,
        inputs=lambda: frames_first(timestep=torch.ones(1, 3), r_timestep=torch.zeros(1, 3)),
    ),
    of_diffusers(
        "AnyFlowFARTransformer3DModel",
        converted=0, dense={"block mask": 2, "short": 2},
        no_training="FlexAttention has no backward on a CPU",
        config={**WAN, "chunk_partition": (1, 2)},
        inputs=lambda: frames_first(
            timestep=torch.ones(1, 3), r_timestep=torch.zeros(1, 3), chunk_partition=[1, 2]
        ),
    ),
    of_diffusers(
        "HeliosTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",),
        config={
            **WAN, "rope_dim": ROPE, "has_multi_term_memory_patch": False, "guidance_cross_attn": False,
            "zero_history_timestep": False,
        },
        inputs=lambda: wan_inputs(indices_hidden_states=torch.arange(3)[None]),
    ),
    of_diffusers(
        "CosmosTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",),
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT_WIDTH,
            "adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False,
        },
        inputs=lambda: wan_inputs(timestep=torch.ones(1)),
    ),
    of_diffusers(
        "CogVideoXTransformer3DModel",
        converted=2, tokens=("16 + 3x4x4",), fast=True,
        config=COGVIDEO, inputs=frames_first,
    ),
    of_diffusers(
        "ConsisIDTransformer3DModel (with its face extractor)",
        converted=9, tokens=("16 + 3x4x4", "-"),
        config={
            **COGVIDEO, "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 16,
            "cross_attn_num_heads": 2, "LFE_id_dim": 8, "LFE_vit_dim": 8, "LFE_depth": 5, "LFE_dim_head": 16,
            "LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 32, "LFE_output_dim": 21, "LFE_ff_mult": 1,
            "LFE_num_scale": 5, "local_face_scale": 1.0,
        },
        inputs=lambda: frames_first(id_cond=noise(1, 8), id_vit_hidden=[noise(1, 24, 8) for _ in range(5)]),
    ),
    of_diffusers(
        "EasyAnimateTransformer3DModel",
        converted=2, tokens=("16 + 3x4x4",),
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 8, "sample_height": 8,
            "num_layers": 2, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": TEXT_WIDTH,
        },
        inputs=wan_inputs,
    ),
    of_diffusers(
        "AllegroTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",),
        config={
            **HEADS, "attention_head_dim": 24, "cross_attention_dim": 48, "num_layers": 2, "sample_height": 8,
            "sample_width": 8, "sample_frames": 3, "caption_channels": TEXT_WIDTH,
        },
        inputs=lambda: wan_inputs(
            image_rotary_emb=(
                tuple((noise(48, 8), noise(48, 8)) for _ in range(3)),
                tuple(torch.arange(48)[None] for _ in range(3)),
            )
        ),
    ),
    of_diffusers(
        "LatteTransformer3DModel",
        converted=1, dense={"short": 2}, tokens=("1x8x8",),
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "cross_attention_dim": 32,
            "sample_size": 16, "patch_size": 2, "caption_channels": TEXT_WIDTH, "video_length": 2,
            "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10, "attention_bias": True,
        },
        inputs=lambda: wan_inputs(hidden_states=noise(1, 4, 2, 16, 16)),
    ),
    of_diffusers(
        "LTXVideoTransformer3DModel",
        converted=2, dense={"short": 2}, tokens=("3x4x4",), fast=True,
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
            "caption_channels": TEXT_WIDTH,
        },
        inputs=lambda: hunyuan_inputs(hidden_states=noise(1, 48, 4), num_frames=3, height=4, width=4),
    ),
    of_diffusers(
        "LTX2VideoTransformer3DModel",
        converted=1, dense={"short": 5}, tokens=("3x4x4",),
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 1,
            "caption_channels": TEXT_WIDTH, "audio_in_channels": 4, "audio_out_channels": 4,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32,
        },
        inputs=lambda: hunyuan_inputs(
            hidden_states=noise(1, 48, 4), audio_hidden_states=noise(1, 12, 4), audio_encoder_hidden_states=text(),
            timestep=torch.ones(1), audio_encoder_attention_mask=real(12), num_frames=3, height=4, width=4,
            audio_num_frames=12,
        ),
    ),
    of_diffusers(
        "SanaWMLTX2RefinerTransformer3DModel",
        converted=1, dense={"short": 1}, tokens=("?",),
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 1,
            "caption_channels": TEXT_WIDTH,
        },
        inputs=lambda: wan_inputs(
            hidden_states=noise(1, 48, 4), timestep=torch.ones(1), video_rotary_emb=(noise(1, 48, 32), noise(1, 48, 32))
        ),
    ),
    of_diffusers(
        "MochiTransformer3DModel",
        converted=0, dense={"head dim": 1}, outside=2,
        config=MOCHI, inputs=hunyuan_inputs,
    ),
    of_diffusers(
        "MochiTransformer3DModel (shapes captured)",
        converted=2, dense={"head dim": 1}, tokens=("3x4x4 + 16",), captures_shapes=True,
        config=MOCHI, inputs=hunyuan_inputs,
    ),
    of_diffusers(
        "HunyuanVideoTransformer3DModel",
        converted=2, dense={"short": 1}, tokens=("3x4x4 + 16",), fast=True,
        config={**HUNYUAN, "pooled_projection_dim": 8, "guidance_embeds": False},
        inputs=lambda: hunyuan_inputs(pooled_projections=noise(1, 8)),
    ),
    of_diffusers(
        "HunyuanVideoFramepackTransformer3DModel",
        converted=2, dense={"short": 1}, tokens=("? + 12",),
        config={
            **HUNYUAN, "pooled_projection_dim": 8, "guidance_embeds": False, "has_image_proj": True,
            "image_proj_dim": 12, "has_clean_x_embedder": True,
        },
        inputs=framepack_inputs,
    ),
    of_diffusers(
        "HunyuanVideo15Transformer3DModel",
        converted=1, dense={"short": 1}, tokens=("?",), fast=True,
        config={
            **{name: value for name, value in HUNYUAN.items() if name != "num_single_layers"},
            "text_embed_2_dim": 24, "image_embed_dim": 12, "task_type": "t2v",
        },
        inputs=lambda: hunyuan_inputs(
            hidden_states=noise(1, 4, 3, 4, 4), timestep=torch.ones(1), encoder_hidden_states_2=text(8, 24),
            encoder_attention_mask_2=real(6, 8), image_embeds=torch.zeros(1, 2, 12),
        ),
    ),
    of_diffusers(
        "MotifVideoTransformer3DModel",
        converted=2, tokens=("3x4x4 + 16",),
        config={
            **{name: value for name, value in HUNYUAN.items() if name != "num_refiner_layers"},
            "num_decoder_layers": 0,
        },
        inputs=hunyuan_inputs,
    ),
    of_diffusers(
        "SanaVideoTransformer3DModel (its self-attention is linear)",
        converted=0, dense={"short": 2},
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH,
            "sample_size": 8,
        },
        inputs=wan_inputs,
    ),
    of_diffusers(
        "Kandinsky5Transformer3DModel",
        converted=2, dense={"short": 3}, tokens=("3x4x4",),
        config=KANDINSKY,
        inputs=lambda: {
            "hidden_states": noise(1, 3, 8, 8, 4), "encoder_hidden_states": text(), "timestep": torch.ones(1),
            "pooled_projections": noise(1, 8), "text_rope_pos": torch.arange(TEXT),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
        },
    ),
    of_diffusers(
        "Kandinsky6Transformer3DModel",
        converted=2, dense={"short": 12}, tokens=("3x4x4",),
        config={**KANDINSKY, "visual_cond": False},
        inputs=lambda: {
            "hidden_states": noise(1, 3, 8, 8, 4), "encoder_hidden_states": text(), "timestep": torch.ones(1),
            "pooled_projections": noise(1, 8), "audio_hidden_states": noise(1, 12, 20),
            "encoder_attention_mask": real(12),
        },
    ),
    of_diffusers(
        "Kandinsky6SRTransformer3DModel",
        converted=0, dense={"block mask": 2}, other_softmaxes=2,
        no_training="FlexAttention has no backward on a CPU",
        config={
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
            "num_visual_blocks": 2, "axes_dims": ROPE, "nabla_window": (1, 1, 1),
        },
        inputs=lambda: {"hidden_states": noise(1, 2, 8, 8, 9), "timestep": torch.ones(1)},
    ),
    of_diffusers(
        "MiniMaxH3Transformer3DModel",
        converted=2, dense={"short": 1}, tokens=("?",),
        config={
            **HEADS, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4,
            "audio_in_channels": 4, "text_dim": TEXT_WIDTH, "freq_dim": 8, "time_embed_hidden_dim": 16,
            "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        inputs=lambda: {
            "hidden_states": noise(1, 48, 16), "audio_hidden_states": noise(1, 8, 4), "encoder_hidden_states": text(),
            "timestep": torch.ones(1), "timestep_indices": torch.zeros(72).long(),
            "token_tags": torch.tensor([1] * 16 + [0] * 48 + [2] * 8), "position_ids": torch.zeros(72, 3).long(),
            "video_indices": torch.arange(16, 64), "audio_indices": torch.arange(64, 72),
            "text_indices": torch.arange(16),
        },
    ),
    of_diffusers(
        "JoyImageEditTransformer3DModel",
        converted=2, tokens=("3x4x4 + 16",),
        config={
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT_WIDTH, "num_layers": 2,
            "rope_dim_list": list(ROPE),
        },
        inputs=lambda: wan_inputs(timestep=torch.ones(1)),
    ),
    of_diffusers(
        "JoyImageEditPlusTransformer3DModel",
        converted=2, tokens=("? + 16",),
        config={
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT_WIDTH, "num_layers": 2,
            "rope_dim_list": list(ROPE),
        },
        inputs=lambda: {
            "hidden_states": noise(1, 48, 4, 1, 2, 2), "timestep": torch.ones(1), "encoder_hidden_states": text(),
            "encoder_hidden_states_mask": real(12).float(), "shape_list": [[(3, 4, 4)]],
        },
    ),
]  # fmt: skip
