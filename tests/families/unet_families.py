"""diffusers' UNets, their ControlNets, and autoencoders with attention."""

from __future__ import annotations

from typing import Any

import torch
from family import TEXT, TEXT_WIDTH, Inputs, image, long, noise, of_diffusers, real, text

UNET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "attention_head_dim": 2, "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
UNET_3D = {
    **UNET, "attention_head_dim": 16, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}  # fmt: skip
CONTROL = {name: value for name, value in UNET.items() if name not in ("sample_size", "up_block_types")}
AUTOENCODER = {"block_out_channels": (16,), "norm_num_groups": 8, "sample_size": 8}
PICTURES = ("1x16x16", "1x8x8")


def inputs(**more: Any) -> Inputs:
    return {"sample": image(), "timestep": long(7), "encoder_hidden_states": text(), **more}


def four_frames() -> Inputs:
    return inputs(sample=noise(1, 4, 4, 16, 16), encoder_hidden_states=noise(4, TEXT, TEXT_WIDTH))


FAMILIES = [
    of_diffusers(
        "UNet2DModel",
        converted=4, tokens=("1x8x8",),
        config={
            "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
            "attention_head_dim": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        inputs=lambda: {"sample": image(3), "timestep": long(7)},
    ),
    of_diffusers(
        "UNet2DConditionModel",
        converted=4, dense={"short": 4}, tokens=PICTURES,
        config=UNET, inputs=inputs,
    ),
    of_diffusers(
        "UNet2DConditionModel (AttnProcessor: baddbmm and softmax)",
        converted=4, dense={"short": 4}, tokens=PICTURES,
        config=UNET, inputs=inputs, processor="AttnProcessor",
    ),
    of_diffusers(
        "UNet3DConditionModel (over 4 frames)",
        converted=4, dense={"short": 14}, tokens=PICTURES,
        config=UNET_3D, inputs=lambda: inputs(sample=noise(1, 4, 4, 16, 16)),
    ),
    of_diffusers(
        "I2VGenXLUNet (its keys of a picture are 84; in the real model too few)",
        converted=8, dense={"short": 10, "head dim": 1}, tokens=(*PICTURES, "-", "16 + - + 4"),
        config=UNET_3D,
        inputs=lambda: inputs(
            sample=noise(1, 4, 4, 16, 16), fps=long(8), image_latents=noise(1, 4, 4, 16, 16),
            image_embeddings=noise(1, TEXT_WIDTH),
        ),
    ),
    of_diffusers(
        "UNetSpatioTemporalConditionModel (over 4 frames)",
        converted=4, dense={"short": 12}, tokens=PICTURES,
        config={
            "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "num_attention_heads": (2, 4),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": TEXT_WIDTH, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24, "num_frames": 4,
        },
        inputs=lambda: inputs(
            sample=noise(1, 4, 8, 16, 16), encoder_hidden_states=text(1), added_time_ids=torch.ones(1, 3)
        ),
    ),
    of_diffusers(
        "UNetMotionModel (over 4 frames)",
        converted=4, dense={"short": 18}, tokens=PICTURES,
        config={
            **{name: value for name, value in UNET.items() if name != "attention_head_dim"},
            "num_attention_heads": 2, "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        inputs=four_frames,
    ),
    of_diffusers(
        "UNetControlNetXSModel",
        converted=9, dense={"short": 9}, tokens=PICTURES,
        config={
            "sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 8, "num_attention_heads": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": TEXT_WIDTH,
            "ctrl_conditioning_embedding_out_channels": (8, 8), "ctrl_block_out_channels": (16, 16),
            "ctrl_num_attention_heads": 1, "ctrl_max_norm_num_groups": 4,
        },
        inputs=lambda: inputs(controlnet_cond=image(3, 32)),
    ),
    of_diffusers(
        "UNet1DModel",
        converted=12, tokens=("?",),
        config={"sample_size": 64, "block_out_channels": (32, 32, 64), "extra_in_channels": 64},
        inputs=lambda: {"sample": noise(1, 2, 256), "timestep": long(7)},
    ),
    of_diffusers(
        "UVit2DModel",
        converted=2, dense={"short": 6}, tokens=("1x8x8",),
        config={
            "hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
            "encoder_hidden_size": TEXT_WIDTH, "vocab_size": 32, "codebook_size": 31, "in_channels": 32,
            "block_out_channels": 32, "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 32, "sample_size": 8,
        },
        inputs=lambda: {
            "input_ids": torch.zeros(1, 8, 8).long(), "encoder_hidden_states": text(),
            "pooled_text_emb": noise(1, 32), "micro_conds": torch.ones(1, 5),
        },
    ),
    of_diffusers(
        "Kandinsky3UNet",
        converted=3, dense={"short": 10}, tokens=PICTURES,
        config={
            "time_embedding_dim": 16, "groups": 8, "attention_head_dim": 16, "layers_per_block": 3,
            "block_out_channels": (32, 64), "cross_attention_dim": 32, "encoder_hid_dim": TEXT_WIDTH,
        },
        inputs=lambda: inputs(encoder_attention_mask=real(12).long()),
    ),
    of_diffusers(
        "StableCascadeUNet",
        converted=4, tokens=("- + 12",),
        config={
            "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 32,
            "block_out_channels": (32, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1), "clip_text_in_channels": TEXT_WIDTH,
            "clip_text_pooled_in_channels": 8, "clip_image_in_channels": 8, "dropout": (0.0, 0.0),
        },
        inputs=lambda: {
            "sample": image(), "timestep_ratio": torch.ones(1), "clip_text_pooled": noise(1, 1, 8),
            "clip_text": text(4), "clip_img": noise(1, 1, 8),
        },
    ),
    of_diffusers(
        "DreamLiteUNetModel",
        converted=4, dense={"short": 5}, tokens=("1x8x8",),
        config={
            **UNET, "ff_mult": 2,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        },
        inputs=inputs,
    ),
    of_diffusers(
        "AudioLDM2UNet2DConditionModel",
        converted=4, dense={"short": 4}, tokens=PICTURES,
        config=UNET, inputs=lambda: inputs(encoder_hidden_states_1=text()),
    ),
    of_diffusers(
        "ControlNetModel",
        converted=2, dense={"short": 2}, tokens=PICTURES,
        config={**CONTROL, "conditioning_embedding_out_channels": (8, 8)},
        inputs=lambda: inputs(controlnet_cond=image(3, 32)),
    ),
    of_diffusers(
        "SparseControlNetModel (over 4 frames)",
        converted=2, dense={"short": 4}, tokens=PICTURES,
        config={
            **CONTROL, "motion_num_attention_heads": 2, "conditioning_embedding_out_channels": (8, 8),
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        },
        inputs=lambda: {
            **four_frames(), "controlnet_cond": noise(1, 4, 4, 16, 16), "conditioning_mask": noise(1, 1, 4, 16, 16)
        },
    ),
    of_diffusers(
        "AutoencoderKL",
        converted=2, tokens=("1x8x8",), fast=True,
        config=AUTOENCODER, inputs=lambda: {"sample": image(3, 8)},
    ),
    of_diffusers(
        "VQModel",
        converted=2, tokens=("1x8x8",),
        config=AUTOENCODER, inputs=lambda: {"sample": image(3, 8)},
    ),
]  # fmt: skip
