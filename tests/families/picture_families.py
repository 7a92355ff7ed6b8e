"""diffusers' transformers of pictures."""

from __future__ import annotations

from typing import Any

import torch
from family import HEADS, ROPE, TEXT, TEXT_WIDTH, Inputs, image, long, noise, of_diffusers, real, text

FLUX = {**HEADS, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT_WIDTH}
PATCHED = {**HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 16, "patch_size": 2}
SD3 = {
    **PATCHED, "joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": 8,
    "out_channels": 4, "pos_embed_max_size": 16,
}  # fmt: skip
COGVIEW = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 8,
    "condition_dim": 4, "pos_embed_max_size": 16, "sample_size": 16,
}  # fmt: skip
QWEN = {
    **HEADS, "in_channels": 8, "out_channels": 2, "num_layers": 2, "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": ROPE,
}  # fmt: skip


def inputs(**more: Any) -> Inputs:
    return {"hidden_states": image(), "timestep": torch.ones(1), "encoder_hidden_states": text(), **more}


def flux_inputs(**more: Any) -> Inputs:
    """64 picture tokens that come flat, with their positions as values."""
    return inputs(hidden_states=noise(1, 64, 8), img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(TEXT, 3), **more)


def flux2_inputs() -> Inputs:
    return {**flux_inputs(), "img_ids": torch.zeros(64, 4), "txt_ids": torch.zeros(TEXT, 4)}


def cogview_inputs() -> Inputs:
    sizes = {name: torch.ones(1, 2) for name in ("original_size", "target_size", "crop_coords")}
    return inputs(timestep=long(7), **sizes)


def qwen_inputs(**more: Any) -> Inputs:
    return inputs(hidden_states=noise(1, 64, 8), img_shapes=[(1, 8, 8)], **more)


FAMILIES = [
    of_diffusers(
        "FluxTransformer2DModel",
        converted=2, tokens=("16 + ?",), fast=True,
        config={**FLUX, "pooled_projection_dim": 8, "axes_dims_rope": ROPE},
        inputs=lambda: flux_inputs(pooled_projections=noise(1, 8)),
    ),
    of_diffusers(
        "Flux2Transformer2DModel",
        converted=2, tokens=("16 + ?",),
        config={
            **FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, "guidance_embeds": False
        },
        inputs=flux2_inputs,
    ),
    of_diffusers(
        "Flux3Transformer2DModel",
        converted=2, dense={"short": 1}, tokens=("16 + ?", "?"),
        config={**FLUX, "cond_in_channels": 8, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 16},
        inputs=flux2_inputs,
    ),
    of_diffusers(
        "ChromaTransformer2DModel",
        converted=2, tokens=("16 + ?",),
        config={
            **FLUX, "axes_dims_rope": ROPE, "approximator_num_channels": 16, "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        },
        inputs=flux_inputs,
    ),
    of_diffusers(
        "BriaTransformer2DModel",
        converted=2, tokens=("16 + ?",),
        config={**FLUX, "axes_dims_rope": ROPE}, inputs=flux_inputs,
    ),
    of_diffusers(
        "BriaFiboTransformer2DModel",
        converted=2, tokens=("16 + ?",),
        config={**FLUX, "axes_dims_rope": ROPE, "text_encoder_dim": 16},
        inputs=lambda: flux_inputs(text_encoder_layers=[text(width=16)] * 2),
    ),
    of_diffusers(
        "BriaFibo2Transformer2DModel",
        converted=3, dense={"short": 3}, tokens=("1x8x8", "8 + 1x8x8"),
        config={
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
            "cap_feat_dim": TEXT_WIDTH, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4,
            "gist_max_text_len": 16, "axes_dims": ROPE, "axes_lens": (64, 32, 32),
        },
        inputs=lambda: inputs(encoder_hidden_states=noise(1, 2, TEXT, TEXT_WIDTH)),
    ),
    of_diffusers(
        "LongCatImageTransformer2DModel",
        converted=2, tokens=("16 + ?",),
        config={**FLUX, "pooled_projection_dim": 8, "axes_dims_rope": ROPE}, inputs=flux_inputs,
    ),
    of_diffusers(
        "OvisImageTransformer2DModel",
        converted=2, tokens=("16 + ?",),
        config={**FLUX, "out_channels": 8, "axes_dims_rope": ROPE}, inputs=flux_inputs,
    ),
    of_diffusers(
        "SD3Transformer2DModel",
        converted=3, tokens=("1x8x8", "1x8x8 + 16"), fast=True,
        config={**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        inputs=lambda: inputs(pooled_projections=noise(1, 8)),
    ),
    of_diffusers(
        "AuraFlowTransformer2DModel (with 8 register tokens)",
        converted=2, tokens=("24 + 1x8x8",),
        config={
            **HEADS, "sample_size": 16, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": 32, "pos_embed_max_size": 64,
        },
        inputs=inputs,
    ),
    of_diffusers(
        "CogView3PlusTransformer2DModel",
        converted=2, tokens=("16 + 1x8x8",),
        config=COGVIEW, inputs=cogview_inputs,
    ),
    of_diffusers(
        "CogView4Transformer2DModel",
        converted=2, tokens=("16 + 1x8x8",),
        config={**COGVIEW, "rope_axes_dim": (16, 16)}, inputs=cogview_inputs,
    ),
    of_diffusers(
        "GlmImageTransformer2DModel",
        converted=2, tokens=("16 + ?",),
        no_training="PyTorch's own aot_eager cannot compile its training (nonzero has no fixed shape)",
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": TEXT_WIDTH,
            "time_embed_dim": 16, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 8,
        },
        inputs=lambda: inputs(
            timestep=long(7), prior_token_id=torch.zeros(1, 64).long(),
            prior_token_drop=torch.zeros(1, 64).bool(), target_size=torch.ones(1, 2), crop_coords=torch.ones(1, 2),
        ),
    ),
    of_diffusers(
        "HunyuanImageTransformer2DModel",
        converted=2, dense={"short": 1}, tokens=("1x8x8 + 16",),
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (8, 8),
        },
        inputs=lambda: inputs(hidden_states=image(size=8), encoder_attention_mask=real(12)),
    ),
    of_diffusers(
        "HunyuanDiT2DModel",
        converted=2, dense={"short": 2, "head dim": 1}, tokens=("1x8x8",),
        config={
            **HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 16, "hidden_size": 32, "num_layers": 2,
            "cross_attention_dim": TEXT_WIDTH, "cross_attention_dim_t5": 24, "pooled_projection_dim": 8,
            "text_len": 8, "text_len_t5": 8,
        },
        inputs=lambda: inputs(
            encoder_hidden_states=text(8), text_embedding_mask=real(6, 8), encoder_hidden_states_t5=text(8, 24),
            text_embedding_mask_t5=real(6, 8), image_meta_size=torch.ones(1, 6), style=torch.zeros(1).long(),
            image_rotary_emb=(noise(64, 16), noise(64, 16)),
        ),
    ),
    of_diffusers(
        "QwenImageTransformer2DModel",
        converted=2, tokens=("16 + 1x8x8",), fast=True,
        config=QWEN, inputs=lambda: qwen_inputs(encoder_hidden_states_mask=real(12)),
    ),
    of_diffusers(
        "QwenImage21Transformer2DModel (one graph for all its blocks)",
        converted=1, dense={"short": 1}, tokens=("-",),
        config={
            **HEADS, "in_channels": 8, "out_channels": 8, "num_layers": 2, "context_in_dim": TEXT_WIDTH,
            "axes_dims_rope": ROPE,
        },
        inputs=lambda: {
            **qwen_inputs(), "img_shapes": [[(1, 8, 8)]],
            "img_mask": torch.cat([torch.zeros(1, 16), torch.ones(1, 16)], 1).bool(),
        },
    ),
    of_diffusers(
        "QwenImageControlNetModel",
        converted=1, tokens=("16 + 1x8x8",),
        config={**QWEN, "num_layers": 1},
        inputs=lambda: qwen_inputs(controlnet_cond=noise(1, 64, 8), encoder_hidden_states_mask=real(12)),
    ),
    of_diffusers(
        "NucleusMoEImageTransformer2DModel",
        converted=2, tokens=("- + 16",),
        config={**QWEN, "moe_enabled": False}, inputs=qwen_inputs,
    ),
    of_diffusers(
        "Krea2Transformer2DModel",
        converted=2, dense={"short": 2}, tokens=("16 + ?",), fast=True,
        config={
            "in_channels": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 8,
            "text_hidden_dim": TEXT_WIDTH, "num_text_layers": 2, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1, "axes_dims_rope": ROPE,
        },
        inputs=lambda: inputs(
            hidden_states=noise(1, 64, 8), encoder_hidden_states=noise(1, TEXT, 2, TEXT_WIDTH),
            position_ids=torch.zeros(TEXT + 64, 3),
        ),
    ),
    of_diffusers(
        "DiTTransformer2DModel",
        converted=2, tokens=("1x8x8",),
        config={**PATCHED, "norm_num_groups": 4, "num_embeds_ada_norm": 8},
        inputs=lambda: {"hidden_states": image(), "timestep": long(7), "class_labels": long(3)},
    ),
    of_diffusers(
        "PixArtTransformer2DModel",
        converted=2, dense={"short": 2}, tokens=("1x8x8",),
        config={
            **PATCHED, "norm_num_groups": 4, "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH,
            "use_additional_conditions": False,
        },
        inputs=lambda: inputs(
            timestep=long(7), encoder_attention_mask=real(12),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    of_diffusers(
        "SanaTransformer2DModel (its self-attention is linear)",
        converted=0, dense={"short": 2},
        config={
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH,
            "sample_size": 8,
        },
        inputs=lambda: inputs(hidden_states=image(size=8), timestep=long(7)),
    ),
    of_diffusers(
        "Lumina2Transformer2DModel",
        converted=3, dense={"short": 1}, tokens=("?",),
        config={
            "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": ROPE,
            "axes_lens": (32, 16, 16), "cap_feat_dim": TEXT_WIDTH,
        },
        inputs=lambda: inputs(encoder_attention_mask=real(16)),
    ),
    of_diffusers(
        "LuminaNextDiT2DModel",
        converted=2, dense={"short": 2}, tokens=("1x8x8",),
        config={
            "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
            "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": TEXT_WIDTH,
        },
        inputs=lambda: inputs(
            encoder_mask=real(12).long(), cross_attention_kwargs={},
            image_rotary_emb=torch.polar(torch.ones(8, 8, 8), noise(8, 8, 8)),
        ),
    ),
    of_diffusers(
        "ZImageTransformer2DModel",
        converted=4, tokens=("1x8x8", "1x8x8 + 32", "?"),
        config={
            "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": TEXT_WIDTH, "axes_dims": list(ROPE), "axes_lens": [64, 32, 32],
        },
        inputs=lambda: {"x": [noise(4, 1, 16, 16)], "t": torch.ones(1), "cap_feats": [noise(TEXT, TEXT_WIDTH)]},
    ),
    of_diffusers(
        "OmniGenTransformer2DModel",
        converted=0, dense={"bias": 2},
        config={
            "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
            "num_layers": 2, "pad_token_id": 0, "vocab_size": 32, "in_channels": 4, "time_step_dim": 8,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        inputs=lambda: {
            "hidden_states": image(), "timestep": torch.ones(1), "input_ids": torch.zeros(1, TEXT).long(),
            "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(1, TEXT + 65, TEXT + 65),
            "position_ids": torch.arange(TEXT + 65)[None],
        },
    ),
    of_diffusers(
        "PRXTransformer2DModel",
        converted=2, tokens=("16 + -",),
        config={
            "in_channels": 4, "context_in_dim": TEXT_WIDTH, "hidden_size": 32, "num_heads": 2, "depth": 2,
            "axes_dim": [8, 8],
        },
        inputs=inputs,
    ),
    of_diffusers(
        "HiDreamImageTransformer2DModel",
        converted=2, tokens=("?", "? + 12"),
        config={
            **HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "caption_channels": [TEXT_WIDTH, TEXT_WIDTH], "text_emb_dim": 8, "num_routed_experts": 2,
            "num_activated_experts": 1, "axes_dims_rope": ROPE, "max_resolution": (8, 8), "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        inputs=lambda: {
            "hidden_states": image(), "timesteps": long(7), "encoder_hidden_states_t5": text(4),
            "encoder_hidden_states_llama3": noise(2, 1, 4, TEXT_WIDTH), "pooled_embeds": noise(1, 8),
        },
    ),
    of_diffusers(
        "Ideogram4Transformer2DModel (packed: a mask of segments)",
        converted=0, dense={"mask": 2},
        config={
            "in_channels": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "intermediate_size": 32, "adaln_dim": 8, "llm_features_dim": TEXT_WIDTH, "mrope_section": (4, 2, 2),
        },
        inputs=lambda: inputs(
            hidden_states=noise(1, 80, 8), encoder_hidden_states=text(80),
            position_ids=torch.zeros(1, 80, 3).long(), segment_ids=torch.zeros(1, 80).long(),
            indicator=torch.ones(1, 80).long(),
        ),
    ),
    of_diffusers(
        "ErnieImageTransformer2DModel",
        converted=2, tokens=("1x8x8 + 16",),
        config={
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
            "out_channels": 4, "text_in_dim": TEXT_WIDTH, "rope_axes_dim": ROPE,
        },
        inputs=lambda: {
            "hidden_states": image(size=8), "timestep": torch.ones(1), "text_bth": text(), "text_lens": long(12)
        },
    ),
    of_diffusers(
        "PriorTransformer",
        converted=2, tokens=("? + 4",),
        config={**HEADS, "num_layers": 2, "embedding_dim": 8, "num_embeddings": 28, "additional_embeddings": 4},
        inputs=lambda: {
            "hidden_states": noise(1, 8), "timestep": long(7), "proj_embedding": noise(1, 8),
            "encoder_hidden_states": noise(1, 28, 8),
        },
    ),
    of_diffusers(
        "UniDiffuserModel",
        converted=3, tokens=("12 + 1x8x8",),
        config={
            **HEADS, "text_dim": 16, "clip_img_dim": 16, "num_text_tokens": 8, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "norm_num_groups": 4, "sample_size": 16, "patch_size": 2, "activation_fn": "gelu",
            "num_embeds_ada_norm": 1000, "use_data_type_embedding": True,
        },
        inputs=lambda: {
            "latent_image_embeds": image(), "image_embeds": noise(1, 1, 16), "prompt_embeds": noise(1, 8, 16),
            "timestep_img": long(7), "timestep_text": long(7),
        },
    ),
    of_diffusers(
        "Transformer2DModel",
        converted=1, dense={"short": 1}, tokens=("1x8x8",),
        config={**HEADS, "in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": TEXT_WIDTH},
        inputs=lambda: {"hidden_states": noise(1, 32, 8, 8), "encoder_hidden_states": text()},
    ),
    of_diffusers(
        "DreamLiteTransformer2DModel",
        converted=1, dense={"short": 1}, tokens=("1x8x8",),
        config={
            **HEADS, "in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": TEXT_WIDTH, "qk_norm": "rms_norm"
        },
        inputs=lambda: {"hidden_states": noise(1, 32, 8, 8), "encoder_hidden_states": text()},
    ),
    of_diffusers(
        "TransformerTemporalModel (over 48 frames)",
        converted=2, tokens=("?",),
        config={**HEADS, "in_channels": 32, "norm_num_groups": 8},
        inputs=lambda: {"hidden_states": noise(48, 32, 2, 2), "num_frames": 48},
    ),
    of_diffusers(
        "FluxControlNetModel",
        converted=2, tokens=("16 + ?",),
        config={**FLUX, "pooled_projection_dim": 8, "axes_dims_rope": list(ROPE)},
        inputs=lambda: flux_inputs(pooled_projections=noise(1, 8), controlnet_cond=noise(1, 64, 8)),
    ),
    of_diffusers(
        "SD3ControlNetModel",
        converted=2, tokens=("1x8x8 + 16",),
        config=SD3, inputs=lambda: inputs(pooled_projections=noise(1, 8), controlnet_cond=image()),
    ),
]  # fmt: skip
